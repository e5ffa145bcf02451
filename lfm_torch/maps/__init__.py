"""From two bases to the functional map ``C_xy [..., m_y, m_x]`` between them, its refinements, and pairs of rows.

Takes two Bases, and descriptors where rows do not pair; gives a FunctionalMap, refined by ZoomOut, ICP or Sinkhorn, and
from it the row of x that corresponds to each row of y.
"""

from lfm_torch.maps.correspondence import pointwise_map
from lfm_torch.maps.fmap import FunctionalMap, paired_map
from lfm_torch.maps.refine import icp, sinkhorn_map, zoomout
from lfm_torch.maps.retrieval import mean_reciprocal_rank
from lfm_torch.maps.solve import functional_map

__all__ = [
    "FunctionalMap",
    "functional_map",
    "icp",
    "mean_reciprocal_rank",
    "paired_map",
    "pointwise_map",
    "sinkhorn_map",
    "zoomout",
]
