"""From many representations to all their pairs: planned, computed piece by piece, stored, and judged against chance.

Takes representations, checkpoints or any other source; gives a Comparison, matrices by measure with views of them, and
for one pair its significance and its sensitivity to settings.
"""

from lfm_torch.comparison.across_settings import Sensitivity, sensitivity
from lfm_torch.comparison.against_chance import Significance, significance
from lfm_torch.comparison.items import Failure, Item, Remark
from lfm_torch.comparison.result import Comparison, LayerMatching, Trajectory
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
