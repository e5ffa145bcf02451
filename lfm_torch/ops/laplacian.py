"""Operators ``laplacian_product`` and its edge gradient ``edge_products``.

One fused pass serves every normalisation and the three-term recurrence of a polynomial in L:

    y = a (diagonal * x - left * W (right * x)) + b x + c z

The normalised matrix itself is never built. W must be symmetric, in pattern and values: the gradient in x uses it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch.ops._registry import Operator, register
from lfm_torch.ops.graphs import symmetrize_edges_reference

PRODUCT_SCHEMA = (
    "(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right, Tensor x, Tensor? z, "
    "float a, float b, float c) -> Tensor"
)


def laplacian_product_reference(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    diagonal: Tensor,
    left: Tensor,
    right: Tensor,
    x: Tensor,
    z: Tensor | None,
    a: float,
    b: float,
    c: float,
) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.laplacian_product``.

    Args:
        rowptr: ``[N + 1]`` int64, start of each row in the CSR of the symmetric weights.
        col: ``[nnz]`` int32.
        weight: ``[nnz]`` float32 or float64.
        diagonal: ``[N]``, with ``left`` and ``right`` the scalings of the chosen normalisation.
        left: ``[N]``.
        right: ``[N]``.
        x: ``[N, m]`` block of vectors in the dtype of the weights; float16 and bfloat16 beside float32 weights are
            storage only, the sums are float32.
        z: None or the shape of ``x``.
        a: coefficient of the Laplacian product.
        b: coefficient of ``x``.
        c: coefficient of ``z``.

    Returns:
        ``[N, m]`` in the dtype of ``x``.
    """
    stored = x.dtype
    x, z = x.to(weight.dtype), None if z is None else z.to(weight.dtype)
    # torch has no CSR product with int32 indices and int64 pointers on every device: gather and segment-sum instead
    messages = weight.unsqueeze(1) * (right.unsqueeze(1) * x)[col.long()]
    rows = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), rowptr.diff())
    sums = torch.zeros_like(x).index_add_(0, rows, messages)
    y = a * (diagonal.unsqueeze(1) * x - left.unsqueeze(1) * sums) + b * x
    return (y if z is None else y + c * z).to(stored)


