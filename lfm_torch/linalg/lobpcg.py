"""Locally optimal block preconditioned conjugate gradients (Knyazev 2001), batched.

What makes it robust: an orthonormal trial basis from SVQB instead of a Cholesky factorisation that can fail; guard
vectors; soft locking; and a polynomial preconditioner. With p the Chebyshev filter that damps the spectrum above the
block, the trial direction p(L) x, orthogonalised against x, is q(L) r with q(l) = (p(l) - p(theta)) / (l - theta): the
residual r under a polynomial approximation of the inverse, without ever forming it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.linalg.chebyshev import chebyshev_filter, lanczos_upper_bound
from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator, residual_norms
from lfm_torch.linalg.orthogonalize import orthonormalize, project_out
from lfm_torch.ops.krylov import batched_eigh

_MAX_ITERATIONS = 100
_FILTER_DEGREE = 8
_RANDOM = 4


def lobpcg(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    tol: float,
    known: Tensor,
    start: Tensor | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The smallest eigenpairs in the complement of the known eigenvectors.

    Args:
        operator: Symmetric, on ``[..., n, m]``.
        n_pairs: Number of pairs.
        tol: Residual norm, relative to half the operator's upper bound.
        known: Orthonormal eigenvectors to stay orthogonal to, ``[..., n, c]``, zero columns allowed, c may be 0.
        start: None or vectors to start from, ``[..., n, p]``.
        max_iterations: Iterations before the best pairs so far are returned; None for 100.
        generator: Source of the random start.
    """
    n = operator.shape[-1]
    size = min(n - known.shape[-1], n_pairs + max(8, n_pairs // 4))
    limit = _MAX_ITERATIONS if max_iterations is None else max_iterations
    target = tol * operator.upper_bound / 2
    x = _initial_block(operator, size, known, start, generator)
    high = lanczos_upper_bound(operator, x[..., :4])
    x, theta, norms = _rayleigh_ritz(operator, x)
    direction = x[..., :0]
    for iteration in range(1, limit + 1):
        open_ = (norms[..., :n_pairs] > target).reshape(-1, n_pairs).any(0)
        if not bool(open_.any()):
            return _result(theta, x, norms, n_pairs, iteration - 1, high)
        # soft locking: converged pairs stay in the trial space but get no new direction; guards always do
        active = torch.cat([open_, open_.new_ones(size - n_pairs)]).nonzero().flatten()
        correction = _filtered(operator, x[..., active], theta, high)
        trial, present = orthonormalize(torch.cat([correction, direction], -1), known, x)
        x, direction, theta, norms = _update(operator, x, trial, present, active)
    return _result(theta, x, norms, n_pairs, limit, high)


def _result(theta: Tensor, x: Tensor, norms: Tensor, n_pairs: int, iterations: int, high: float) -> Eigenpairs:
    wanted, guards = x[..., :n_pairs].contiguous(), x[..., n_pairs:].contiguous()
    window = (float(theta[..., -1].max()), high)
    return Eigenpairs(theta[..., :n_pairs], wanted, norms[..., :n_pairs], iterations, guards=guards, window=window)


def _initial_block(
    operator: SymmetricOperator, size: int, known: Tensor, start: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    shape = (*operator.shape[:-1], size)
    x = torch.randn(shape, dtype=known.dtype, device=known.device, generator=generator)
    if start is not None:
        # the last columns stay random: what the start lacks would otherwise never be found
        given = min(max(size - _RANDOM, 0), start.shape[-1])
        x[..., :given] = start[..., :given]
    x, present = orthonormalize(project_out(x, known))
    if not bool(present.all()):  # a start that repeats a direction or a known eigenvector: fill up with noise
        noise = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator) * ~present.unsqueeze(-2)
        x, _ = orthonormalize(project_out(x + project_out(noise, x), known))
    return x


def _filtered(operator: SymmetricOperator, x: Tensor, theta: Tensor, high: float) -> Tensor:
    low, lowest = float(theta[..., -1].max()), float(theta[..., 0].min())
    if not lowest < low < high:  # the block holds a single value, or reaches the end of the spectrum: nothing to damp
        return operator.apply(x.contiguous())
    return chebyshev_filter(operator, x.contiguous(), _FILTER_DEGREE, low, high, lowest)


def _rayleigh_ritz(operator: SymmetricOperator, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    image = operator.apply(x)
    theta, rotation = batched_eigh(_symmetric(product(x.mT, image)).double())
    theta, rotation = theta.to(x.dtype), rotation.to(x.dtype)
    x = product(x, rotation)
    return x, theta, (product(image, rotation) - x * theta.unsqueeze(-2)).norm(dim=-2)


def _update(
    operator: SymmetricOperator, x: Tensor, trial: Tensor, present: Tensor, active: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rayleigh-Ritz over [x, trial]; returns the new block, its conjugate directions, values and residual norms."""
    size = x.shape[-1]
    space = torch.cat([x, trial], -1)
    projected = _symmetric(product(space.mT, operator.apply(space))).double()
    # a zero column would be a Ritz value 0, the smallest of all: push it to the other end
    missing = torch.cat([torch.zeros_like(present[..., :1]).expand(*present.shape[:-1], size), ~present], -1)
    projected = projected + torch.diag_embed(missing.double() * 4 * operator.upper_bound)
    theta, rotation = batched_eigh(projected)
    rotation = rotation[..., :size].to(x.dtype)
    direction = product(trial, rotation[..., size:, :][..., active])
    x = product(space, rotation)
    theta = theta[..., :size].to(x.dtype)
    return x, direction, theta, residual_norms(operator, theta, x)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2
