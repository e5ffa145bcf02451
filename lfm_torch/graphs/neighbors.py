"""Exact nearest neighbours of points ``[..., n, d]``: what is asked is checked, and rows of zeros get their answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.graphs.points import ANGULAR, Metric, note_zero_rows, power_into_range, zero_rows
from lfm_torch.graphs.search import BACKENDS, EXTERNAL, Backend, Neighbors, Search
from lfm_torch.graphs.sets import Offsets, set_offsets
from lfm_torch.ops.knn import METRICS


def default_n_neighbors(n: int) -> int:
    """Neighbours used when none are asked for: 15% of the points, at least 1 and at most 300 (the paper's value)."""
    return max(1, min(300, math.ceil(0.15 * n), n - 1))


@outside_autocast
def knn(
    x: ArrayLike,
    y: ArrayLike | None = None,
    *,
    n_neighbors: int,
    metric: Metric = "euclidean",
    backend: Backend = "auto",
    batch: IndexLike | None = None,
    batch_y: IndexLike | None = None,
    memory_budget: float | None = None,
) -> Neighbors:
    """Find the exact k nearest neighbours of every row of ``x`` among the rows of ``y`` (or of ``x`` itself).

    Distances: euclidean ``|a - b|``; angular ``|a/|a| - b/|b||``, the chord; cosine ``1 - cos(a, b)``; inner_product
    returns ``<a, b>``, largest first. Each is evaluated in float64 and rounded to the input's dtype; rows are sorted by
    the rounded value, ties by the smaller index, so the result does not depend on device, threads or run.
    Differentiable in ``x`` and ``y`` through the distances, the choice of neighbours held fixed.

    A row of zeros, as a dead ReLU leaves it, has no angle: under "cosine" and "angular" it counts as orthogonal to all
    others and gets no gradient. 1% (5%) of such rows at random then move ``heat`` between layers of CIFAR-10 networks,
    and between other ReLU features, by .006 (.03); as rows equal to one another they would by .034 (.068), isolated by
    .24 (.51).

    Memory beyond inputs and results, on the CPU: the points in 16 bits, about ``2 d + 50`` bytes each (``5 d + 64``
    with the 8 bits of a first look, which is taken from 4,096 points and 192 features on, for less than a neighbour in
    64, where the budget allows and the processor has VNNI instructions), and, where a set is searched in itself and the
    budget allows, ``8 (1.5 k + 10 sqrt(k) + 64)`` bytes for each of its points. Without
    those lists (or with ``y``) it is some megabytes a thread, at up to twice the time.

    Args:
        x: Queries ``[..., n, d]``, any floating dtype (half types are searched and returned in float32).
        y: Database ``[..., m, d]`` with the batch dimensions of ``x``; None searches ``x`` in itself, and a point is
            then never its own neighbour (by identity: duplicates of it are).
        n_neighbors: Number of neighbours, at most ``m`` (``n - 1`` without ``y``).
        metric: "euclidean", "cosine", "angular" or "inner_product".
        backend: "native" compiled kernels, "reference" the pure PyTorch twin, "auto" the kernels where they are loaded;
            "faiss" (exact), "faiss_ivf" and "faiss_hnsw" (approximate, with the recall in the result) or
            "torch_cluster" through these packages, in their float32 arithmetic.
        batch: For sets of unequal size in one ``x [n, d]``: the set of each row, ascending, as in PyG, or the ``s + 1``
            offsets where the sets begin and end. A row is then searched in its own set only; a set with too few points
            leaves the rest of its rows empty, with index -1 and an infinite distance.
        batch_y: The same for ``y``.
        memory_budget: What the search may use beyond inputs and results: bytes, or a share of the free memory between
            0 and 1; None is half of the free memory. It changes the time, never the result.

    Returns:
        Neighbors with ``indices`` int64 and ``distances``, ``[..., n, n_neighbors]``.

    While torch.compile or torch.export trace, and with fake tensors, no value is looked at: what is not finite is not
    refused, float64 points beyond 1e150 are not scaled, nothing is said of rows of zeros, and without a budget there
    is no limit.

    Raises:
        TypeError: not a floating-point tensor, or different dtypes.
        ValueError: wrong shapes, values that are not finite, too many neighbours, nothing but zeros under "cosine" or
            "angular", a budget that is too small, a backend that cannot do what is asked.
        ImportError: a backend whose package is not installed.

    Warns:
        LFMWarning: rows of zeros under "cosine" or "angular", with their number.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> lfm.knn(x, n_neighbors=1).indices.flatten().tolist()
        [1, 0, 1]
    """
    _checks.check_choice("metric", metric, METRICS)
    _checks.check_choice("backend", backend, BACKENDS)
    x, largest = _checks.measured_points("x", x)
    largest_y = largest
    if y is not None:
        y, largest_y = _checks.measured_points("y", y)
        _checks.check_same_device_dtype("x", x, "y", y)
        if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"y must have shape [..., m, d] with the batch and feature dimensions of x, {list(x.shape)}, "
                f"got {list(y.shape)}"
            )
    sets = None if batch is None and batch_y is None else _check_ragged(x, y, batch, batch_y, backend)
    if sets is not None:
        _checks.check_range("n_neighbors", n_neighbors, 1, 2**31 - 1, "indices are 32 bits inside")
    elif y is None:
        n = x.shape[-2]
        _checks.check_range("n_neighbors", n_neighbors, 1, n - 1, f"x has {n} rows, itself not counted")
    else:
        _checks.check_range("n_neighbors", n_neighbors, 1, y.shape[-2], f"y has {y.shape[-2]} rows")
    x, y = at_least_single(x), None if y is None else at_least_single(y)
    search = Search(n_neighbors, metric, backend, memory_budget, sets)
    if metric in ANGULAR:
        x, y, zero = _with_places_for_zeros(x, y, sets)
        found = search(x, y)
        return found if zero is None else _orthogonal_to_all(found, zero, metric, y is None, sets)
    power, power_y = _powers(x.dtype, metric, largest, largest_y)
    if power == power_y == 1:
        return search(x, y)
    found = search(x / power, None if y is None else y / power_y)
    distances = found.distances * power
    return found._with(found.indices, distances * power_y if metric == "inner_product" else distances)


