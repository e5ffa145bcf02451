"""From a map, or from two sets of points, to what is read from them: similarity, and which samples differ.

Takes a FunctionalMap or points; gives values by name. :data:`MEASURES` describes every measure: range, direction,
chance, invariances. The classical ones come from :mod:`lfm_torch.baselines`.
"""

from lfm_torch.measures.distortion import Distortion, map_distortion, shape_difference
from lfm_torch.measures.heat_probes import heat_overlap_probes
from lfm_torch.measures.map_readings import (
    commutativity_error,
    heat_overlap,
    lfm_similarity,
    orthogonality_error,
    spectral_distance,
    subspace_overlap,
)
from lfm_torch.measures.table import DEFAULT_MEASURES, MAP_MEASURES, MEASURES, POINT_MEASURES, check_measures, read

__all__ = [
    "DEFAULT_MEASURES",
    "MAP_MEASURES",
    "MEASURES",
    "POINT_MEASURES",
    "Distortion",
    "check_measures",
    "commutativity_error",
    "heat_overlap",
    "heat_overlap_probes",
    "lfm_similarity",
    "map_distortion",
    "orthogonality_error",
    "read",
    "shape_difference",
    "spectral_distance",
    "subspace_overlap",
]
