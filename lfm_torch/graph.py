"""Neighbours, edge weights and Laplacian: from points ``[..., n, d]`` to an operator on functions ``[..., n, m]``."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks, _files, ops
from lfm_torch.ops.graph import SYMMETRIZATIONS
from lfm_torch.ops.knn import METRICS, NeighborDistances, knn_reference

if TYPE_CHECKING:
    import scipy.sparse

Metric = Literal["euclidean", "cosine", "angular", "inner_product"]
Weights = Literal["gaussian", "self_tuning", "binary", "inverse_distance", "distance"]
Symmetrization = Literal["mean", "union", "mutual"]
Normalization = Literal["symmetric", "random_walk", "unnormalized"]
WEIGHTS = ("gaussian", "self_tuning", "binary", "inverse_distance", "distance")
NORMALIZATIONS = ("symmetric", "random_walk", "unnormalized")

# self_tuning: the scale of a point is the distance to this neighbour (Zelnik-Manor & Perona 2004 use the seventh)
_SELF_TUNING_NEIGHBOR = 7


class Neighbors(NamedTuple):
    """Result of :func:`knn`: ``indices`` int64 and ``distances``, both ``[..., n, n_neighbors]``."""

    indices: Tensor
    distances: Tensor


def default_n_neighbors(n: int) -> int:
    """Neighbours used when none are asked for: 15% of the points, at least 1 and at most 300 (the paper's value)."""
    return max(1, min(300, math.ceil(0.15 * n), n - 1))


def knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    n_neighbors: int,
    metric: Metric = "euclidean",
    backend: Literal["auto", "native", "reference"] = "auto",
) -> Neighbors:
    """Find the exact k nearest neighbours of every row of ``x`` among the rows of ``y`` (or of ``x`` itself).

    Distances: euclidean ``|a - b|``; angular ``|a/|a| - b/|b||``, the chord; cosine ``1 - cos(a, b)``; inner_product
    returns ``<a, b>``, largest first. Each is evaluated in float64 and rounded to the input's dtype; rows are sorted by
    the rounded value, ties by the smaller index, so the result does not depend on device, threads or run.
    Differentiable in ``x`` and ``y`` through the distances, the choice of neighbours held fixed.

    Args:
        x: Queries ``[..., n, d]``, any floating dtype (half types are searched and returned in float32).
        y: Database ``[..., m, d]`` with the batch dimensions of ``x``; None searches ``x`` in itself, and a point is
            then never its own neighbour (by identity: duplicates of it are).
        n_neighbors: Number of neighbours, at most ``m`` (``n - 1`` without ``y``).
        metric: "euclidean", "cosine", "angular" or "inner_product".
        backend: "native" compiled kernels, "reference" the pure PyTorch twin, "auto" the kernels where they are loaded.

    Returns:
        Neighbors with ``indices`` int64 and ``distances``, ``[..., n, n_neighbors]``.

    Raises:
        TypeError: not a floating-point tensor, or different dtypes.
        ValueError: wrong shapes, values that are not finite, too many neighbours, a zero row under "cosine" or
            "angular".

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> lfm.knn(x, n_neighbors=1).indices.flatten().tolist()
        [1, 0, 1]
    """
    _checks.check_choice("metric", metric, METRICS)
    _checks.check_choice("backend", backend, ("auto", "native", "reference"))
    x = _checks.check_points("x", x)
    if y is not None:
        y = _checks.check_points("y", y)
        _checks.check_same_device_dtype("x", x, "y", y)
        if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"y must have shape [..., m, d] with the batch and feature dimensions of x, {list(x.shape)}, "
                f"got {list(y.shape)}"
            )
    if y is None:
        _checks.check_range(
            "n_neighbors", n_neighbors, 1, x.shape[-2] - 1, f"x has {x.shape[-2]} rows, itself not counted"
        )
    else:
        _checks.check_range("n_neighbors", n_neighbors, 1, y.shape[-2], f"y has {y.shape[-2]} rows")
    if metric in ("cosine", "angular"):
        _check_nonzero_rows("x", x)
        if y is not None:
            _check_nonzero_rows("y", y)

    batch = x.shape[:-2]
    queries = _as_batch(x)
    database = None if y is None else _as_batch(y)
    with torch.no_grad():
        indices, distances = _search(queries, database, n_neighbors, metric, backend)
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        distances = _differentiable(queries, queries if database is None else database, indices, distances, metric)
    shape = (*batch, x.shape[-2], n_neighbors)
    return Neighbors(indices.view(shape), distances.view(shape))