def edge_products_reference(rowptr: Tensor, col: Tensor, left: Tensor, right: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.edge_products``: ``left_i right_j <g_i, x_j>`` per edge, ``[nnz]``."""
    rows = torch.repeat_interleave(torch.arange(x.shape[0], device=x.device), rowptr.diff())
    return ((left.unsqueeze(1) * g)[rows] * (right.unsqueeze(1) * x)[col.long()]).sum(1)


def _sample_product(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    for n, k, m in ((40, 5, 1), (65, 20, 8), (130, 60, 37), (70, 9, 64)):
        order = torch.rand(1, n, n, generator=generator, dtype=torch.float32, device="cpu")
        order.diagonal(dim1=1, dim2=2).fill_(2.0)
        indices = order.argsort(dim=2)[..., :k].contiguous().to(device)
        rowptr, col, weight = symmetrize_edges_reference(indices, rand(1, n, k), "mean")
        scalings = (rand(n), rand(n), rand(n))
        yield rowptr, col, weight, *scalings, rand(n, m) - 0.5, None, 1.0, 0.0, 0.0
        yield rowptr, col, weight, *scalings, rand(n, m) - 0.5, rand(n, m), -0.5, 2.0, 0.25
    none = torch.zeros(4, dtype=torch.int64, device=device)
    yield none, none[:0].int(), rand(0), rand(3), rand(3), rand(3), rand(3, 5), None, 1.0, 0.5, 0.0


def _sample_edges(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for rowptr, col, _, _, left, right, x, z, *_ in _sample_product(device, dtype):
        yield rowptr, col, left, right, x.cos() if z is None else z, x


PRODUCT = register(
    Operator(
        "laplacian_product",
        PRODUCT_SCHEMA,
        laplacian_product_reference,
        lambda rowptr, col, weight, diagonal, left, right, x, z, a, b, c: torch.empty_like(x),
        _sample_product,
    )
)
EDGE_PRODUCTS = register(
    Operator(
        "edge_products",
        "(Tensor rowptr, Tensor col, Tensor left, Tensor right, Tensor g, Tensor x) -> Tensor",
        edge_products_reference,
        lambda rowptr, col, left, right, g, x: x.new_empty(col.shape[0]),
        _sample_edges,
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    rowptr, col, weight, diagonal, left, right, x, z, a, b, c = inputs
    ctx.save_for_backward(rowptr, col, weight, diagonal, left, right, x)
    ctx.coefficients = (a, b, c)
    ctx.has_z = z is not None


def _backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, weight, diagonal, left, right, x = ctx.saved_tensors
    a, b, c = ctx.coefficients
    _, _, need_weight, need_diagonal, need_left, need_right, need_x, need_z, *_ = ctx.needs_input_grad
    stored = x.dtype
    g, x = g.contiguous().to(weight.dtype), x.to(weight.dtype)

    def weighted(scale: Tensor, block: Tensor) -> Tensor:  # W (scale * block)
        none = torch.zeros_like(scale)
        return laplacian_product(rowptr, col, weight, none, none - 1, scale, block)

    grads: list[Tensor | None] = [None] * 11
    if need_weight:
        grads[2] = -a * edge_products(rowptr, col, left, right, g, x)
    if need_diagonal:
        grads[3] = a * (g * x).sum(1)
    if need_left:
        grads[4] = -a * (g * weighted(right, x)).sum(1)
    if need_right:
        grads[5] = -a * (x * weighted(left, g)).sum(1)
    if need_x:
        grads[6] = laplacian_product(rowptr, col, weight, diagonal, right, left, g, a=a, b=b).to(stored)
    if need_z and ctx.has_z:
        grads[7] = (c * g).to(stored)
    return tuple(grads)


torch.library.register_autograd("lfm_torch::laplacian_product", _backward, setup_context=_setup_context)


def _setup_edges(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward_edges(ctx: Any, h: Tensor) -> tuple[Tensor | None, ...]:
    rowptr, col, left, right, g, x = ctx.saved_tensors
    _, _, need_left, need_right, need_g, need_x = ctx.needs_input_grad
    n = rowptr.numel() - 1
    rows = torch.repeat_interleave(torch.arange(n, device=col.device), rowptr.diff())
    # the pattern is symmetric: edge (j, i) stands where (i, j) stands once the edges are sorted by column
    reverse = (col.long() * n + rows).argsort()
    none = torch.zeros_like(left)

    def sums(weight: Tensor, out: Tensor, scale: Tensor, block: Tensor) -> Tensor:  # out * W (scale * block)
        return laplacian_product(rowptr, col, weight, none, -out, scale, block)

    grads: list[Tensor | None] = [None] * 6
    if need_left or need_right:
        unscaled = edge_products(rowptr, col, torch.ones_like(left), torch.ones_like(right), g, x)
    if need_left:
        grads[2] = none.index_add(0, rows, h * right[col.long()] * unscaled)
    if need_right:
        grads[3] = none.index_add(0, col.long(), h * left[rows] * unscaled)
    if need_g:
        grads[4] = sums(h, left, right, x)
    if need_x:
        grads[5] = sums(h[reverse], right, left, g)
    return tuple(grads)


torch.library.register_autograd("lfm_torch::edge_products", _backward_edges, setup_context=_setup_edges)


def laplacian_product(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    diagonal: Tensor,
    left: Tensor,
    right: Tensor,
    x: Tensor,
    z: Tensor | None = None,
    *,
    a: float = 1.0,
    b: float = 0.0,
    c: float = 0.0,
) -> Tensor:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    z = None if z is None else z.contiguous()
    y: Tensor = PRODUCT.compiled(rowptr, col, weight, diagonal, left, right, x.contiguous(), z, a, b, c)
    return y


def edge_products(rowptr: Tensor, col: Tensor, left: Tensor, right: Tensor, g: Tensor, x: Tensor) -> Tensor:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    products: Tensor = EDGE_PRODUCTS.compiled(rowptr, col, left, right, g.contiguous(), x.contiguous())
    return products
