"""Latent functional maps: compare, align and transfer neural representations.

The flow is representation -> graph -> basis -> functional map -> readings; ``pipeline.py`` composes it. Arrays of NumPy
are taken wherever tensors are; what comes back are tensors.
"""

# ruff: noqa: I001, RUF022 (in the order of the flow)
from lfm_torch._version import __version__ as __version__
from lfm_torch._warnings import LFMWarning
from lfm_torch.ops._extension import build_info
from lfm_torch.representations import Checkpoints, extract
from lfm_torch.graphs import Graph, Laplacian, Neighbors, build_graph, knn
from lfm_torch.spectral import Basis, align_signs, align_subspaces, spectral_basis
from lfm_torch import descriptors
from lfm_torch.maps import (
    FunctionalMap,
    functional_map,
    icp,
    mean_reciprocal_rank,
    paired_map,
    pointwise_map,
    sinkhorn_map,
    zoomout,
)
from lfm_torch import baselines
from lfm_torch.measures import (
    Distortion,
    heat_overlap,
    heat_overlap_probes,
    lfm_similarity,
    shape_difference,
    subspace_overlap,
)
from lfm_torch.alignment import Alignment, align, fit_translator, stitch
from lfm_torch.pipeline import distortion, similarity
from lfm_torch.comparison import Comparison, compare, sensitivity, significance
from lfm_torch import losses

__all__ = [
    # what a call may say beside its result, and what runs here
    "LFMWarning",
    "build_info",
    # models and files to representations
    "Checkpoints",
    "extract",
    # graphs
    "Graph",
    "Laplacian",
    "Neighbors",
    "build_graph",
    "knn",
    # bases
    "Basis",
    "align_signs",
    "align_subspaces",
    "spectral_basis",
    # maps
    "FunctionalMap",
    "descriptors",
    "functional_map",
    "icp",
    "mean_reciprocal_rank",
    "paired_map",
    "pointwise_map",
    "sinkhorn_map",
    "zoomout",
    # two spaces
    "Distortion",
    "baselines",
    "distortion",
    "heat_overlap",
    "heat_overlap_probes",
    "lfm_similarity",
    "shape_difference",
    "similarity",
    "subspace_overlap",
    # two spaces whose rows need not pair
    "Alignment",
    "align",
    "fit_translator",
    "stitch",
    # many spaces
    "Comparison",
    "compare",
    "sensitivity",
    "significance",
    # training
    "losses",
]
