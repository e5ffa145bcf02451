"""The symmetric neighbour graph: from points ``[..., n, d]`` to a weighted CSR matrix, and from matrices of others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks, _files, ops
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.graphs.edges import Edges
from lfm_torch.graphs.laplacian import Laplacian, Normalization, scipy_csr
from lfm_torch.graphs.neighbors import default_n_neighbors, knn
from lfm_torch.graphs.points import Metric, power_into_range
from lfm_torch.graphs.search import Neighbors
from lfm_torch.graphs.sets import set_offsets
from lfm_torch.graphs.weights import WEIGHTS, Weights, directed_weights
from lfm_torch.ops.graphs import SYMMETRIZATIONS
from lfm_torch.ops.knn import METRICS

if TYPE_CHECKING:
    import scipy.sparse

Symmetrization = Literal["mean", "union", "mutual"]


@dataclass(frozen=True, repr=False, eq=False)
class Graph(Edges):
    """Symmetric weighted neighbour graph of one point set, or of a batch of equal or unequal (ragged) sizes.

    The batch is one block-diagonal CSR matrix: row ``b * n_nodes + i`` is node ``i`` of graph ``b``. A ragged batch is
    one graph of all nodes, of which graph ``b`` has those from ``offsets[b]`` to ``offsets[b + 1]``.

    Attributes:
        rowptr: ``[b n + 1]`` int64, start of each row.
        col: ``[nnz]`` int32, columns in ascending order within a row.
        weight: ``[nnz]`` edge weights, symmetric.
        n_nodes: points per graph; of a ragged batch, all points.
        batch_shape: leading dimensions of the points.
        n_neighbors, metric, weights, symmetrize: how it was built.
        offsets: of a ragged batch of b graphs ``[b + 1]`` int64 in CPU memory, None otherwise.
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor
    n_nodes: int
    batch_shape: tuple[int, ...] = ()
    n_neighbors: int = 0
    metric: str = "unknown"
    weights: str = "unknown"
    symmetrize: str = "unknown"
    offsets: Tensor | None = None

    def __post_init__(self) -> None:
        if self.weight.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"weight must be float32 or float64, got {self.weight.dtype}")

    def __repr__(self) -> str:
        batch = f"batch={list(self.batch_shape)}, " if self.batch_shape else ""
        batch = batch if self.offsets is None else f"ragged batch of {self.offsets.numel() - 1}, "
        how = f"{self.n_neighbors} neighbors, {self.metric}, {self.weights}, {self.symmetrize}"
        return (
            f"Graph({batch}n_nodes={self.n_nodes}, n_edges={self.col.numel()}, {how}, "
            f"{str(self.weight.dtype).removeprefix('torch.')}, {self.weight.device})"
        )

    @classmethod
    def batch(cls, graphs: Sequence[Graph]) -> Graph:
        """Put graphs side by side in one: ``[b]`` of equal size, or a ragged batch; :meth:`unbatch` takes them apart.

        What they were built with is kept where they agree.

        Raises:
            ValueError: no graph, one that is a batch itself, or graphs of several dtypes or devices.
        """
        if not graphs or any(graph.batch_shape or graph.offsets is not None for graph in graphs):
            raise ValueError(f"graphs must be one or more single graphs, got {list(graphs)!r}")
        kinds = {(graph.weight.dtype, graph.weight.device) for graph in graphs}
        if len(kinds) > 1:
            raise ValueError(f"graphs must have one dtype and device, got {sorted(map(str, kinds))}")
        sizes = [graph.n_nodes for graph in graphs]
        first_node = [0, *accumulate(sizes)]
        first_edge = [0, *accumulate(graph.col.numel() for graph in graphs)]
        rowptr = [graph.rowptr[:-1] + first for graph, first in zip(graphs, first_edge, strict=False)]
        col = [graph.col + first for graph, first in zip(graphs, first_node, strict=False)]
        names = ("n_neighbors", "metric", "weights", "symmetrize")
        how: dict[str, Any] = {
            name: getattr(graphs[0], name) for name in names if len({getattr(g, name) for g in graphs}) == 1
        }
        joined = cls(
            torch.cat([*rowptr, rowptr[0].new_tensor(first_edge[-1:])]),
            torch.cat(col),
            torch.cat([graph.weight for graph in graphs]),
            first_node[-1],
            **how,
        )
        if len(set(sizes)) == 1:
            return replace(joined, n_nodes=sizes[0], batch_shape=(len(graphs),))
        return replace(joined, offsets=torch.tensor(first_node, dtype=torch.int64, device="cpu"))

    def unbatch(self) -> list[Graph]:
        """Return the graphs of the batch one by one, those of several leading dimensions in order.

        Example:
            >>> import torch, lfm_torch as lfm
            >>> x, batch = torch.randn(50, 3), torch.tensor([0] * 20 + [1] * 30)
            >>> graphs = lfm.build_graph(x, n_neighbors=5, batch=batch).unbatch()
            >>> [lfm.spectral_basis(graph, n_basis=4).evecs.shape[0] for graph in graphs]
            [20, 30]
        """
        total = self.rowptr.numel() - 1
        bounds = list(range(0, total + 1, self.n_nodes)) if self.offsets is None else self.offsets.tolist()
        edges = self.rowptr[torch.tensor(bounds, dtype=torch.int64, device=self.rowptr.device)].tolist()
        graphs = []
        for (begin, end), (first, last) in zip(pairwise(bounds), pairwise(edges), strict=True):
            rowptr, col = self.rowptr[begin : end + 1] - first, self.col[first:last] - begin
            part = {"rowptr": rowptr, "col": col, "weight": self.weight[first:last], "n_nodes": end - begin}
            graphs.append(replace(self, **part, batch_shape=(), offsets=None))
        return graphs

    def laplacian(self, normalization: Normalization = "symmetric") -> Laplacian:
        """Return the Laplacian as an operator: see :class:`Laplacian`."""
        return Laplacian(self, normalization)

    def to(self, target: torch.device | torch.dtype | str) -> Graph:
        """Move to a device (a str names one), or cast the weights to a dtype."""
        weight = self.weight.to(target)
        device = weight.device
        return replace(self, rowptr=self.rowptr.to(device), col=self.col.to(device), weight=weight)

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """Return the weights as a SciPy CSR matrix (block diagonal for a batch).

        Raises:
            ImportError: SciPy is not installed.
        """
        return scipy_csr(self.rowptr, self.col, self.weight)

    def to_torch_csr(self) -> Tensor:
        """Return the weights as a torch sparse CSR tensor (block diagonal for a batch)."""
        total = self.rowptr.numel() - 1
        return torch.sparse_csr_tensor(
            self.rowptr,
            self.col.long(),
            self.weight,
            (total, total),
            device=self.weight.device,
            check_invariants=False,
        )

    def update(self, x: ArrayLike) -> Graph:
        """Build the graph of new values ``x [..., n, d]`` of the same samples in the same way, as between checkpoints.

        The neighbours are searched anew: limits from the old ones would save at most a tenth of the search, and take a
        fifth of it to evaluate. What does carry over is the basis: ``spectral_basis(graph, warm_start=...)``.

        Raises:
            ValueError: this graph does not know how it was built, or ``x`` has other batch dimensions or samples.
        """
        if self.weights not in WEIGHTS or self.metric not in METRICS or self.symmetrize not in SYMMETRIZATIONS:
            raise ValueError(f"the graph must come from build_graph to be updated, got metric={self.metric!r}")
        x = _checks.as_tensor("x", x)
        wanted = (*self.batch_shape, self.n_nodes)
        if tuple(x.shape[:-1]) != wanted:
            raise ValueError(f"x must have shape {[*wanted, 'd']}, the samples of the graph, got {list(x.shape)}")
        how: Any = {"metric": self.metric, "weights": self.weights, "symmetrize": self.symmetrize}
        return build_graph(x, n_neighbors=self.n_neighbors, batch=self.offsets, **how)

    @property
    def edge_index(self) -> Tensor:
        """Both directions of every edge as ``[2, nnz]`` int64, row by row, as PyG has them."""
        nodes = torch.arange(self.rowptr.numel() - 1, device=self.col.device)
        return torch.stack([torch.repeat_interleave(nodes, self.rowptr.diff()), self.col.long()])

    @classmethod
    def from_torch_csr(cls, matrix: Tensor) -> Graph:
        """Take the weights of a symmetric torch sparse CSR tensor ``[n, n]``, half types as float32.

        Entries may come in any order and more than once (they add up); explicit zeros are no edges.

        Raises:
            TypeError: not a floating-point sparse CSR tensor.
            ValueError: not square or not symmetric, weights that are negative or not finite or whose sum at a node is
                not, or a diagonal that is not zero.
        """
        if not isinstance(matrix, Tensor) or matrix.layout != torch.sparse_csr or not matrix.is_floating_point():
            kind = f"{matrix.layout} of {matrix.dtype}" if isinstance(matrix, Tensor) else type(matrix).__name__
            raise TypeError(f"matrix must be a floating-point torch.sparse_csr tensor, got {kind}")
        if matrix.dim() != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix must have shape [n, n], got {list(matrix.shape)}")
        n, rowptr = matrix.shape[0], matrix.crow_indices().long()
        rows = torch.repeat_interleave(torch.arange(n, device=rowptr.device), rowptr.diff())
        places = torch.stack([rows, matrix.col_indices().long()])
        # sorted, duplicates added up: neither can be taken for granted
        entries = torch.sparse_coo_tensor(
            places, at_least_single(matrix.values()), matrix.shape, device=rowptr.device, check_invariants=False
        ).coalesce()
        kept = entries.values() != 0
        (rows, columns), weight = entries.indices()[:, kept], entries.values()[kept]
        if not bool(weight.isfinite().all()):
            raise ValueError("matrix must hold weights that are finite, got NaN or infinity")
        order = (columns * n + rows).argsort()
        if not all(
            torch.equal(part[order], other) for part, other in ((rows, columns), (columns, rows), (weight, weight))
        ):
            raise ValueError("matrix must be symmetric, got different entries above and below the diagonal")
        if bool((weight < 0).any()) or bool((rows == columns).any()):
            raise ValueError("matrix must hold weights that are not negative and nothing on the diagonal")
        counts = torch.bincount(rows, minlength=n)
        return cls(torch.cat([counts.new_zeros(1), counts.cumsum(0)]), columns.int(), weight, n)._checked_degree()

    @classmethod
    def from_scipy(cls, matrix: Any) -> Graph:
        """Take the weights of a symmetric SciPy sparse matrix ``[n, n]``: see :meth:`from_torch_csr`.

        Raises:
            TypeError: no SciPy sparse matrix of real floating-point numbers; ``matrix.astype(float)`` makes one of
                integers.
            ValueError: as :meth:`from_torch_csr`.
        """
        if not hasattr(matrix, "tocsr"):
            raise TypeError(f"matrix must be a SciPy sparse matrix, got {type(matrix).__name__}")
        if matrix.dtype not in (np.float32, np.float64):
            raise TypeError(f"matrix must be float32 or float64, got {matrix.dtype}; take matrix.astype(float) if real")
        csr = matrix.tocsr()
        rowptr, columns, values = (torch.from_numpy(part.copy()) for part in (csr.indptr, csr.indices, csr.data))
        return cls.from_torch_csr(
            torch.sparse_csr_tensor(
                rowptr.long(), columns.long(), values, csr.shape, device="cpu", check_invariants=False
            )
        )

    def _checked_degree(self) -> Graph:
        if not bool(self.degree.detach().isfinite().all()):
            kind = str(self.weight.dtype).removeprefix("torch.")
            raise ValueError(f"weights must have sums at the nodes that {kind} can hold, got infinity; scale them down")
        return self

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _files.save_record(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Graph:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return _files.load_record(path, cls)


@outside_autocast
def build_graph(
    x: ArrayLike,
    *,
    n_neighbors: int | None = None,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    symmetrize: Symmetrization = "mean",
    batch: IndexLike | None = None,
) -> Graph:
    r"""Build the symmetric k-nearest-neighbour graph of ``x``.

    Directed weights with ``d_ij`` the distance and ``d_k(i)`` the distance from i to its last neighbour:

    - "gaussian": ``exp(-4 d_ij^2 / d_k(i)^2)``, the default;
    - "self_tuning": ``exp(-d_ij^2 / (s_i s_j))``, ``s_i`` the distance to the seventh neighbour (or the last, if
      fewer);
    - "binary": 1; "inverse_distance": ``1 / d_ij``; "distance": ``d_ij``, which gives FAR neighbours the larger weight
      and exists to reproduce published numbers only.

    Then "mean" ``(W + W^T) / 2``, "union" ``max(W, W^T)`` or "mutual" ``min(W, W^T)``. Duplicated points never give inf
    or NaN: where ``d_k(i) = 0`` the gaussian weight is 1, and an inverse distance is capped at the inverse of ``1e-6``
    times the row's largest distance. Differentiable in ``x`` through the distances, the edges held fixed.

    Args:
        x: Points ``[..., n, d]``; leading dimensions are a batch of graphs.
        n_neighbors: Neighbours per point, itself not counted; None takes 15% of the points, at most 300.
        metric: As in :func:`knn`; "inner_product" needs ``weights="binary"``, it has no distance.
        weights: Edge weights, above.
        symmetrize: "mean", "union" or "mutual".
        batch: For graphs of unequal size of one ``x [n, d]``: the graph of each row, ascending, as in PyG, or offsets,
            as in :func:`knn`. Every graph must have more points than neighbours; None for ``n_neighbors`` goes by the
            smallest.

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: as in :func:`knn`, "inner_product" with weights that need a distance, a graph with too few points,
            or weights of a size that the dtype cannot hold.

    Warns:
        LFMWarning: as in :func:`knn`.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> lfm.build_graph(torch.eye(4), n_neighbors=2, metric="euclidean", weights="binary")
        Graph(n_nodes=4, n_edges=..., 2 neighbors, euclidean, binary, mean, float32, cpu)

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3; kernel of the published code with explicit symmetrisation.
    """
    _checks.check_choice("weights", weights, WEIGHTS)
    _checks.check_choice("symmetrize", symmetrize, SYMMETRIZATIONS)
    x, largest = _checks.measured_points("x", x)
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"x must have at least 2 rows to have neighbors, got shape {list(x.shape)}")
    if metric == "inner_product" and weights != "binary":
        raise ValueError(f"weights must be 'binary' for metric='inner_product' (it is no distance), got {weights!r}")
    how: Any = {"metric": metric, "weights": weights, "symmetrize": symmetrize}
    if metric == "euclidean":
        x = at_least_single(x)
        power = power_into_range(x.dtype, largest)
        if power != 1:
            graph = build_graph(x / power, n_neighbors=n_neighbors, batch=batch, **how)
            return _with_unit(graph, power)
    if batch is None:
        n_neighbors = default_n_neighbors(n) if n_neighbors is None else n_neighbors
        return graph_from_neighbors(knn(x, n_neighbors=n_neighbors, metric=metric), **how)
    offsets = set_offsets("batch", batch, n)
    n_neighbors = _neighbors_in_sets(offsets, n_neighbors)
    neighbors = knn(x, n_neighbors=n_neighbors, metric=metric, batch=offsets)
    return replace(graph_from_neighbors(neighbors, **how), offsets=offsets)


