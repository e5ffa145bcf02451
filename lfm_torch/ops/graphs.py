"""Operators that turn directed neighbour lists into a symmetric CSR graph, and count its components.

A batch of graphs is one block-diagonal CSR matrix: row ``b * n + i`` is node ``i`` of graph ``b``, and columns are
numbered the same way, so that every later operator is batched without knowing about batches.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch.ops._registry import Operator, register

SYMMETRIZATIONS = ("mean", "union", "mutual")


def symmetrize_edges_reference(indices: Tensor, weights: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.symmetrize_edges``.

    Args:
        indices: ``[b, n, k]`` int64 neighbours within each point set, no duplicates in a row, no self.
        weights: ``[b, n, k]`` weights of the directed edges, of any sign.
        mode: "mean" ``(W + W^T) / 2``, "union" ``max(W, W^T)``, "mutual" ``min(W, W^T)`` on edges both ends chose.

    Returns:
        Block-diagonal CSR ``rowptr [b n + 1]`` int64, ``col [nnz]`` int32 ascending in each row, ``weight [nnz]``.
    """
    row, column = _directed_edges(indices)
    total = indices.shape[0] * indices.shape[1]
    edges = row.numel()
    keys, where = torch.unique(torch.cat([row * total + column, column * total + row]), return_inverse=True)
    forward = weights.new_zeros(keys.numel()).index_copy_(0, where[:edges], weights.flatten())
    backward = weights.new_zeros(keys.numel()).index_copy_(0, where[edges:], weights.flatten())
    if mode == "mean":
        weight = (forward + backward) / 2
    elif mode == "union":
        weight = torch.maximum(forward, backward)
    else:
        both = torch.bincount(where, minlength=keys.numel()) == 2
        keys, weight = keys[both], torch.minimum(forward, backward)[both]
    counts = torch.bincount(keys // total, minlength=total)
    rowptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return rowptr, (keys % total).int(), weight


def symmetrize_edges_backward_reference(
    indices: Tensor, weights: Tensor, rowptr: Tensor, col: Tensor, grad: Tensor, mode: str
) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.symmetrize_edges_backward``: gradient in the directed weights.

    Edge ``i -> j`` stands in entries (i, j) and (j, i). Under "union" and "mutual" the chosen direction takes the
    gradient; equal weights share it.
    """
    row, column = _directed_edges(indices)
    total = indices.shape[0] * indices.shape[1]
    rows = torch.repeat_interleave(torch.arange(total, device=col.device), rowptr.diff())
    keys = rows * total + col
    values = weights.flatten()

    def value_at(table_keys: Tensor, table: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        if table.numel() == 0:
            return torch.zeros_like(wanted, dtype=table.dtype), torch.zeros_like(wanted, dtype=torch.bool)
        place = torch.searchsorted(table_keys, wanted).clamp_(max=table.numel() - 1)
        found = table_keys[place] == wanted
        return torch.where(found, table[place], 0.0), found

    both = value_at(keys, grad, row * total + column)[0] + value_at(keys, grad, column * total + row)[0]
    if mode == "mean":
        return (both / 2).view_as(weights)
    directed, order = torch.sort(row * total + column)
    reverse, exists = value_at(directed, values[order], column * total + row)
    better = values > reverse if mode == "union" else values < reverse
    share = torch.where(values == reverse, 0.5, better.to(values.dtype))
    alone = 1.0 if mode == "union" else 0.0
    return (both * torch.where(exists, share, alone)).view_as(weights)


def connected_components_reference(rowptr: Tensor, col: Tensor) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.connected_components``: ``labels [N]`` int64.

    Components are numbered by their smallest node. The smallest label spreads along the edges, with pointer jumping,
    until nothing changes.
    """
    total = rowptr.numel() - 1
    labels = torch.arange(total, device=col.device)
    rows = torch.repeat_interleave(labels, rowptr.diff())
    while True:
        spread = labels.scatter_reduce(0, rows, labels[col.long()], "amin")
        spread = spread[spread]
        if torch.equal(spread, labels):
            break
        labels = spread
    numbered: Tensor = torch.unique(labels, return_inverse=True)[1]
    return numbered


def _directed_edges(indices: Tensor) -> tuple[Tensor, Tensor]:
    """Flat row and column of every directed edge, numbered over the whole batch."""
    b, n, k = indices.shape
    first = torch.arange(b, device=indices.device).view(b, 1, 1) * n
    row = (first + torch.arange(n, device=indices.device).view(1, n, 1)).expand(b, n, k)
    return row.flatten(), (indices + first).flatten()


def _fake_symmetrize(indices: Tensor, weights: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    nnz = torch.library.get_ctx().new_dynamic_size()
    rowptr = indices.new_empty(indices.shape[0] * indices.shape[1] + 1)
    return rowptr, indices.new_empty(nnz, dtype=torch.int32), weights.new_empty(nnz)


def _sample_symmetrize(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for mode in SYMMETRIZATIONS:
        for b, n, k in ((1, 9, 3), (3, 50, 7), (1, 300, 120)):
            order = torch.rand(b, n, n, generator=generator, dtype=torch.float32, device="cpu")
            order.diagonal(dim1=1, dim2=2).fill_(2.0)
            indices = order.argsort(dim=2)[..., :k].contiguous().to(device)
            yield (
                indices,
                torch.rand(b, n, k, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype),
                mode,
            )


def _sample_backward(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for indices, weights, mode in _sample_symmetrize(device, dtype):
        rowptr, col, weight = symmetrize_edges_reference(indices, weights, mode)
        yield indices, weights, rowptr, col, weight.cos(), mode


def _sample_components(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for indices, weights, _ in _sample_symmetrize(device, dtype):
        yield symmetrize_edges_reference(indices, weights, "mutual")[:2]
    empty = torch.zeros(6, dtype=torch.int64, device=device)
    yield empty, torch.zeros(0, dtype=torch.int32, device=device)


SYMMETRIZE = register(
    Operator(
        "symmetrize_edges",
        "(Tensor indices, Tensor weights, str mode) -> (Tensor rowptr, Tensor col, Tensor weight)",
        symmetrize_edges_reference,
        _fake_symmetrize,
        _sample_symmetrize,
    )
)
SYMMETRIZE_BACKWARD = register(
    Operator(
        "symmetrize_edges_backward",
        "(Tensor indices, Tensor weights, Tensor rowptr, Tensor col, Tensor grad, str mode) -> Tensor",
        symmetrize_edges_backward_reference,
        lambda indices, weights, rowptr, col, grad, mode: torch.empty_like(weights),
        _sample_backward,
    )
)
COMPONENTS = register(
    Operator(
        "connected_components",
        "(Tensor rowptr, Tensor col) -> Tensor",
        connected_components_reference,
        lambda rowptr, col: rowptr.new_empty(rowptr.shape[0] - 1),
        _sample_components,
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    indices, weights, mode = inputs
    rowptr, col, _ = output
    ctx.save_for_backward(indices, weights, rowptr, col)
    ctx.mode = mode


def _backward(ctx: Any, grad_rowptr: None, grad_col: None, grad: Tensor) -> tuple[None, Tensor, None]:
    indices, weights, rowptr, col = ctx.saved_tensors
    return None, SYMMETRIZE_BACKWARD.compiled(indices, weights, rowptr, col, grad.contiguous(), ctx.mode), None


torch.library.register_autograd("lfm_torch::symmetrize_edges", _backward, setup_context=_setup_context)


def symmetrize_edges(indices: Tensor, weights: Tensor, mode: str) -> tuple[Tensor, Tensor, Tensor]:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    rowptr, col, weight = SYMMETRIZE.compiled(indices.contiguous(), weights.contiguous(), mode)
    return rowptr, col, weight


def connected_components(rowptr: Tensor, col: Tensor) -> Tensor:
    """Label the connected components of a CSR graph: ``labels [N]`` int64, numbered by their smallest node."""
    labels: Tensor = COMPONENTS.compiled(rowptr, col)
    return labels
