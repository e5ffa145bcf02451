"""Exact nearest neighbours of points ``[..., n, d]``."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.ops.knn import METRICS, NeighborDistances, knn_ragged_reference, knn_reference

Metric = Literal["euclidean", "cosine", "angular", "inner_product"]
Backend = Literal["auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster"]
BACKENDS = ("auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster")
EXTERNAL = BACKENDS[3:]


class Neighbors(NamedTuple):
    """Result of :func:`knn`: ``indices`` int64 and ``distances``, both ``[..., n, n_neighbors]``."""

    indices: Tensor
    distances: Tensor


class ApproximateNeighbors(Neighbors):
    """Neighbours from an approximate index, with the share of the true ones that it finds.

    Attributes:
        recall: Measured against the exact neighbours of a sample of the queries, between 0 and 1.
    """

    recall: float


def default_n_neighbors(n: int) -> int:
    """Neighbours used when none are asked for: 15% of the points, at least 1 and at most 300 (the paper's value)."""
    return max(1, min(300, math.ceil(0.15 * n), n - 1))


@outside_autocast
def knn(
    x: Tensor,
    y: Tensor | None = None,
    *,
    n_neighbors: int,
    metric: Metric = "euclidean",
    backend: Backend = "auto",
    batch: Tensor | None = None,
    batch_y: Tensor | None = None,
    memory_budget: float | None = None,
) -> Neighbors:
    """Find the exact k nearest neighbours of every row of ``x`` among the rows of ``y`` (or of ``x`` itself).

    Distances: euclidean ``|a - b|``; angular ``|a/|a| - b/|b||``, the chord; cosine ``1 - cos(a, b)``; inner_product
    returns ``<a, b>``, largest first. Each is evaluated in float64 and rounded to the input's dtype; rows are sorted by
    the rounded value, ties by the smaller index, so the result does not depend on device, threads or run.
    Differentiable in ``x`` and ``y`` through the distances, the choice of neighbours held fixed.

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

    Raises:
        TypeError: not a floating-point tensor, or different dtypes.
        ValueError: wrong shapes, values that are not finite, too many neighbours, a zero row under "cosine" or
            "angular", a budget that is too small, a backend that cannot do what is asked.
        ImportError: a backend whose package is not installed.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> lfm.knn(x, n_neighbors=1).indices.flatten().tolist()
        [1, 0, 1]
    """
    _checks.check_choice("metric", metric, METRICS)
    _checks.check_choice("backend", backend, BACKENDS)
    x = _checks.check_points("x", x)
    if y is not None:
        y = _checks.check_points("y", y)
        _checks.check_same_device_dtype("x", x, "y", y)
        if x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1]:
            raise ValueError(
                f"y must have shape [..., m, d] with the batch and feature dimensions of x, {list(x.shape)}, "
                f"got {list(y.shape)}"
            )
    if metric in ("cosine", "angular"):
        _check_nonzero_rows("x", x)
        if y is not None:
            _check_nonzero_rows("y", y)
    if batch is not None or batch_y is not None:
        return _knn_ragged(x, y, n_neighbors, metric, backend, batch, batch_y, memory_budget)
    if y is None:
        _checks.check_range(
            "n_neighbors", n_neighbors, 1, x.shape[-2] - 1, f"x has {x.shape[-2]} rows, itself not counted"
        )
    else:
        _checks.check_range("n_neighbors", n_neighbors, 1, y.shape[-2], f"y has {y.shape[-2]} rows")

    shape = (*x.shape[:-1], n_neighbors)
    queries = _as_batch(x)
    database = None if y is None else _as_batch(y)
    with torch.no_grad():
        if backend in EXTERNAL:
            return _external(queries, database, n_neighbors, metric, backend, shape)
        budget = _bytes_of(memory_budget, queries, database)
        indices, distances = _search(queries, database, n_neighbors, metric, backend, budget)
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        distances = _differentiable(queries, database, indices, distances, metric)
    return Neighbors(indices.view(shape), distances.view(shape))