def _neighbors_in_sets(offsets: Tensor, n_neighbors: int | None) -> int:
    """The number of neighbours, after checking that every set has more points than that."""
    if not _checks.has_values(offsets):
        if n_neighbors is None:
            raise ValueError("n_neighbors must be given with batch where torch.compile or torch.export trace, got None")
        return n_neighbors
    smallest = int(offsets.diff().min())
    n_neighbors = default_n_neighbors(smallest) if n_neighbors is None else n_neighbors
    if smallest <= n_neighbors:
        raise ValueError(
            f"batch must give every graph more than n_neighbors={n_neighbors} points, got {smallest} in graph "
            f"{int(offsets.diff().argmin())}"
        )
    return n_neighbors


def _with_unit(graph: Graph, unit: float) -> Graph:
    """The graph of points that were divided by ``unit``: the weights that have a unit get it back."""
    if graph.weights not in ("distance", "inverse_distance"):
        return graph
    weight = graph.weight * unit if graph.weights == "distance" else graph.weight / unit
    return replace(graph, weight=weight)._checked_degree()


@outside_autocast
def graph_from_neighbors(
    neighbors: Neighbors,
    *,
    metric: Metric,
    weights: Weights = "gaussian",
    symmetrize: Symmetrization = "mean",
) -> Graph:
    """Build the graph of neighbours already found by :func:`knn` in a set itself; see :func:`build_graph`.

    Args:
        neighbors: ``indices`` and ``distances``, ``[..., n, k]``, each point's own index not among them.
        metric: The metric of the distances.
        weights: Edge weights.
        symmetrize: "mean", "union" or "mutual".

    Raises:
        ValueError: unknown names, or "inner_product" with weights that need a distance.
    """
    _checks.check_choice("weights", weights, WEIGHTS)
    _checks.check_choice("symmetrize", symmetrize, SYMMETRIZATIONS)
    if metric == "inner_product" and weights != "binary":
        raise ValueError(f"weights must be 'binary' for metric='inner_product' (it is no distance), got {weights!r}")
    *batch, n, k = neighbors.indices.shape
    indices, distances = (part.reshape(-1, n, k) for part in neighbors)
    rowptr, col, weight = ops.symmetrize_edges(indices, directed_weights(distances, indices, weights), symmetrize)
    return Graph(rowptr, col, weight, n, tuple(batch), k, metric, weights, symmetrize)
