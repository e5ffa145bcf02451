"""The search itself, of checked points: by the kernels, by their twins, or through another package."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch.graphs.points import ANGULAR, Metric
from lfm_torch.graphs.sets import Offsets
from lfm_torch.ops.knn import NeighborDistances, knn_ragged_reference, knn_reference, unit_rows

Backend = Literal["auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster"]


BACKENDS = ("auto", "native", "reference", "faiss", "faiss_ivf", "faiss_hnsw", "torch_cluster")


EXTERNAL = BACKENDS[3:]


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


@dataclass(frozen=True)
class Search:
    """A search of checked points, float32 or float64, for which the metric has distances."""

    k: int
    metric: Metric
    backend: Backend
    memory_budget: float | None
    sets: Offsets | None

    def __call__(self, x: Tensor, y: Tensor | None) -> Neighbors:
        """Search the rows of ``x`` in ``y``, or in ``x`` itself."""
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


def _check_native(backend: str, operator: str, device: torch.device) -> None:
    if backend == "native" and not ops.has_native_kernel(operator, device):
        raise ValueError(f"backend='native' needs compiled kernels for {device}; see lfm_torch.build_info().notes")


def _external(x: Tensor, y: Tensor | None, k: int, metric: Metric, backend: str, shape: tuple[int, ...]) -> Neighbors:
    """Search set by set through another package."""
    if backend == "torch_cluster":
        from lfm_torch.integrations.torch_cluster import search
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
