"""Operator ``laplacian_recurrence``: a polynomial in the Laplacian of a block, by a three-term recurrence in one call.

    y_k = a_k L y_{k-1} + b_k y_{k-1} + c_k y_{k-2},    y_{-1} = x, y_{-2} = 0,    L = diagonal - left W right

What the eigensolvers spend most of their products on; not differentiable, see :meth:`lfm_torch.Laplacian.recurrence`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from lfm_torch.ops._registry import Operator, register
from lfm_torch.ops.graphs import symmetrize_edges_reference
from lfm_torch.ops.laplacian import laplacian_product_reference


def laplacian_recurrence_reference(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    diagonal: Tensor,
    left: Tensor,
    right: Tensor,
    x: Tensor,
    coefficients: Tensor,
    graphs: int,
) -> Tensor:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.laplacian_recurrence``.

    Args:
        rowptr: ``[N + 1]`` int64, start of each row in the CSR of the symmetric weights.
        col: ``[nnz]`` int32.
        weight: ``[nnz]`` float32 or float64.
        diagonal: ``[N]``, with ``left`` and ``right`` the scalings of the chosen normalisation.
        left: ``[N]``.
        right: ``[N]``; 0 only at nodes without weight.
        x: ``[N, m]`` in the dtype of the weights.
        coefficients: ``[degree, 3]`` float64 in CPU memory: a, b and c of each step.
        graphs: Into how many parts of N / graphs rows, with no edge between them, the graph falls.

    Returns:
        ``[N, m]``, the last ``y``; ``x`` where there is no step.
    """
    matrix = (rowptr, col, weight, diagonal, left, right)
    previous, current = torch.zeros_like(x), x.clone()
    for a, b, c in coefficients.tolist():
        previous, current = current, laplacian_product_reference(*matrix, current, previous, a, b, c)
    return current


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64, device="cpu").to(device, dtype)

    for b, n, k, m, degree in (
        (1, 40, 5, 16, 1),
        (3, 65, 20, 7, 4),
        (8, 31, 9, 33, 3),
        (1, 700, 12, 40, 5),
        (2, 9, 3, 4, 0),
    ):
        order = torch.rand(b, n, n, generator=generator, dtype=torch.float32, device="cpu")
        order.diagonal(dim1=1, dim2=2).fill_(2.0)
        indices = order.argsort(dim=2)[..., :k].contiguous().to(device)
        rowptr, col, weight = symmetrize_edges_reference(indices, rand(b, n, k), "mean")
        scalings = (rand(b * n), rand(b * n) / k, rand(b * n) + 0.5)
        steps = torch.rand(degree, 3, generator=generator, dtype=torch.float64, device="cpu") - 0.5
        yield rowptr, col, weight, *scalings, rand(b * n, m) - 0.5, steps, b
    none = torch.zeros(4, dtype=torch.int64, device=device)
    steps = torch.tensor([[0.5, 1.0, 3.0], [-1.0, 0.5, 0.25]], dtype=torch.float64, device="cpu")
    yield none, none[:0].int(), rand(0), rand(3), rand(3), rand(3) * 0, rand(3, 5), steps, 1


OPERATOR = register(
    Operator(
        "laplacian_recurrence",
        "(Tensor rowptr, Tensor col, Tensor weight, Tensor diagonal, Tensor left, Tensor right, Tensor x, "
        "Tensor coefficients, int graphs) -> Tensor",
        laplacian_recurrence_reference,
        lambda rowptr, col, weight, diagonal, left, right, x, coefficients, graphs: torch.empty_like(x),
        _samples,
    )
)


def laplacian_recurrence(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    diagonal: Tensor,
    left: Tensor,
    right: Tensor,
    x: Tensor,
    coefficients: Tensor,
    graphs: int = 1,
) -> Tensor:
    """Call the operator: the twin's signature, compiled kernels where they are loaded."""
    y: Tensor = OPERATOR.compiled(rowptr, col, weight, diagonal, left, right, x.contiguous(), coefficients, graphs)
    return y
