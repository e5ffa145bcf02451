"""Latent functional maps: compare, align and transfer neural representations.

The flow is representation -> graph -> basis -> functional map -> readings; ``pipeline.py`` composes it. Arrays of NumPy
are taken wherever tensors are; what comes back are tensors.
"""

from lfm_torch import baselines, descriptors, losses
from lfm_torch._version import __version__ as __version__
from lfm_torch._warnings import LFMWarning
from lfm_torch.alignment.fit import align
from lfm_torch.alignment.result import Alignment
from lfm_torch.alignment.transfer import fit_translator, stitch
from lfm_torch.comparison.evidence import sensitivity, significance
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare
from lfm_torch.graphs.graph import Graph, build_graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.graphs.neighbors import Neighbors, knn
from lfm_torch.maps.correspondence import mean_reciprocal_rank, pointwise_map
from lfm_torch.maps.fmap import FunctionalMap, paired_map
from lfm_torch.maps.refine import icp, sinkhorn_map, zoomout
from lfm_torch.maps.solve import functional_map
from lfm_torch.measures.distortion import Distortion, shape_difference
from lfm_torch.measures.map_readings import heat_overlap, heat_overlap_probes, lfm_similarity, subspace_overlap
from lfm_torch.ops._extension import build_info
from lfm_torch.pipeline import distortion, similarity
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.extraction import extract
from lfm_torch.spectral.basis import Basis, spectral_basis
from lfm_torch.spectral.basis_alignment import align_signs, align_subspaces

__all__ = [
    "Alignment",
    "Basis",
    "Checkpoints",
    "Comparison",
    "Distortion",
    "FunctionalMap",
    "Graph",
    "LFMWarning",
    "Laplacian",
    "Neighbors",
    "align",
    "align_signs",
    "align_subspaces",
    "baselines",
    "build_graph",
    "build_info",
    "compare",
    "descriptors",
    "distortion",
    "extract",
    "fit_translator",
    "functional_map",
    "heat_overlap",
    "heat_overlap_probes",
    "icp",
    "knn",
    "lfm_similarity",
    "losses",
    "mean_reciprocal_rank",
    "paired_map",
    "pointwise_map",
    "sensitivity",
    "shape_difference",
    "significance",
    "similarity",
    "sinkhorn_map",
    "spectral_basis",
    "stitch",
    "subspace_overlap",
    "zoomout",
]