def _as_batch(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-2], x.shape[-1])
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _search(x: Tensor, y: Tensor | None, k: int, metric: str, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return knn_reference(x, y, k, metric)
    if backend == "native" and not ops.has_native_kernel("knn", x.device):
        raise ValueError(f"backend='native' needs compiled kernels for {x.device}; see lfm_torch.build_info().notes")
    return ops.nearest_neighbors(x, y, k, metric)


def _differentiable(x: Tensor, y: Tensor, indices: Tensor, distances: Tensor, metric: str) -> Tensor:
    found = distances
    if metric in ("cosine", "angular"):
        x, y = (points / points.norm(dim=-1, keepdim=True) for points in (x, y))
    if metric == "cosine":
        found = (2 * distances).clamp_min(0).sqrt()
    kind = "inner_product" if metric == "inner_product" else "euclidean"
    flow: Tensor = NeighborDistances.apply(x, y, indices, found, kind)  # type: ignore[no-untyped-call]
    return flow.square() / 2 if metric == "cosine" else flow


def _check_nonzero_rows(name: str, x: Tensor) -> None:
    zero = (x.detach() == 0).all(-1)
    if bool(zero.any()):
        where = zero.nonzero()[0].tolist()
        row = where[0] if len(where) == 1 else where
        raise ValueError(
            f"{name} must have no zero row under the metrics 'cosine' and 'angular', got a zero in row {row} "
            f"({int(zero.sum())} in all); drop these rows or use metric='euclidean'"
        )


@dataclass(frozen=True, repr=False, eq=False)
class Graph:
    """Symmetric weighted neighbour graph of one point set or of a batch of equal size.

    The batch is one block-diagonal CSR matrix: row ``b * n_nodes + i`` is node ``i`` of graph ``b``.

    Attributes:
        rowptr: ``[b n + 1]`` int64, start of each row.
        col: ``[nnz]`` int32, columns in ascending order within a row.
        weight: ``[nnz]`` edge weights, symmetric.
        n_nodes: points per graph.
        batch_shape: leading dimensions of the points.
        n_neighbors, metric, weights, symmetrize: how it was built.
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

    def __repr__(self) -> str:
        batch = f"batch={list(self.batch_shape)}, " if self.batch_shape else ""
        how = f"{self.n_neighbors} neighbors, {self.metric}, {self.weights}, {self.symmetrize}"
        return (
            f"Graph({batch}n_nodes={self.n_nodes}, n_edges={self.col.numel()}, {how}, "
            f"{str(self.weight.dtype).removeprefix('torch.')}, {self.weight.device})"
        )

    @functools.cached_property
    def degree(self) -> Tensor:
        """Sum of the weights at each node, ``[..., n]``."""
        none = self.weight.new_zeros(self.rowptr.numel() - 1)
        ones = torch.ones_like(none)
        sums = ops.laplacian_product(self.rowptr, self.col, self.weight, none, -ones, ones, ones.unsqueeze(1))
        return sums.view(*self.batch_shape, self.n_nodes)

    @functools.cached_property
    def component_labels(self) -> Tensor:
        """Connected component of each node, ``[..., n]`` int64, numbered over the whole batch by the smallest node.

        An edge whose weight underflowed to 0 connects nothing.
        """
        rowptr, col = self.rowptr, self.col
        connects = self.weight.detach() > 0
        if not bool(connects.all()):
            before = torch.cat([rowptr.new_zeros(1), connects.cumsum(0)])
            rowptr, col = before[rowptr], col[connects]
        return ops.connected_components(rowptr, col).view(*self.batch_shape, self.n_nodes)

    @functools.cached_property
    def n_components(self) -> Tensor:
        """Number of connected components of each graph, ``[...]`` int64."""
        labels = self.component_labels
        return labels.amax(-1) - labels.amin(-1) + 1

    def laplacian(self, normalization: Normalization = "symmetric") -> Laplacian:
        """Return the Laplacian as an operator: see :class:`Laplacian`."""
        return Laplacian(self, normalization)

    def to(self, target: torch.device | torch.dtype | str) -> Graph:
        """Move to a device (a str names one), or cast the weights to a dtype."""
        weight = self.weight.to(target)
        device = weight.device
        return replace(self, rowptr=self.rowptr.to(device), col=self.col.to(device), weight=weight)

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """Return the weights as a SciPy CSR matrix (block diagonal for a batch)."""
        from scipy.sparse import csr_matrix

        total = self.rowptr.numel() - 1
        parts = (self.weight.detach().cpu().numpy(), self.col.cpu().numpy(), self.rowptr.cpu().numpy())
        return csr_matrix(parts, shape=(total, total))

    def to_torch_csr(self) -> Tensor:
        """Return the weights as a torch sparse CSR tensor (block diagonal for a batch)."""
        total = self.rowptr.numel() - 1
        return torch.sparse_csr_tensor(
            self.rowptr, self.col.long(), self.weight, (total, total), check_invariants=False
        )

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


def build_graph(
    x: Tensor,
    *,
    n_neighbors: int | None = None,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    symmetrize: Symmetrization = "mean",
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

    Raises:
        TypeError: ``x`` is not a floating-point tensor.
        ValueError: as in :func:`knn`, or "inner_product" with weights that need a distance.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> lfm.build_graph(torch.eye(4), n_neighbors=2, metric="euclidean", weights="binary")
        Graph(n_nodes=4, n_edges=..., 2 neighbors, euclidean, binary, mean, float32, cpu)

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3; kernel of the published code with explicit symmetrisation.
    """
    _checks.check_choice("weights", weights, WEIGHTS)
    _checks.check_choice("symmetrize", symmetrize, SYMMETRIZATIONS)
    x = _checks.check_points("x", x)
    n = x.shape[-2]
    if n < 2:
        raise ValueError(f"x must have at least 2 rows to have neighbors, got shape {list(x.shape)}")
    if metric == "inner_product" and weights != "binary":
        raise ValueError(f"weights must be 'binary' for metric='inner_product' (it is no distance), got {weights!r}")
    n_neighbors = default_n_neighbors(n) if n_neighbors is None else n_neighbors
    neighbors = knn(x, n_neighbors=n_neighbors, metric=metric)
    shape = (-1, n, n_neighbors)
    indices = neighbors.indices.view(shape)
    directed = _directed_weights(neighbors.distances.view(shape), indices, weights)
    rowptr, col, weight = ops.symmetrize_edges(indices, directed, symmetrize)
    return Graph(rowptr, col, weight, n, tuple(x.shape[:-2]), n_neighbors, metric, weights, symmetrize)


def _directed_weights(distances: Tensor, indices: Tensor, weights: str) -> Tensor:
    last = distances[..., -1:]
    if weights == "gaussian":
        # where all neighbours coincide with the point every d is 0: the limit of the kernel for equal points is 1
        scale = torch.where(last > 0, last, 1.0)
        return (distances / scale).square().mul(-4).exp()
    if weights == "self_tuning":
        scale = distances[..., min(_SELF_TUNING_NEIGHBOR, distances.shape[-1]) - 1]
        other = scale.gather(1, indices.flatten(1)).view_as(distances)
        product = scale.unsqueeze(-1) * other
        positive = product > 0
        return torch.where(
            positive, (-distances.square() / torch.where(positive, product, 1.0)).exp(), (distances == 0).to(distances)
        )
    if weights == "binary":
        return torch.ones_like(distances)
    if weights == "inverse_distance":
        floor = torch.where(last > 0, 1e-6 * last, 1.0)
        return 1 / torch.maximum(distances, floor)
    return distances


@dataclass(frozen=True, repr=False, eq=False)
class Laplacian:
    """Graph Laplacian as a matrix-free operator on functions ``[..., n, m]``.

    - "symmetric": ``L = I - D^{-1/2} W D^{-1/2}``, spectrum in [0, 2];
    - "random_walk": ``L = I - D^{-1} W``, the same spectrum, not symmetric;
    - "unnormalized": ``L = D - W``.

    A node without edges has a zero row, so the multiplicity of eigenvalue 0 is the number of components. Differentiable
    in the functions and in the edge weights (through the degrees as well).

    Example:
        >>> import torch, lfm_torch as lfm
        >>> graph = lfm.build_graph(torch.randn(30, 3), n_neighbors=5)
        >>> (graph.laplacian("unnormalized") @ torch.ones(30, 1)).abs().max() < 1e-5
        tensor(True)
    """

    graph: Graph
    normalization: Normalization = "symmetric"

    def __post_init__(self) -> None:
        _checks.check_choice("normalization", self.normalization, NORMALIZATIONS)

    def __repr__(self) -> str:
        return f"Laplacian({self.normalization}, {self.graph!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., n, n)``."""
        return (*self.graph.batch_shape, self.graph.n_nodes, self.graph.n_nodes)

    @property
    def upper_bound(self) -> float:
        """A bound on the largest eigenvalue: 2, or twice the largest degree."""
        return 2.0 if self.normalization != "unnormalized" else 2.0 * float(self.graph.degree.max())

    @functools.cached_property
    def scalings(self) -> tuple[Tensor, Tensor, Tensor]:
        """``diagonal, left, right`` over all nodes of the batch: ``L = diag(diagonal) - diag(left) W diag(right)``."""
        degree = self.graph.degree.flatten()
        connected = degree > 0
        ones = torch.ones_like(degree)
        if self.normalization == "unnormalized":
            return degree, ones, ones
        safe = torch.where(connected, degree, 1.0)
        diagonal = connected.to(degree.dtype)
        if self.normalization == "random_walk":
            return diagonal, diagonal / safe, ones
        inverse_root = diagonal * safe.rsqrt()
        return diagonal, inverse_root, inverse_root

    def __matmul__(self, x: Tensor) -> Tensor:
        return self.apply(x)

    def apply(self, x: Tensor, z: Tensor | None = None, *, a: float = 1.0, b: float = 0.0, c: float = 0.0) -> Tensor:
        """Return ``a L x + b x + c z`` in one pass over the edges.

        Args:
            x: Functions ``[..., n, m]``.
            z: None or functions of the same shape.
            a: Coefficient of ``L x``.
            b: Coefficient of ``x``.
            c: Coefficient of ``z``.

        Raises:
            TypeError: ``x`` has another dtype than the weights.
            ValueError: wrong shape.
        """
        expected = (*self.graph.batch_shape, self.graph.n_nodes)
        if tuple(x.shape[:-1]) != expected:
            raise ValueError(f"x must have shape {[*expected, 'm']}, got {list(x.shape)}")
        if x.dtype != self.graph.weight.dtype:
            raise TypeError(f"x must have the dtype of the weights, {self.graph.weight.dtype}, got {x.dtype}")
        if z is not None and z.shape != x.shape:
            raise ValueError(f"z must have the shape of x, {list(x.shape)}, got {list(z.shape)}")
        graph = self.graph
        flat = x.reshape(-1, x.shape[-1])
        other = None if z is None else z.reshape(-1, x.shape[-1])
        y = ops.laplacian_product(graph.rowptr, graph.col, graph.weight, *self.scalings, flat, other, a=a, b=b, c=c)
        return y.view(x.shape)

    def null_space(self, max_vectors: int) -> Tensor:
        """Orthonormal eigenvectors of eigenvalue 0, one per component: ``[..., n, c]``, c at most ``max_vectors``.

        ``D^{1/2} 1`` on a component, normalised (unnormalized: the constant). In a batch c is that of the graph with
        the most components; the others have zero columns at the end.

        Raises:
            ValueError: for the random-walk Laplacian, which is not symmetric.
        """
        if self.normalization == "random_walk":
            raise ValueError(
                "normalization must be 'symmetric' or 'unnormalized' for orthonormal eigenvectors, got 'random_walk'"
            )
        labels = self.graph.component_labels
        local = labels - labels.amin(-1, keepdim=True)
        columns = min(max_vectors, int(self.graph.n_components.max()))
        degree = self.graph.degree.detach()
        size = degree.sqrt() if self.normalization == "symmetric" else torch.ones_like(degree)
        size = torch.where(degree > 0, size, 1.0)
        chosen = local < columns
        vectors = size.new_zeros(*size.shape, columns)
        vectors.scatter_(-1, (local * chosen).unsqueeze(-1), (size * chosen).unsqueeze(-1))
        norms = vectors.norm(dim=-2, keepdim=True)
        return vectors / torch.where(norms > 0, norms, 1.0)

    def to_dense(self) -> Tensor:
        """Return ``[..., n, n]``; meant for small n."""
        n = self.graph.n_nodes
        identity = torch.eye(n, dtype=self.graph.weight.dtype, device=self.graph.weight.device)
        return self.apply(identity.expand(*self.graph.batch_shape, n, n).contiguous())

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """Return a SciPy CSR matrix (block diagonal for a batch)."""
        from scipy.sparse import diags

        diagonal, left, right = (s.detach().cpu().numpy() for s in self.scalings)
        return (diags(diagonal) - diags(left) @ self.graph.to_scipy() @ diags(right)).tocsr()

    def to_torch_csr(self) -> Tensor:
        """Return a torch sparse CSR tensor without gradient (block diagonal for a batch), built on the CPU by SciPy."""
        matrix = self.to_scipy()
        parts = (
            torch.from_numpy(matrix.indptr).long(),
            torch.from_numpy(matrix.indices).long(),
            torch.from_numpy(matrix.data),
        )
        return torch.sparse_csr_tensor(*parts, matrix.shape, check_invariants=False).to(self.graph.weight.device)
