"""Exact nearest neighbours of points ``[..., n, d]``."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch._warnings import note
from lfm_torch.ops.knn import METRICS, NeighborDistances, knn_ragged_reference, knn_reference, unit_rows

Metric = Literal["euclidean", "cosine", "angular", "inner_product"]
Backend = Literal["auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster"]
BACKENDS = ("auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster")
EXTERNAL = BACKENDS[3:]
ANGULAR = ("cosine", "angular")
# largest magnitudes of points whose distances, and the products behind them, neither overflow nor vanish
_SAFE = {torch.float32: (2.0**-50, 2.0**50), torch.float64: (2.0**-400, 2.0**500)}


class Neighbors(NamedTuple):
    """Result of :func:`knn`: ``indices`` int64 and ``distances``, both ``[..., n, n_neighbors]``."""

    indices: Tensor
    distances: Tensor

    def _with(self, indices: Tensor, distances: Tensor) -> Neighbors:
        return Neighbors(indices, distances)


class ApproximateNeighbors(Neighbors):
    """Neighbours from an approximate index, with the share of the true ones that it finds.

    Attributes:
        recall: Measured against the exact neighbours of a sample of the queries, between 0 and 1.
    """

    recall: float

    def _with(self, indices: Tensor, distances: Tensor) -> Neighbors:
        result = ApproximateNeighbors(indices, distances)
        result.recall = self.recall
        return result


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
    search = _Search(n_neighbors, metric, backend, memory_budget, sets)
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


def set_offsets(name: str, batch: IndexLike, n: int) -> Tensor:
    """Return the int64 offsets ``[s + 1]``, on the CPU, of a PyG-style batch vector ``[n]`` or of offsets.

    Raises:
        TypeError: not integers.
        ValueError: neither ``n`` ascending numbers of sets, nor offsets ascending from 0 to ``n``.
    """
    values = _checks.as_integers(name, batch, torch.device("cpu"))
    if not _checks.has_values(values):
        offsets: Tensor = _traced_offsets(values, n, name)
        return offsets
    wanted = f"the set of each of the {n} rows, ascending, or offsets ascending from 0 to {n}"
    if values.dim() != 1 or values.numel() == 0 or bool((values.diff() < 0).any()) or int(values[0]) < 0:
        raise ValueError(f"{name} must be {wanted}, got shape {list(values.shape)}, or values out of order")
    if int(values[0]) == 0 and int(values[-1]) == n:
        return values
    if values.numel() != n:
        raise ValueError(f"{name} must be {wanted}, got {values.numel()} values from {values[0]} to {values[-1]}")
    counts = torch.bincount(values)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@torch.library.custom_op("lfm_torch_traced::set_offsets", mutates_args=())
def _traced_offsets(batch: Tensor, n: int, name: str) -> Tensor:
    """:func:`set_offsets` when what was traced runs: how many sets there are is known then."""
    return set_offsets(name, batch, n).clone()


@_traced_offsets.register_fake
def _(batch: Tensor, n: int, name: str) -> Tensor:
    return batch.new_empty(torch.library.get_ctx().new_dynamic_size())


Offsets = tuple[Tensor, Tensor | None]


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


@dataclass(frozen=True)
class _Search:
    """A search of checked points, float32 or float64, for which the metric has distances."""

    k: int
    metric: Metric
    backend: Backend
    memory_budget: float | None
    sets: Offsets | None

    def __call__(self, x: Tensor, y: Tensor | None) -> Neighbors:
        return self._dense(x, y) if self.sets is None else self._ragged(x, y, self.sets)

    def _dense(self, x: Tensor, y: Tensor | None) -> Neighbors:
        shape = (*x.shape[:-1], self.k)
        queries, database = _as_batch(x), None if y is None else _as_batch(y)
        with torch.no_grad():
            if self.backend in EXTERNAL:
                return _external(queries, database, self.k, self.metric, self.backend, shape)
            budget = _bytes_of(self.memory_budget, queries, database)
            if self.backend == "reference":
                indices, distances = knn_reference(queries, database, self.k, self.metric)
            else:
                _check_native(self.backend, "knn", x.device)
                indices, distances = ops.nearest_neighbors(queries, database, self.k, self.metric, budget)
        if _is_recorded(x, y):
            distances = _differentiable(queries, database, indices, distances, self.metric)
        return Neighbors(indices.view(shape), distances.view(shape))

    def _ragged(self, x: Tensor, y: Tensor | None, sets: Offsets) -> Neighbors:
        with torch.no_grad():
            budget = _bytes_of(self.memory_budget, x, y)
            if self.backend == "reference":
                indices, distances = knn_ragged_reference(x, y, *sets, self.k, self.metric, budget)
            else:
                _check_native(self.backend, "knn_ragged", x.device)
                indices, distances = ops.ragged_nearest_neighbors(x, y, *sets, self.k, self.metric, budget)
        if _is_recorded(x, y):
            # an empty place is infinitely far for every x: it takes part as a constant
            here, database = indices >= 0, (x if y is None else y).unsqueeze(0)
            places, known = indices.clamp_min(0).unsqueeze(0), torch.where(here, distances, 1.0).unsqueeze(0)
            flow = _differentiable(x.unsqueeze(0), database, places, known, self.metric)[0]
            distances = torch.where(here, flow, distances)
        return Neighbors(indices, distances)


def _is_recorded(x: Tensor, y: Tensor | None) -> bool:
    return torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad))


def _as_batch(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-2], x.shape[-1])


def power_into_range(dtype: torch.dtype, largest: float) -> float:
    """Power of two that divides points of this largest magnitude into a range where distances are safe; mostly 1."""
    low, high = _SAFE[dtype]
    if low <= largest <= high or largest == 0:
        return 1.0
    # no further than needed from above: what is small beside the largest must not vanish
    return 2.0 ** (math.frexp(largest)[1] - (math.frexp(high)[1] if largest > high else 1))


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


def zero_rows(
    name: str, x: Tensor, offsets: Tensor | None = None, *, alone: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` and which of its rows are zero, None where none is.

    Denormal rows of float64 are brought up, exactly: the reciprocal of their length is no number.

    Raises:
        ValueError: where ``alone``, if all rows are zero, or all of a set.
    """
    points = x.detach()
    single = x.dtype == torch.float32
    usable = points.any(-1) if single else (points.abs() >= torch.finfo(x.dtype).tiny).any(-1)
    known = _checks.has_values(x)
    if known and bool(usable.all()):
        return x, None
    zero = ~points.any(-1)
    if not single:
        x = torch.where((usable | zero).unsqueeze(-1), x, x * 2.0**64)
    if not known:  # there may be some
        return x, zero
    if not bool(zero.any()):
        return x, None
    if alone and bool(_whole_sets(zero, offsets).any()):
        raise ValueError(
            f"{name} must have rows that are not zero under the metrics 'cosine' and 'angular', got nothing but zeros "
            "(a collapsed representation)"
        )
    return x, zero


