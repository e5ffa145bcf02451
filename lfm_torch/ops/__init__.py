"""The operators that the kernels of csrc/ implement: a file each, named as the folder of its kernels.

Takes plain tensors and gives plain tensors, for any stage above. A file holds the schema, the reference twin, the fake
kernel, the gradient and sample inputs, from which tests are made; ``_extension.py`` loads the libraries.
"""

from lfm_torch.ops._registry import OPERATORS, Operator, has_native_kernel
from lfm_torch.ops.geodesic import geodesics
from lfm_torch.ops.graphs import connected_components, symmetrize_edges
from lfm_torch.ops.knn import nearest_neighbors, ragged_nearest_neighbors
from lfm_torch.ops.krylov import batched_eigh, orthonormalize_block
from lfm_torch.ops.laplacian import edge_products, laplacian_product
from lfm_torch.ops.maps import inner_products, map_energies
from lfm_torch.ops.recurrence import laplacian_recurrence

__all__ = [
    "OPERATORS",
    "Operator",
    "batched_eigh",
    "connected_components",
    "edge_products",
    "geodesics",
    "has_native_kernel",
    "inner_products",
    "laplacian_product",
    "laplacian_recurrence",
    "map_energies",
    "nearest_neighbors",
    "orthonormalize_block",
    "ragged_nearest_neighbors",
    "symmetrize_edges",
]
