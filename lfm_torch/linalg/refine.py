"""A warm start: eigenpairs of an operator that differs little from one whose eigenvectors are known."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.linalg.chebyshev import Window, chebyshev_polynomial
from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator
from lfm_torch.linalg.orthogonalize import orthonormalize, project_once, project_out
from lfm_torch.linalg.rayleigh_ritz import rayleigh_ritz

_ROUNDS = 4
_DIRECTIONS = 16
# random direction added to every vector, in units of the tolerance: an eigenvector far below the last pair that the
# start lacks is then raised until it shows in the residuals, where a start that lacks nothing gets less than it may
_NOISE = 30.0
# how far a filter brings down the bulk of the spectrum against the last pair, as a power of e, for a tolerance of 1e-5
_DAMPING = 8.0


def refine(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    tol: float,
    known: Tensor,
    start: Tensor,
    window: Window,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """Improve approximate eigenvectors ``start [..., n, p]``, p at least ``n_pairs``, until the residuals are ``tol``.

    What a small change of the operator mixes into an eigenvector lies mostly in the bulk of the spectrum: one Chebyshev
    filter removes it. What is left lies in the few eigenvectors just beyond the pairs, so the residuals of all pairs
    have a low rank: their leading directions, filtered, complete the space. The vectors given beyond the pairs
    (guards) leave the less of it the more there are.

    Returns:
        Pairs that may not have converged after a few rounds: take them as the start of :func:`krylov` then. Residuals
        are infinite where the spectrum reaches beyond the window.
    """
    target = tol * operator.upper_bound / 2
    size, degrees = start.shape[-1], _degrees(window, _DAMPING + math.log(1e-5 / tol))
    noise = torch.randn(*start.shape[:-1], 1, dtype=start.dtype, device=start.device, generator=generator)
    mixed = start + (_NOISE * tol / start.shape[-2] ** 0.5) * noise
    filtered = _filter(operator, project_once(mixed, known), degrees, window)
    filtered = project_once(filtered, known)
    theta, x, image = rayleigh_ritz(filtered, operator.apply(filtered), size)
    # the filter raises what lies beyond the window, instead of the lower end
    outside = theta[..., -1:] > window.high
    iterations, worst = sum(degrees) + 1, math.inf
    for round_ in range(_ROUNDS + 1):
        rest = torch.addcmul(image, x, theta.unsqueeze(-2), value=-1)
        residuals = torch.where(outside, torch.inf, torch.linalg.vector_norm(rest[..., :n_pairs], dim=-2))
        before, worst = worst, float(residuals.max())
        # not on the way to the tolerance in the rounds that are left
        hopeless = not worst < max(target, target * 8.0 ** (_ROUNDS - round_)) or worst > 0.7 * before
        if worst <= target or hopeless:
            break
        directions = project_once(_leading(rest[..., :n_pairs]), torch.cat([known, x], -1))
        directions = torch.cat([directions, _filter(operator, directions, degrees[:1], window)], -1)
        directions, _ = orthonormalize(project_out(directions, torch.cat([known, x], -1)))
        pushed = operator.apply(directions)
        theta, x, image = rayleigh_ritz(torch.cat([x, directions], -1), torch.cat([image, pushed], -1), size)
        iterations += degrees[0] + 1
    return Eigenpairs(
        theta[..., :n_pairs],
        x[..., :n_pairs].contiguous(),
        residuals,
        iterations,
        guards=x[..., n_pairs:].contiguous(),
        window=(window.cut, window.high),
    )


def _degrees(window: Window, damping: float) -> list[int]:
    """Odd degrees of the filters to apply one after the other, orthonormalised in between.

    One alone would let the first pairs, far from the bulk, drown the last ones.
    """
    growth = math.acosh(max(window.place(window.wanted), 1.02))
    spread = math.acosh(max(window.place(window.low), 1.02)) - growth
    degree = _odd(min(41.0, max(1.0, damping / growth)))
    at_once = min(21, degree)
    if spread > 0:
        at_once = min(at_once, _odd(max(1.0, math.log(100) / spread - 1)))
    return [at_once] * math.ceil(degree / at_once)


def _odd(value: float) -> int:
    return 2 * max(0, round((value - 1) / 2)) + 1


def _filter(operator: SymmetricOperator, block: Tensor, degrees: list[int], window: Window) -> Tensor:
    for index, degree in enumerate(degrees):
        if index:
            block, _ = orthonormalize(block)
        block = chebyshev_polynomial(operator, block.contiguous(), degree, window)
    return block


def _leading(rest: Tensor) -> Tensor:
    """The directions that hold most of the columns, orthonormal up to rounding (zero where there are none)."""
    evals, evecs = torch.linalg.eigh(product(rest.mT, rest).double())
    evals, evecs = evals[..., -_DIRECTIONS:], evecs[..., -_DIRECTIONS:]
    present = evals > 1e-10 * evals[..., -1:]
    inverse_root = torch.where(present, evals, 1.0).rsqrt() * present
    return product(rest, (evecs * inverse_root.unsqueeze(-2)).to(rest.dtype))
