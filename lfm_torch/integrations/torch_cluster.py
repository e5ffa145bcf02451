"""Neighbours through torch_cluster."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch.ops.knn import unit_rows


def search(x: Tensor, y: Tensor | None, k: int, metric: str, kind: str) -> tuple[Tensor, Tensor]:
    """Search ``x [n, d]`` in ``y`` (or in itself) through torch_cluster: ``indices`` and ``distances``, ``[n, k]``.

    Raises:
        ImportError: torch_cluster is not installed.
        ValueError: a metric or a k that torch_cluster does not have, or rows that it left short.
    """
    try:
        import torch_cluster
    except ImportError as error:
        raise ImportError("backend='torch_cluster' needs torch-cluster: pip install \"lfm-torch[pyg]\"") from error
    if metric == "inner_product":
        raise ValueError(f"metric must be a distance for backend='torch_cluster', got {metric!r}")
    most = 100 if x.is_cuda else k + 1
    wanted = k + (y is None)
    if wanted > most:
        raise ValueError(f"n_neighbors must be at most {most - (y is None)} for torch_cluster on CUDA, got {k}")
    if metric != "euclidean":  # its own cosine exists on CUDA only; the order is that of unit rows
        x, y = unit_rows(x), None if y is None else unit_rows(y)
    database = x if y is None else y
    row, column = torch_cluster.knn(database, x, wanted)
    keep = row != column if y is None else torch.ones_like(row, dtype=torch.bool)
    row, column = row[keep], column[keep]
    # a point that is missing from its own list (duplicates) has one neighbour too many
    counts = torch.bincount(row, minlength=x.shape[0])
    place = torch.arange(row.numel(), device=x.device) - (counts.cumsum(0) - counts)[row]
    if bool((counts < k).any()):
        raise ValueError(f"torch_cluster found fewer than {k} neighbors for row {int((counts < k).nonzero()[0])}")
    indices = column[place < k].view(-1, k)
    distances = torch.stack([(row - database[own]).norm(dim=-1) for row, own in zip(x, indices, strict=True)])
    return indices, distances.square() / 2 if metric == "cosine" else distances
