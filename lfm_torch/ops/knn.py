"""Operator ``knn``: exact k nearest neighbours of batched point sets.

For a metric with distance ``d`` the result is sorted by ``d`` as it is returned (computed in float64, rounded to the
input's dtype), equal values by the smaller index, so that it is one and the same on every device and with any number of
threads. ``inner_product`` returns the products themselves, largest first.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch._precision import outside_autocast
from lfm_torch.ops._registry import Operator, register
from lfm_torch.ops.graphs import symmetrize_edges
from lfm_torch.ops.laplacian import laplacian_product

METRICS = ("euclidean", "cosine", "angular", "inner_product")
SCHEMA = "(Tensor x, Tensor? y, int n_neighbors, str metric, int memory_budget=0) -> (Tensor indices, Tensor distances)"
RAGGED_SCHEMA = (
    "(Tensor x, Tensor? y, Tensor offsets, Tensor? y_offsets, int n_neighbors, str metric, int memory_budget=0)"
    " -> (Tensor indices, Tensor distances)"
)

# elements of one tile of the distance matrix in the twin: 64 MiB of float64
_TILE = 1 << 23


def knn_reference(
    x: Tensor, y: Tensor | None, n_neighbors: int, metric: str, memory_budget: int = 0
) -> tuple[Tensor, Tensor]:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.knn``: float64 tiles, no n x n array.

    Args:
        x: ``[b, n, d]`` float32 or float64 queries.
        y: ``[b, m, d]`` database, or None for ``x`` itself; a point is then never its own neighbour.
        n_neighbors: how many, at most ``m`` (``n - 1`` without ``y``).
        metric: one of ``METRICS``.
        memory_budget: bytes beyond inputs and outputs that the kernels should keep to, 0 for no limit; ignored here.

    Returns:
        ``indices [b, n, n_neighbors]`` int64 and ``distances`` of the same shape in the dtype of ``x``.
    """
    points = _prepared(x, metric)
    database = points if y is None else _prepared(y, metric)
    b, n, m = points.shape[0], points.shape[1], database.shape[1]
    indices = torch.empty(b, n, n_neighbors, dtype=torch.int64, device=x.device)
    distances = torch.empty(b, n, n_neighbors, dtype=x.dtype, device=x.device)
    rows = max(1, _TILE // m)
    for batch in range(b):
        for start in range(0, n, rows):
            stop = min(start + rows, n)
            tile = _distances(points[batch, start:stop], database[batch], metric).to(x.dtype)
            order = -tile if metric == "inner_product" else tile
            if y is None:
                own = torch.arange(start, stop, device=x.device)
                order[own - start, own] = torch.inf
            chosen = _smallest(order, n_neighbors)
            indices[batch, start:stop] = chosen
            distances[batch, start:stop] = tile.gather(1, chosen)
    return indices, distances


def knn_ragged_reference(
    x: Tensor,
    y: Tensor | None,
    offsets: Tensor,
    y_offsets: Tensor | None,
    n_neighbors: int,
    metric: str,
    memory_budget: int = 0,
) -> tuple[Tensor, Tensor]:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.knn_ragged``: many sets of unequal size, one after the other.

    Args:
        x: ``[n, d]`` float32 or float64 queries of all sets.
        y: ``[m, d]`` database of all sets, or None for ``x`` itself.
        offsets: ``[s + 1]`` int64 on the CPU, where each set begins in ``x``, from 0 to ``n``.
        y_offsets: the same for ``y``.
        n_neighbors: how many; a set that has fewer leaves the rest of its rows empty.
        metric: one of ``METRICS``.
        memory_budget: as in ``knn``.

    Returns:
        ``indices [n, n_neighbors]`` int64 into all of ``y`` (or ``x``), -1 where empty, and ``distances``, there
        infinite (minus infinity for "inner_product").
    """
    empty = -torch.inf if metric == "inner_product" else torch.inf
    indices = torch.full((x.shape[0], n_neighbors), -1, dtype=torch.int64, device=x.device)
    distances = torch.full((x.shape[0], n_neighbors), empty, dtype=x.dtype, device=x.device)
    starts = offsets.tolist()
    y_starts = starts if y_offsets is None else y_offsets.tolist()
    for s in range(len(starts) - 1):
        rows, columns = slice(starts[s], starts[s + 1]), slice(y_starts[s], y_starts[s + 1])
        most = columns.stop - columns.start - (y is None)
        k = min(n_neighbors, most)
        if k > 0 and rows.stop > rows.start:
            database = None if y is None else y[columns].unsqueeze(0)
            found, values = knn_reference(x[rows].unsqueeze(0), database, k, metric)
            indices[rows, :k], distances[rows, :k] = found[0] + columns.start, values[0]
    return indices, distances


def unit_rows(x: Tensor) -> Tensor:
    """Return ``x / |x|`` row by row, at any scale; a row of zeros stays as it is, without gradient."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    # by a power of two first, which is exact: squares then neither overflow nor vanish
    power = largest / (2 * torch.frexp(largest).mantissa)
    x = x / torch.where(largest > 0, power, 1.0)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(largest > 0, norm, torch.inf)


def _prepared(x: Tensor, metric: str) -> Tensor:
    x = x.double()
    return unit_rows(x) if metric in ("cosine", "angular") else x


def _distances(x: Tensor, y: Tensor, metric: str) -> Tensor:
    if metric == "inner_product":
        return x @ y.T
    # differences, not the expansion |x|^2 + |y|^2 - 2 x.y: exact for close points far from the origin
    distance = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    return distance.square() / 2 if metric == "cosine" else distance


def _smallest(values: Tensor, k: int) -> Tensor:
    """Columns of the k smallest values of each row, ties to the smaller column."""
    if values.dtype == torch.float64:
        return values.argsort(dim=1, stable=True)[:, :k]
    # float32 bits, made monotone, over the column: one integer key that topk orders without ties
    bits = (values + 0.0).view(torch.int32).long()
    monotone = torch.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    columns = torch.arange(values.shape[1], device=values.device)
    return torch.topk((monotone << 32) | columns, k, dim=1, largest=False, sorted=True).indices


def _fake(x: Tensor, y: Tensor | None, n_neighbors: int, metric: str, memory_budget: int = 0) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], x.shape[1], n_neighbors)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


