"""Neighbours through faiss: exact, and approximate for sets beyond a million points."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lfm_torch.ops.knn import unit_rows

try:
    import faiss
except ImportError as error:
    raise ImportError(
        "backend='faiss' needs faiss: pip install \"lfm-torch[faiss]\" (or [faiss-gpu] for CUDA 12)"
    ) from error

_PROBED = 0.1  # share of the cells of an IVF index that are searched


def search(x: Tensor, y: Tensor | None, k: int, metric: str, kind: str) -> tuple[Tensor, Tensor]:
    """Search ``x [n, d]`` in ``y`` (or in itself) in faiss's float32 arithmetic.

    Args:
        x: Queries.
        y: Database, None for ``x`` itself.
        k: Neighbours per row; an approximate index that finds fewer is searched again exactly for these rows.
        metric: "euclidean", "cosine", "angular" or "inner_product".
        kind: "flat", "ivf" or "hnsw".

    Returns:
        ``indices [n, k]`` int64 and ``distances`` in the dtype of ``x``.
    """
    database = x if y is None else y
    unit = metric in ("cosine", "angular")
    queries, points = _as_array(x, unit), _as_array(database, unit)
    products = metric != "euclidean"
    index = _on_device(_index(kind, points, products), x.device)
    index.add(points)
    wanted = k + (y is None)
    found = (
        _without_self(torch.from_numpy(index.search(queries, wanted)[1]), k)
        if y is None
        else (torch.from_numpy(index.search(queries, wanted)[1]))
    )
    short = (found < 0).any(1).nonzero().flatten()
    if short.numel() > 0:
        flat = _index("flat", points, products)
        flat.add(points)
        again = torch.from_numpy(flat.search(queries[short.numpy()], wanted)[1])
        found[short] = _without_self(again, k, short) if y is None else again
    indices = found.to(x.device)
    return indices, _distances(x, database, indices, metric)


def _as_array(x: Tensor, unit: bool) -> Any:
    points = x.detach()
    return (unit_rows(points) if unit else points).float().cpu().contiguous().numpy()


def _index(kind: str, points: Any, products: bool) -> Any:
    n, d = points.shape
    metric = faiss.METRIC_INNER_PRODUCT if products else faiss.METRIC_L2
    if kind == "hnsw":
        index: Any = faiss.index_factory(d, "HNSW32,Flat", metric)
        index.hnsw.efSearch = 256
        return index
    if kind == "ivf":
        cells = max(1, round(n**0.5))
        index = faiss.index_factory(d, f"IVF{cells},Flat", metric)
        index.train(points)
        index.nprobe = max(1, round(_PROBED * cells))
        return index
    return faiss.IndexFlat(d, metric)


def _on_device(index: Any, device: torch.device) -> Any:
    """Move to the GPU where faiss was built for one and the points are there; HNSW stays on the CPU."""
    if device.type != "cuda" or not hasattr(faiss, "StandardGpuResources") or "HNSW" in type(index).__name__:
        return index
    return faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), device.index or 0, index)


def _without_self(found: Tensor, k: int, rows: Tensor | None = None) -> Tensor:
    """Drop each row's own index from its k + 1, or the last where duplicates have crowded it out."""
    own = torch.arange(found.shape[0], device="cpu") if rows is None else rows
    is_self = found == own.unsqueeze(1)
    is_self[~is_self.any(1), -1] = True
    return found[~is_self].view(-1, k)


def _distances(x: Tensor, y: Tensor, indices: Tensor, metric: str) -> Tensor:
    """Distances of the pairs found, in float64: faiss expands the square and returns what is left of it."""
    values = torch.empty(indices.shape, dtype=x.dtype, device=x.device)
    rows = max(1, (1 << 23) // (indices.shape[1] * x.shape[1]))
    for start in range(0, x.shape[0], rows):
        part = slice(start, start + rows)
        a, b = x[part].double().unsqueeze(1), y[indices[part]].double()
        if metric in ("cosine", "angular"):
            a, b = unit_rows(a), unit_rows(b)
        if metric == "inner_product":
            values[part] = (a * b).sum(-1)
        else:
            distance = (a - b).norm(dim=-1)
            values[part] = distance.square() / 2 if metric == "cosine" else distance
    return values
