"""From a representation ``x [..., n, d]`` to a symmetric graph of its neighbours and the Laplacian of that.

Takes points; gives Neighbors (exact, by :func:`knn`), a Graph (edges with weights and degrees, by :func:`build_graph`)
and its Laplacian, an operator on functions ``[..., n, m]``.
"""

from lfm_torch.graphs.graph import Graph, build_graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.search import Neighbors

__all__ = ["Graph", "Laplacian", "Neighbors", "build_graph", "knn"]
