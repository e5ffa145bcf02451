"""Conjugate gradients for shifted systems in the complement of a computed invariant subspace, batched."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch.linalg.eigenpairs import SymmetricOperator
from lfm_torch.linalg.orthogonalize import project_once, project_out

_CHECK_EVERY = 8


def deflated_cg(
    operator: SymmetricOperator,
    shift: Tensor,
    right: Tensor,
    basis: Tensor,
    *,
    tol: float,
    max_iterations: int = 2000,
) -> tuple[Tensor, Tensor]:
    """Solve ``(L - shift_i) z_i = r_i`` with ``z_i`` and ``r_i`` orthogonal to ``basis``, each column for itself.

    The operator must be positive there: the basis holds every eigenvector with an eigenvalue up to the largest shift.

    Args:
        operator: Symmetric, on ``[..., n, m]``.
        shift: ``[..., m]``.
        right: ``[..., n, m]``; what it has inside the basis is ignored.
        basis: Orthonormal (or zero) columns that span an invariant subspace, ``[..., n, p]``.
        tol: Residual norm relative to that of ``right``.
        max_iterations: Steps before the best solution so far is returned.

    Returns:
        The solution and its relative residual norms ``[..., m]`` (0 for a column that is 0).
    """
    residual = project_out(right, basis)
    solution, direction = torch.zeros_like(residual), residual
    energy = residual.square().sum(-2, keepdim=True)
    target = tol * tol * energy
    start = energy
    for iteration in range(max_iterations):
        if iteration % _CHECK_EVERY == 0 and bool((energy <= target).all()):
            break
        image = operator.apply(direction.contiguous()) - shift.unsqueeze(-2) * direction
        # rounding would let the lower part of the spectrum, where the operator is negative, grow back
        image = project_once(image, basis)
        curvature = (direction * image).sum(-2, keepdim=True)
        moving = (energy > target) & (curvature > 0)
        step = torch.where(moving, energy, 0.0) / torch.where(moving, curvature, 1.0)
        solution = solution + step * direction
        residual = residual - step * image
        before, energy = energy, residual.square().sum(-2, keepdim=True)
        direction = residual + (energy / torch.where(before > 0, before, 1.0)) * direction
    relative = (energy / torch.where(start > 0, start, 1.0)).sqrt().squeeze(-2)
    return project_out(solution, basis), relative
