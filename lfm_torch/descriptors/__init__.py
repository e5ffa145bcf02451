"""Functions ``f [..., n, p]`` that should correspond between two spaces: what a functional map is solved from.

Takes points, labels or a basis; gives functions that join those of other kinds with ``torch.cat`` along the last
dimension. Weak supervision: distances to anchors, diffusion from anchors, class indicators. Without supervision: heat
and wave kernel signatures.
"""

from lfm_torch.descriptors.anchors import anchor_distances, farthest_points, geodesic_distances, label_indicators
from lfm_torch.descriptors.kernels import (
    heat_diffusion,
    heat_kernel_signature,
    heat_times,
    normalize,
    wave_kernel_signature,
)

__all__ = [
    "anchor_distances",
    "farthest_points",
    "geodesic_distances",
    "heat_diffusion",
    "heat_kernel_signature",
    "heat_times",
    "label_indicators",
    "normalize",
    "wave_kernel_signature",
]
