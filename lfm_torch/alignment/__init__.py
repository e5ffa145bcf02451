"""From two spaces whose rows need not pair to what joins them: pairs of rows, a map, a translator, and their evidence.

Takes points of two spaces, with anchors, labels or descriptors where there are any; gives an Alignment, or the parts of
one: translators fitted to known pairs, matchings by distances alone, maps of many spaces made consistent.
"""

from lfm_torch.alignment.consistent import ConsistentMaps, consistent_maps
from lfm_torch.alignment.fit import align
from lfm_torch.alignment.gromov import gromov_wasserstein
from lfm_torch.alignment.relative import relative_representations
from lfm_torch.alignment.result import Alignment
from lfm_torch.alignment.stitching import stitch
from lfm_torch.alignment.translator import Translator, fit_translator
from lfm_torch.alignment.weights import choose_weights

__all__ = [
    "Alignment",
    "ConsistentMaps",
    "Translator",
    "align",
    "choose_weights",
    "consistent_maps",
    "fit_translator",
    "gromov_wasserstein",
    "relative_representations",
    "stitch",
]