def _fake_ragged(
    x: Tensor,
    y: Tensor | None,
    offsets: Tensor,
    y_offsets: Tensor | None,
    n_neighbors: int,
    metric: str,
    memory_budget: int = 0,
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], n_neighbors)
    return x.new_empty(shape, dtype=torch.int64), x.new_empty(shape)


def _sample_inputs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for metric in METRICS:
        for b, n, m, d, k in ((1, 40, None, 3, 5), (2, 130, 70, 17, 70), (1, 300, None, 64, 299)):
            x = torch.randn(b, n, d, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
            y = (
                None
                if m is None
                else torch.randn(b, m, d, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
            )
            yield x, y, k, metric


def _sample_ragged(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    offsets, y_offsets = (
        torch.tensor(sizes, dtype=torch.int64, device="cpu").cumsum(0)
        for sizes in ([0, 40, 0, 0, 1, 41, 130, 333], [0, 3, 0, 60, 70, 70, 90, 200])
    )
    for metric in METRICS:
        x = torch.randn(int(offsets[-1]), 5, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        y = torch.randn(int(y_offsets[-1]), 5, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        yield x, None, offsets, None, 50, metric
        yield x, y, offsets, y_offsets, 50, metric


KNN = register(Operator("knn", SCHEMA, knn_reference, _fake, _sample_inputs))
RAGGED = register(Operator("knn_ragged", RAGGED_SCHEMA, knn_ragged_reference, _fake_ragged, _sample_ragged))


def nearest_neighbors(
    x: Tensor, y: Tensor | None, n_neighbors: int, metric: str, memory_budget: int = 0
) -> tuple[Tensor, Tensor]:
    """Call the operator on ``x [b, n, d]``: the twin's signature, compiled kernels where they are loaded."""
    y = None if y is None else y.contiguous()
    indices, distances = KNN.compiled(x.contiguous(), y, n_neighbors, metric, memory_budget)
    return indices, distances


def ragged_nearest_neighbors(
    x: Tensor,
    y: Tensor | None,
    offsets: Tensor,
    y_offsets: Tensor | None,
    n_neighbors: int,
    metric: str,
    memory_budget: int = 0,
) -> tuple[Tensor, Tensor]:
    """Call the operator on sets of unequal size: the twin's signature, compiled kernels where they are loaded."""
    y = None if y is None else y.contiguous()
    args = (x.contiguous(), y, offsets, y_offsets, n_neighbors, metric, memory_budget)
    indices, distances = RAGGED.compiled(*args)
    return indices, distances


class NeighborDistances(torch.autograd.Function):
    """Distances already found by ``knn``, with their gradient in the points; the choice of neighbours is constant.

    ``kind`` is "euclidean" (gradient ``(x - y) / d``, zero where ``d = 0``), "cosine" for unit rows (``|x - y|^2 / 2``,
    gradient ``x - y``) or "inner_product"; ``y`` is None for the neighbours of ``x`` in itself. Then the gradient of
    the first two is a Laplacian product, ``(D - S) x`` with ``S = C + C^T`` and ``C_ij`` the incoming gradient, divided
    by the distance for "euclidean". Elsewhere the backward pass walks over row tiles. No ``[n, k, d]`` array exists.
    """

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: Tensor, y: Tensor | None, indices: Tensor, distances: Tensor, kind: str
    ) -> Tensor:
        ctx.save_for_backward(x, y, indices, distances)
        ctx.kind = kind
        return distances.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None, None]:  # noqa: D102
        x, y, indices, distances = ctx.saved_tensors
        if ctx.kind == "euclidean":
            grad = torch.where(distances > 0, grad, 0.0)
            distances = torch.where(distances > 0, distances, 1.0)
        else:
            distances = torch.ones_like(distances)
        if ctx.kind != "inner_product" and y is None:
            return _spring_forces(x, indices, grad.double() / distances), None, None, None, None
        grad_x, grad_y = _pulled_back(x, x if y is None else y, indices, grad, distances, ctx.kind)
        return (grad_x + grad_y, None, None, None, None) if y is None else (grad_x, grad_y, None, None, None)


def _spring_forces(x: Tensor, indices: Tensor, c: Tensor) -> Tensor:
    """``sum_j (c_ij + c_ji) (x_i - x_j)`` over the directed edges: one product with a graph Laplacian.

    In float64, which has room for any c, and keeps what is left between points that nearly coincide.
    """
    points = x.double()
    # centred, so that little cancels between the degree term and the sum over neighbours
    points = (points - points.mean(1, keepdim=True)).flatten(0, 1)
    rowptr, col, weight = symmetrize_edges(indices, c, "mean")
    ones = points.new_ones(len(points))
    sums = laplacian_product(rowptr, col, weight, torch.zeros_like(ones), -ones, ones, ones.unsqueeze(1))
    forces = laplacian_product(rowptr, col, weight, sums.flatten(), ones, ones, points, a=2.0)
    return forces.view_as(x).to(x.dtype)


def _pulled_back(
    x: Tensor, y: Tensor, indices: Tensor, grad: Tensor, distances: Tensor, kind: str
) -> tuple[Tensor, Tensor]:
    grad_x, grad_y = torch.zeros_like(x), torch.zeros_like(y)
    rows = max(1, _TILE // (indices.shape[2] * x.shape[2]))
    for b in range(x.shape[0]):
        for start in range(0, x.shape[1], rows):
            part = slice(start, min(start + rows, x.shape[1]))
            index, c = indices[b, part], grad[b, part]
            neighbors = y[b][index]
            if kind == "inner_product":
                grad_x[b, part] = torch.einsum("nk,nkd->nd", c, neighbors)
                flow = c.unsqueeze(-1) * x[b, part].unsqueeze(1)
            else:
                # the quotient first: it has the size of the gradient whatever the scale
                away = (neighbors - x[b, part].unsqueeze(1)) / distances[b, part].unsqueeze(-1)
                flow = c.unsqueeze(-1) * away
                grad_x[b, part] = -flow.sum(1)
            grad_y[b].index_add_(0, index.flatten(), flow.flatten(0, 1))
    return grad_x, grad_y
