"""What the eigensolvers share: the operator they need, the record they return, deflation of a known null space."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.ops.krylov import batched_eigh


class SymmetricOperator(Protocol):
    """A symmetric positive semi-definite operator on ``[..., n, m]`` with a known bound of its spectrum."""

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., n, n)``."""

    @property
    def upper_bound(self) -> float:
        """No eigenvalue is larger."""

    def apply(self, x: Tensor, z: Tensor | None = None, *, a: float = 1.0, b: float = 0.0, c: float = 0.0) -> Tensor:
        """Return ``a L x + b x + c z``."""

    def recurrence(self, x: Tensor, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        """Return the last ``y_k = a_k L y_{k-1} + b_k y_{k-1} + c_k y_{k-2}``, ``y_{-1} = x``."""

    def to_dense(self) -> Tensor:
        """Return ``[..., n, n]``."""

    def unbatch(self) -> Sequence[SymmetricOperator]:
        """Return the operators of a batch one by one."""


class Eigenpairs(NamedTuple):
    """What a solver returns.

    Attributes:
        evals: ``[..., m]`` ascending.
        evecs: ``[..., n, m]`` orthonormal.
        residuals: ``[..., m]``.
        iterations: products of a block, or steps.
        guards: ``[..., n, p]`` rough eigenvectors beyond the pairs, or None.
        window: interval that the unwanted part of the spectrum was taken to fill, or None.
    """

    evals: Tensor
    evecs: Tensor
    residuals: Tensor
    iterations: int
    guards: Tensor | None = None
    window: tuple[float, float] | None = None


def residual_norms(operator: SymmetricOperator, evals: Tensor, evecs: Tensor) -> Tensor:
    """Norms ``|L v_i - lambda_i v_i|``, ``[..., m]``."""
    rest = torch.addcmul(operator.apply(evecs), evecs, evals.unsqueeze(-2), value=-1)
    norms: Tensor = torch.linalg.vector_norm(rest, dim=-2)
    return norms


def dense_eigenpairs(
    operator: SymmetricOperator, n_pairs: int, known: Tensor, dtype: torch.dtype | None = None
) -> Eigenpairs:
    """The smallest ``n_pairs`` by a dense decomposition, in the complement of ``known`` eigenvectors.

    It is taken in ``dtype``, None for that of the operator. Memory ``n^2`` per graph.
    """
    wide = known.to(dtype or known.dtype)
    matrix = operator.to_dense().to(wide.dtype) + (4 * operator.upper_bound) * product(wide, wide.mT)
    evals, evecs = (part[..., :n_pairs].to(known.dtype).contiguous() for part in batched_eigh(matrix))
    return Eigenpairs(evals, evecs, residual_norms(operator, evals, evecs), 0)
