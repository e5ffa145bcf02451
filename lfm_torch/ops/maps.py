"""Operators ``inner_products`` and ``map_energies``: all maps between two stacks of bases, and what is read from them.

The maps of all pairs of two stacks of bases are one matrix product, ``C [A, m_y, B, m_x]`` as it comes out of it; the
second operator reduces each to seven numbers without writing any other array per pair.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch._precision import outside_autocast
from lfm_torch.ops._registry import Operator, register

ENERGIES = ("carried", "weighted", "commutator", "on_x", "off_x", "on_y", "off_y")


def map_energies_reference(
    C: Tensor, evals_x: Tensor, evals_y: Tensor, weight_x: Tensor, weight_y: Tensor, skip: int
) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.map_energies``.

    Args:
        C: ``[A, m_y, B, m_x]``, the map from space b to space a at ``[a, :, b, :]``.
        evals_x: ``[A or 1, B, m_x]``.
        evals_y: ``[A, B or 1, m_y]``.
        weight_x: ``[A or 1, B, m_x]``, with ``weight_y`` the factors of the weighted sum.
        weight_y: ``[A, B or 1, m_y]``.
        skip: Leading functions of both spaces that the Gram matrices leave out.

    Returns:
        ``[A, B, 7]``: ``sum C_ji^2``, ``sum weight_y_j weight_x_i C_ji^2``, ``sum (evals_y_j - evals_x_i)^2 C_ji^2``,
        and of the Gram matrices ``R^T R`` and ``R R^T`` of ``R = C[skip:, skip:]`` the sums of squares on and off the
        diagonal.
    """
    C = C.permute(0, 2, 1, 3)
    squares = C.square()
    x, y, u, w = evals_x.unsqueeze(-2), evals_y.unsqueeze(-1), weight_x.unsqueeze(-2), weight_y.unsqueeze(-1)
    sums = [squares.sum((-2, -1)), (w * squares * u).sum((-2, -1)), ((y - x).square() * squares).sum((-2, -1))]
    rest = C[..., skip:, skip:]
    for gram in (rest.mT @ rest, rest @ rest.mT):
        diagonal = gram.diagonal(dim1=-2, dim2=-1)
        sums += [diagonal.square().sum(-1), (gram - torch.diag_embed(diagonal)).square().sum((-2, -1))]
    return torch.stack(sums, -1)


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    for a, m_y, b, m_x, skip in (
        (3, 5, 2, 4, 0),
        (2, 50, 3, 50, 1),
        (1, 1, 4, 7, 1),
        (2, 33, 1, 70, 0),
        (1, 9, 1, 8, 20),
    ):
        C = 0.5 * (rand(a, m_y, b, m_x) - 0.5)
        yield C, rand(1, b, m_x), rand(a, 1, m_y), rand(1, b, m_x), rand(a, 1, m_y), skip
        yield C, rand(a, b, m_x), rand(a, b, m_y), rand(1, b, m_x), rand(a, b, m_y), skip
    yield rand(0, 5, 2, 4), rand(1, 2, 4), rand(0, 1, 5), rand(1, 2, 4), rand(0, 1, 5), 0


def _fake(C: Tensor, evals_x: Tensor, evals_y: Tensor, weight_x: Tensor, weight_y: Tensor, skip: int) -> Tensor:
    return C.new_empty(C.shape[0], C.shape[2], len(ENERGIES))


OPERATOR = register(
    Operator(
        "map_energies",
        "(Tensor C, Tensor evals_x, Tensor evals_y, Tensor weight_x, Tensor weight_y, int skip) -> Tensor",
        map_energies_reference,
        _fake,
        _samples,
    )
)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.skip = inputs
    ctx.save_for_backward(*tensors)


@outside_autocast
def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    C, evals_x, evals_y, weight_x, weight_y = ctx.saved_tensors
    C = C.permute(0, 2, 1, 3)
    x, y, u, w = evals_x.unsqueeze(-2), evals_y.unsqueeze(-1), weight_x.unsqueeze(-2), weight_y.unsqueeze(-1)
    carried, weighted, commutator, on_x, off_x, on_y, off_y = (g[..., None, None] for g in grad.unbind(-1))
    grads: list[Tensor | None] = [None] * 6
    if ctx.needs_input_grad[0]:
        whole = 2 * C * (carried + weighted * w * u + commutator * (y - x).square())
        rest = C[..., ctx.skip :, ctx.skip :]
        gram_x, gram_y = rest.mT @ rest, rest @ rest.mT
        on_diagonal = [torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1)) for gram in (gram_x, gram_y)]
        inner_x = off_x * gram_x + (on_x - off_x) * on_diagonal[0]
        inner_y = off_y * gram_y + (on_y - off_y) * on_diagonal[1]
        part = 4 * (rest @ inner_x + inner_y @ rest)
        top = min(ctx.skip, C.shape[-2]), min(ctx.skip, C.shape[-1])
        whole = whole + torch.nn.functional.pad(part, (top[1], 0, top[0], 0))
        grads[0] = whole.permute(0, 2, 1, 3)
    squares = C.square()
    gap = 2 * commutator * (y - x) * squares
    factors = (
        (evals_x, -gap.sum(-2)),
        (evals_y, gap.sum(-1)),
        (weight_x, (weighted * w * squares).sum(-2)),
        (weight_y, (weighted * u * squares).sum(-1)),
    )
    for position, (factor, gradient) in enumerate(factors, start=1):
        if ctx.needs_input_grad[position]:
            grads[position] = gradient.sum_to_size(factor.shape)
    return tuple(grads)


def inner_products_reference(x: Tensor, y: Tensor) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.inner_products``: ``x y^T``, ``[A, n]`` and ``[B, n]`` to ``[A, B]``.

    The compiled kernel promises more: every entry depends on its two rows alone, to the last bit, whatever they are
    stacked with, and ``inner_products(y, x)`` is the transpose.
    """
    return x @ y.mT


def _stack_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    for a, b, n in ((3, 5, 7), (1, 1, 1), (13, 33, 300), (50, 100, 520), (600, 530, 40), (0, 4, 3), (4, 3, 0)):
        stacks = (torch.randn(size, n, generator=generator, dtype=torch.float64, device="cpu") for size in (a, b))
        yield tuple(stack.to(device, dtype) / max(n, 1) ** 0.5 for stack in stacks)


PRODUCTS = register(
    Operator(
        "inner_products",
        "(Tensor x, Tensor y) -> Tensor",
        inner_products_reference,
        lambda x, y: x.new_empty(x.shape[0], y.shape[0]),
        _stack_samples,
        twin_on_gpu=True,
    )
)


def _products_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


@outside_autocast
def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
    x, y = ctx.saved_tensors
    return grad @ y, grad.mT @ x


torch.library.register_autograd("lfm_torch::inner_products", _products_backward, setup_context=_products_context)
torch.library.register_autograd("lfm_torch::map_energies", _backward, setup_context=_setup_context)


def map_energies(
    C: Tensor, evals_x: Tensor, evals_y: Tensor, weight_x: Tensor, weight_y: Tensor, skip: int = 0
) -> Tensor:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    tensors = (t.contiguous() for t in (C, evals_x, evals_y, weight_x, weight_y))
    energies: Tensor = OPERATOR.compiled(*tensors, skip)
    return energies


def inner_products(x: Tensor, y: Tensor) -> Tensor:
    """Call the operator: all inner products of the rows of ``x [A, n]`` and ``y [B, n]``, ``[A, B]``."""
    products: Tensor = PRODUCTS.compiled(x.contiguous(), y.contiguous())
    return products