def set_offsets(name: str, batch: Tensor, n: int) -> Tensor:
    """Return the int64 offsets ``[s + 1]``, on the CPU, of a PyG-style batch vector ``[n]`` or of offsets.

    Raises:
        TypeError: not an integer tensor.
        ValueError: neither ``n`` ascending numbers of sets, nor offsets ascending from 0 to ``n``.
    """
    if not isinstance(batch, Tensor) or batch.is_floating_point() or batch.is_complex() or batch.dtype == torch.bool:
        kind = batch.dtype if isinstance(batch, Tensor) else type(batch).__name__
        raise TypeError(f"{name} must be an integer tensor, got {kind}")
    values = batch.detach().cpu().long()
    wanted = f"the set of each of the {n} rows, ascending, or offsets ascending from 0 to {n}"
    if values.dim() != 1 or values.numel() == 0 or bool((values.diff() < 0).any()) or int(values[0]) < 0:
        raise ValueError(f"{name} must be {wanted}, got shape {list(values.shape)}, or values out of order")
    if int(values[0]) == 0 and int(values[-1]) == n:
        return values
    if values.numel() != n:
        raise ValueError(f"{name} must be {wanted}, got {values.numel()} values from {values[0]} to {values[-1]}")
    counts = torch.bincount(values)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def _knn_ragged(
    x: Tensor,
    y: Tensor | None,
    n_neighbors: int,
    metric: Metric,
    backend: Backend,
    batch: Tensor | None,
    batch_y: Tensor | None,
    memory_budget: float | None,
) -> Neighbors:
    if batch is None or (y is None) != (batch_y is None):
        raise ValueError("batch must be given with x, and batch_y with y and only then")
    if x.dim() != 2:
        raise ValueError(f"x must have shape [n, d] where batch is given, got {list(x.shape)}")
    if backend in EXTERNAL:
        raise ValueError(f"backend must be 'auto', 'native' or 'reference' where batch is given, got {backend!r}")
    _checks.check_range("n_neighbors", n_neighbors, 1, 2**31 - 1, "indices are 32 bits inside")
    offsets = set_offsets("batch", batch, x.shape[0])
    y_offsets = None if y is None or batch_y is None else set_offsets("batch_y", batch_y, y.shape[0])
    if y_offsets is not None:
        # sets at the end without a row on one side are no error
        sets = max(offsets.numel(), y_offsets.numel())
        offsets, y_offsets = (
            torch.cat([o, o[-1:].expand(sets - o.numel())]).contiguous() for o in (offsets, y_offsets)
        )
    queries = _as_batch(x)[0]
    database = None if y is None else _as_batch(y)[0]
    with torch.no_grad():
        budget = _bytes_of(memory_budget, queries, database)
        args = (queries, database, offsets, y_offsets, n_neighbors, metric, budget)
        if backend == "reference":
            indices, distances = knn_ragged_reference(*args)
        else:
            _check_native(backend, "knn_ragged", x.device)
            indices, distances = ops.ragged_nearest_neighbors(*args)
    if torch.is_grad_enabled() and (x.requires_grad or (y is not None and y.requires_grad)):
        # an empty place is infinitely far for every x: it takes part as a constant
        here, points = indices >= 0, queries if database is None else database
        parts = (points.unsqueeze(0), indices.clamp_min(0).unsqueeze(0), torch.where(here, distances, 1.0).unsqueeze(0))
        flow = _differentiable(queries.unsqueeze(0), *parts, metric)[0]
        distances = torch.where(here, flow, distances)
    return Neighbors(indices, distances)


def _as_batch(x: Tensor) -> Tensor:
    return at_least_single(x.reshape(-1, x.shape[-2], x.shape[-1]))


def _search(x: Tensor, y: Tensor | None, k: int, metric: str, backend: str, budget: int) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        return knn_reference(x, y, k, metric)
    _check_native(backend, "knn", x.device)
    return ops.nearest_neighbors(x, y, k, metric, budget)


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
        return _free_memory(x.device) // 2
    if isinstance(budget, bool) or not isinstance(budget, (int, float)):
        raise TypeError(f"memory_budget must be a number of bytes or a share, got {type(budget).__name__}")
    if not 0 < budget < float("inf"):
        raise ValueError(f"memory_budget must be positive, a number of bytes or a share of at most 1, got {budget}")
    allowed = int(budget * _free_memory(x.device)) if isinstance(budget, float) and budget <= 1 else int(budget)
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
    found = distances
    if metric in ("cosine", "angular"):
        x = x / x.norm(dim=-1, keepdim=True)
        y = None if y is None else y / y.norm(dim=-1, keepdim=True)
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