def note_zero_rows(name: str, zero: Tensor | None) -> None:
    """Say how many rows are zero, and what becomes of them."""
    if zero is None or not _checks.has_values(zero):
        return
    rows = "rows" if name == "x" else f"rows of {name}"
    note(
        f"{int(zero.sum())} of {zero.numel()} {rows} are zero and have no angle: they count as orthogonal to all "
        "others; leave them out, or take metric='euclidean', where they are points like others"
    )


def _whole_sets(zero: Tensor, offsets: Tensor | None) -> Tensor:
    """Which sets have no other row; one without rows has not."""
    if offsets is None:
        return zero.all(-1)
    counts = torch.cat([zero.new_zeros(1, dtype=torch.int64), zero.cumsum(0)])[offsets.to(zero.device)].diff()
    return (counts == offsets.diff().to(zero.device)) & (counts > 0)


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


def _check_native(backend: str, operator: str, device: torch.device) -> None:
    if backend == "native" and not ops.has_native_kernel(operator, device):
        raise ValueError(f"backend='native' needs compiled kernels for {device}; see lfm_torch.build_info().notes")


def _external(x: Tensor, y: Tensor | None, k: int, metric: Metric, backend: str, shape: tuple[int, ...]) -> Neighbors:
    """Search set by set through another package."""
    if backend == "torch_cluster":
        from lfm_torch.integrations.pyg import cluster_knn as search
    else:
        from lfm_torch.integrations.faiss import search

    kind = backend.removeprefix("faiss").lstrip("_") or "flat"
    found = [search(x[b], None if y is None else y[b], k, metric, kind) for b in range(x.shape[0])]
    indices, distances = (torch.stack(part).view(shape) for part in zip(*found, strict=True))
    if kind not in ("ivf", "hnsw"):
        return Neighbors(indices, distances)
    result = ApproximateNeighbors(indices, distances)
    recalls = [_recall(x[b], None if y is None else y[b], k, metric, found[b][0]) for b in range(x.shape[0])]
    result.recall = sum(recalls) / len(recalls)
    return result


