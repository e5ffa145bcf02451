r"""Derivatives of part of an eigendecomposition, by the implicit function theorem.

With ``L phi_i = lambda_i phi_i`` and Phi the computed pairs,

    d lambda_i = phi_i^T dL phi_i
    d phi_i    = sum_{j != i} phi_j (phi_j^T dL phi_i) / (lambda_i - lambda_j)
                 + (lambda_i - L)^+ (I - Phi Phi^T) dL phi_i

so that the gradient of a loss in ``dL Phi`` is ``Y = Phi K + Z``: K in closed form from the pairs at hand, Z from one
projected linear system a column. The gradient in the weights is then that of ``sum Y * (L Phi)`` with Phi held fixed,
which the Laplacian product's own backward knows.

Repeated eigenvalues. K needs ``(M_ji - M_ij) / (lambda_i - lambda_j)`` with ``M = Phi^T dloss/dPhi``. A loss that does
not depend on the rotation inside a repeated eigenvalue makes the numerator vanish with the gap, and the quotient is the
slope of the spectral function the loss applies (-t exp(-t lambda) for a heat kernel). To have it, eigenvalues nearer
than ``delta`` are handed out ``delta`` apart (see :func:`separate`). A loss that does depend on the rotation has no
derivative there: the pair's term is faded out instead of divided by (nearly) zero.

Source: Magnus 1985 (Econometric Theory 1), theorem 1; for the projector and a repeated eigenvalue Kato 1995, II.2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lfm_torch._precision import outside_autocast, product
from lfm_torch._warnings import warn
from lfm_torch.linalg.conjugate_gradients import deflated_cg
from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator


def default_delta(dtype: torch.dtype) -> float:
    """Eigenvalues nearer than this (relative to half the operator's bound) count as repeated."""
    return 1e-9 if dtype == torch.float64 else 1e-5


def separate(evals: Tensor, delta: float) -> Tensor:
    """Move ascending ``evals [..., m]`` up where needed, so that neighbours are at least ``delta`` apart."""
    steps = delta * torch.arange(evals.shape[-1], dtype=torch.float64, device=evals.device)
    return ((evals.double() - steps).cummax(-1).values + steps).to(evals.dtype)


def differentiable_eigenpairs(
    operator: SymmetricOperator, pairs: Eigenpairs, n_pairs: int, known: Tensor
) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors with a derivative in whatever the operator's product is differentiable in.

    Args:
        operator: Its ``apply`` is differentiable in its parameters.
        pairs: Computed pairs, ascending, more than ``n_pairs`` if possible: with the ones beyond, the linear systems
            are better conditioned. Entries above the operator's bound are padding.
        n_pairs: Number of pairs wanted.
        known: Orthonormal (or zero) eigenvectors of eigenvalue 0, apart from the pairs, ``[..., n, c]``.

    Returns:
        ``evals [..., n_pairs]``, no two nearer than ``delta``, and ``evecs [..., n, n_pairs]``. Twice differentiable
        they are not.
    """
    delta = default_delta(known.dtype) * operator.upper_bound / 2
    evecs = pairs.evecs[..., :n_pairs].detach().contiguous()
    image = operator.apply(evecs)
    evals = separate(pairs.evals[..., :n_pairs].detach(), delta)
    outputs: tuple[Tensor, Tensor] = _Implicit.apply(image, evals, evecs, operator, pairs, known.detach(), delta)  # type: ignore[no-untyped-call]
    return outputs


class _Implicit(torch.autograd.Function):
    """Eigenpairs as a function of ``image = L Phi`` with Phi held fixed."""

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        evals: Tensor,
        evecs: Tensor,
        operator: SymmetricOperator,
        pairs: Eigenpairs,
        known: Tensor,
        delta: float,
    ) -> tuple[Tensor, Tensor]:
        ctx.operator, ctx.pairs, ctx.known, ctx.delta = operator, pairs, known, delta
        ctx.save_for_backward(evals)
        return evals.clone(), evecs.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (evals,) = ctx.saved_tensors
        return _adjoint(ctx.operator, ctx.pairs, evals, ctx.known, ctx.delta, *grads), *[None] * 6


def _adjoint(
    operator: SymmetricOperator,
    pairs: Eigenpairs,
    evals: Tensor,
    known: Tensor,
    delta: float,
    g_evals: Tensor,
    g_evecs: Tensor,
) -> Tensor:
    """The gradient Y in ``L Phi``."""
    n, m = g_evecs.shape[-2:]
    space, theta = pairs.evecs, pairs.evals.double()
    valid = theta <= 1.5 * operator.upper_bound
    inner = product(space.mT, g_evecs).double()
    inside = _inside(inner[..., :m, :], theta[..., :m], evals.double(), delta)
    inside = inside + torch.diag_embed(g_evals.double())
    # towards the computed pairs beyond the basis; a cut through a repeated eigenvalue has no derivative across it
    gap = theta[..., :m].unsqueeze(-2) - theta[..., m:].unsqueeze(-1)
    beyond = inner[..., m:, :] * _reciprocal(gap, delta) * valid[..., m:].unsqueeze(-1)
    adjoint = product(space, torch.cat([inside, beyond], -2).to(space.dtype))
    # d L times a null vector is as small as the eigenvalue it is divided by: nothing to regularise
    smallest = torch.finfo(known.dtype).eps * operator.upper_bound
    along = product(known.mT, g_evecs) / theta[..., :m].clamp_min(smallest).unsqueeze(-2).to(known.dtype)
    adjoint = adjoint + product(known, along)
    if space.shape[-1] + known.shape[-1] >= n:
        return adjoint
    tol = 1e-10 if evals.dtype == torch.float64 else 1e-5
    shift = theta[..., :m].to(known.dtype)
    outside, residuals = deflated_cg(operator, shift, -g_evecs, torch.cat([known, space], -1), tol=tol)
    if bool((residuals > 10 * tol).any()):
        warn(
            f"derivative of spectral_basis: {int((residuals > 10 * tol).sum())} of {residuals.numel()} linear systems "
            f"did not reach {tol:g}; largest relative residual {float(residuals.max()):.2g} (the basis is cut inside a "
            "cluster of eigenvalues)",
        )
    return adjoint + outside


def _inside(inner: Tensor, theta: Tensor, evals: Tensor, delta: float) -> Tensor:
    """Coupling of the basis' own pairs: ``(M_ji - M_ij) / (2 (lambda_i - lambda_j))``, 0 on the diagonal."""
    numerator = (inner - inner.mT) / 2
    gap = evals.unsqueeze(-2) - evals.unsqueeze(-1)
    repeated = (theta.unsqueeze(-2) - theta.unsqueeze(-1)).abs() < delta
    coupling = numerator / torch.where(gap == 0, 1.0, gap)
    # a numerator that does not vanish with the gap: the loss turns with the basis, and has no derivative
    scale = inner.abs().amax((-2, -1), keepdim=True) * delta**0.5
    faded = 1 / (1 + (numerator / torch.where(scale > 0, scale, 1.0)).square())
    return torch.where(repeated, coupling * faded, coupling)


def _reciprocal(gap: Tensor, delta: float) -> Tensor:
    apart = gap.abs() >= delta
    return apart / torch.where(apart, gap, 1.0)
