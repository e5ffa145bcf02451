"""Exact nearest neighbours of points ``[..., n, d]``."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch.ops.knn import METRICS, NeighborDistances, knn_reference

Metric = Literal["euclidean", "cosine", "angular", "inner_product"]


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
        distances = _differentiable(queries, database, indices, distances, metric)
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