def _recall(x: Tensor, y: Tensor | None, k: int, metric: Metric, indices: Tensor, samples: int = 256) -> float:
    """Share of the exact neighbours of an even sample of the rows that ``indices`` holds, duplicates counted once."""
    rows = torch.arange(min(samples, x.shape[0]), device=x.device) * x.shape[0] // min(samples, x.shape[0])
    own = k + 1 if y is None else k  # the point itself comes along where it is in the database
    exact = ops.nearest_neighbors(x[rows].unsqueeze(0), (x if y is None else y).unsqueeze(0), own, metric)[0][0]
    share = 0.0
    for row, wanted in zip(rows.tolist(), exact, strict=True):
        if y is None:
            wanted = wanted[wanted != row][:k]
        share += float(torch.isin(wanted, indices[row]).double().mean())
    return share / len(rows)


def _bytes_of(budget: float | None, x: Tensor, y: Tensor | None) -> int:
    """Memory budget in bytes; 0 where the free memory is not known and none is given.

    Raises:
        TypeError: not a number.
        ValueError: not positive, or less than the packed points take.
    """
    if budget is None:
        return _free_memory(x.device) // 2 if _checks.has_values(x) else 0
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"memory_budget must be a number of bytes or a share, got {type(budget).__name__}")
    if not 0 < budget < float("inf"):
        raise ValueError(f"memory_budget must be positive, a number of bytes or a share of at most 1, got {budget}")
    is_share = isinstance(budget, float) and budget <= 1
    if is_share and not _checks.has_values(x):
        raise ValueError(
            f"memory_budget must be a number of bytes where torch.compile or torch.export trace, got the share {budget}"
        )
    allowed = int(budget * _free_memory(x.device)) if is_share else int(budget)
    points = x.shape[-2] + (0 if y is None else y.shape[-2])
    least = points * (2 * x.shape[-1] + 50) + (8 << 20) * torch.get_num_threads()
    if allowed < least:
        raise ValueError(f"memory_budget must be at least {least} bytes for these points, got {allowed}")
    return allowed


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path("/proc/meminfo").read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return 0


def _differentiable(x: Tensor, y: Tensor | None, indices: Tensor, distances: Tensor, metric: str) -> Tensor:
    if metric in ANGULAR:
        unit = unit_rows(x)
        x, y = unit, unit if y is x else None if y is None else unit_rows(y)
    kind = "euclidean" if metric == "angular" else metric
    flow: Tensor = NeighborDistances.apply(x, y, indices, distances, kind)  # type: ignore[no-untyped-call]
    return flow