def _check_ragged(
    x: Tensor, y: Tensor | None, batch: IndexLike | None, batch_y: IndexLike | None, backend: str
) -> Offsets:
    """Offsets of the sets in ``x`` and in ``y``."""
    if batch is None or (y is None) != (batch_y is None):
        raise ValueError("batch must be given with x, and batch_y with y and only then")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [n, d] where batch is given, got {list(x.shape)}")
    if backend in EXTERNAL:
        raise ValueError(f"backend must be 'auto', 'native' or 'reference' where batch is given, got {backend!r}")
    offsets = set_offsets("batch", batch, x.shape[0])
    if y is None or batch_y is None:
        return offsets, None
    y_offsets = set_offsets("batch_y", batch_y, y.shape[0])
    # sets at the end without a row on one side are no error
    sets = max(offsets.numel(), y_offsets.numel())
    offsets, y_offsets = (torch.cat([o, o[-1:].expand(sets - o.numel())]).contiguous() for o in (offsets, y_offsets))
    return offsets, y_offsets


def _powers(dtype: torch.dtype, metric: str, largest: float, largest_y: float) -> tuple[float, float]:
    """What to divide x and y by: distances need one power for both, products have one of each."""
    if metric == "inner_product":
        return power_into_range(dtype, largest), power_into_range(dtype, largest_y)
    power = power_into_range(dtype, max(largest, largest_y))
    # the squares of small float32 numbers are float64 numbers: ties are then those of the rounded distances
    return (1.0, 1.0) if power < 1 and dtype == torch.float32 else (power, power)


def _with_places_for_zeros(
    x: Tensor, y: Tensor | None, sets: Offsets | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Give rows of zeros a dimension of their own in ``x`` and ``y``; return them and which rows of ``x`` are zero.

    Raises:
        ValueError: all rows of a set are zero, so that there are no neighbours to speak of.

    Warns:
        LFMWarning: rows of zeros, with their number.
    """
    x, zero = zero_rows("x", x, None if sets is None else sets[0], alone=y is None)
    note_zero_rows("x", zero)
    if y is None:
        return x if zero is None else _with_dimension(x, zero), None, zero
    y, zero_y = zero_rows("y", y, None if sets is None else sets[1])
    note_zero_rows("y", zero_y)
    if zero is None and zero_y is None:
        return x, y, None
    none = [points.new_zeros(points.shape[:-1], dtype=torch.bool) for points in (x, y)]
    zero = none[0] if zero is None else zero
    return _with_dimension(x, zero), _with_dimension(y, none[1] if zero_y is None else zero_y), zero


def _with_dimension(x: Tensor, zero: Tensor) -> Tensor:
    # masked, so that no gradient reaches them
    return torch.cat([x.masked_fill(zero.unsqueeze(-1), 0.0), zero.unsqueeze(-1).to(x.dtype)], -1)


def _orthogonal_to_all(found: Neighbors, zero: Tensor, metric: str, alone: bool, sets: Offsets | None) -> Neighbors:
    """Give rows of zeros, which the search took for equal, one distance to all: their first k others are nearest."""
    indices, distances = found
    zero = zero.unsqueeze(-1) & (indices >= 0)
    n, k = indices.shape[-2:]
    rows = torch.arange(n, device=zero.device).unsqueeze(-1)
    first = starts = torch.zeros_like(rows)
    if sets is not None:
        own, others = (part.to(zero.device) for part in (sets[0], sets[0] if sets[1] is None else sets[1]))
        place = torch.searchsorted(own, rows, right=True) - 1
        starts, first = own[place], others[place]
    nearest = torch.arange(k, device=zero.device).expand(n, k)
    if alone:
        nearest = nearest + (nearest >= rows - starts)
    indices = torch.where(zero, nearest + first, indices)
    distances = torch.where(zero, 1.0 if metric == "cosine" else math.sqrt(2), distances)
    return found._with(indices, distances)
