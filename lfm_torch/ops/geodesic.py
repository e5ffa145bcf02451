"""Operator ``geodesics``: shortest paths along the edges of a graph from several sources, batched over graphs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch.ops._registry import Operator, register
from lfm_torch.ops.graphs import symmetrize_edges_reference

# candidate distances held at once in the twin
_CANDIDATES = 1 << 24


def geodesics_reference(rowptr: Tensor, col: Tensor, length: Tensor, sources: Tensor) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.geodesics``: Bellman-Ford until nothing changes.

    Args:
        rowptr: ``[b n + 1]`` int64, start of each row in the block-diagonal CSR of a symmetric graph.
        col: ``[nnz]`` int32.
        length: ``[nnz]`` non-negative, symmetric lengths of the edges.
        sources: ``[b, p]`` int64 nodes, numbered within each graph.

    Returns:
        ``[b, n, p]`` length of the shortest path to each source, infinity where there is none.
    """
    b, p = sources.shape
    total = rowptr.numel() - 1
    n = total // b
    first = torch.arange(b, device=sources.device).unsqueeze(1) * n
    distance = length.new_full((total, p), torch.inf)
    distance[(first + sources).flatten(), torch.arange(p, device=sources.device).repeat(b)] = 0
    rows = torch.repeat_interleave(torch.arange(total, device=col.device), rowptr.diff())
    step = max(1, _CANDIDATES // max(1, col.numel()))
    parts = []
    for part in torch.split(distance, step, dim=1):
        current = part
        while True:
            ways = current[col.long()] + length.unsqueeze(1)
            shorter = current.scatter_reduce(0, rows.unsqueeze(1).expand_as(ways), ways, "amin")
            if torch.equal(shorter, current):
                break
            current = shorter
        parts.append(current)
    return torch.cat(parts, 1).view(b, n, p)


def _sample_inputs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for b, n, k, p in ((1, 40, 2, 1), (2, 60, 4, 3), (1, 150, 20, 40), (3, 30, 3, 9)):
        order = torch.rand(b, n, n, generator=generator, dtype=torch.float32, device="cpu")
        order.diagonal(dim1=1, dim2=2).fill_(2.0)
        indices = order.argsort(dim=2)[..., :k].contiguous().to(device)
        weights = torch.rand(b, n, k, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)
        rowptr, col, length = symmetrize_edges_reference(indices, weights, "union")
        yield rowptr, col, length, torch.randint(0, n, (b, p), generator=generator, device="cpu").to(device)
    none = torch.zeros(5, dtype=torch.int64, device=device)
    empty = torch.zeros(0, dtype=dtype, device=device)
    yield none, empty.int(), empty, torch.tensor([[1], [0]], dtype=torch.int64, device=device)


GEODESICS = register(
    Operator(
        "geodesics",
        "(Tensor rowptr, Tensor col, Tensor length, Tensor sources) -> Tensor",
        geodesics_reference,
        lambda rowptr, col, length, sources: length.new_empty(
            sources.shape[0], (rowptr.shape[0] - 1) // sources.shape[0], sources.shape[1]
        ),
        _sample_inputs,
    )
)


def geodesics(rowptr: Tensor, col: Tensor, length: Tensor, sources: Tensor) -> Tensor:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    distances: Tensor = GEODESICS.compiled(rowptr, col, length.contiguous(), sources.contiguous())
    return distances
