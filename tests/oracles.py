"""Independent answers: plain float64 NumPy and SciPy, sharing no code with the library."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

Array = NDArray[np.float64]


def distances(x: Array, y: Array, metric: str) -> Array:
    """All distances ``[n, m]`` by differences, for ``inner_product`` the products."""
    if metric == "inner_product":
        return x @ y.T
    if metric in ("cosine", "angular"):
        x, y = (p / np.linalg.norm(p, axis=1, keepdims=True) for p in (x, y))
    squared = np.stack([((row - y) ** 2).sum(1) for row in x])
    return squared / 2 if metric == "cosine" else np.sqrt(squared)


def knn(x: Array, y: Array | None, k: int, metric: str) -> tuple[NDArray[np.int64], Array]:
    """Neighbours sorted by float64 distance, ties to the smaller index."""
    table = distances(x, x if y is None else y, metric)
    order = -table if metric == "inner_product" else table.copy()
    if y is None:
        np.fill_diagonal(order, np.inf)
    indices = np.argsort(order, axis=1, kind="stable")[:, :k]
    return indices, np.take_along_axis(table, indices, 1)


def gaussian_graph(x: Array, k: int, metric: str) -> Array:
    """Dense ``(W + W^T) / 2`` with ``W_ij = exp(-4 d_ij^2 / d_k(i)^2)``."""
    indices, d = knn(x, None, k, metric)
    w = np.zeros((len(x), len(x)))
    np.put_along_axis(w, indices, np.exp(-4 * (d / d[:, -1:]) ** 2), 1)
    return (w + w.T) / 2


def laplacian(w: Array) -> Array:
    """``I - D^{-1/2} W D^{-1/2}``, zero rows for nodes without edges."""
    degree = w.sum(1)
    root = np.where(degree > 0, 1 / np.sqrt(np.where(degree > 0, degree, 1)), 0)
    return np.diag((degree > 0).astype(float)) - root[:, None] * w * root[None, :]


# The one tolerance table: kernel against twin, relative to the values and to a unit scale.
TOLERANCES: dict[torch.dtype, dict[str, float]] = {
    torch.float32: {"rtol": 1e-5, "atol": 1e-6},
    torch.float64: {"rtol": 1e-12, "atol": 1e-13},
}
