"""From many representations to all their pairs: planned, computed piece by piece, stored, and judged against chance.

Takes representations, checkpoints or any other source; gives a Comparison, matrices by measure with views of them, and
for one pair its significance and its sensitivity to settings.
"""

from lfm_torch.comparison.evidence import Sensitivity, Significance, sensitivity, significance
from lfm_torch.comparison.result import Comparison, Failure, Item, LayerMatching, Remark, Trajectory
from lfm_torch.comparison.run import compare

__all__ = [
    "Comparison",
    "Failure",
    "Item",
    "LayerMatching",
    "Remark",
    "Sensitivity",
    "Significance",
    "Trajectory",
    "compare",
    "sensitivity",
    "significance",
]
