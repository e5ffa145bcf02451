"""Make a functional map better: by way of points (ZoomOut, ICP), softly (Sinkhorn), or orthogonal."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.maps.correspondence import pointwise_map, spectral_points
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.spectral.basis import Basis

# entries of a soft assignment that sinkhorn_map will hold
_LARGEST_PLAN = 10**8


@outside_autocast
def orthogonalize(fmap: FunctionalMap) -> FunctionalMap:
    """Return the nearest map with orthonormal rows or columns: ``U V^T`` of the singular value decomposition of C."""
    fmap = at_least_single(fmap)
    u, _, vh = torch.linalg.svd(fmap.C, full_matrices=False)
    return replace(fmap, C=u @ vh)


@outside_autocast
def zoomout(
    fmap: FunctionalMap, basis_x: Basis, basis_y: Basis, *, n_basis: int | None = None, step: int = 10
) -> FunctionalMap:
    """Refine a small map by growing it: map -> points -> map with ``step`` more eigenvectors, up to ``n_basis``.

    Each round takes the pointwise map of y into x and projects it, ``C = Phi_y^T Phi_x[idx_yx]``. Without gradient.

    Args:
        fmap: Map to start from, ``C [..., m, m']``, m and m' at most ``n_basis``.
        basis_x: Basis of x with at least ``n_basis`` pairs.
        basis_y: Basis of y with at least ``n_basis`` pairs.
        n_basis: Size of the final map; None for all pairs that both bases have.
        step: Eigenvectors added in a round.

    Returns:
        FunctionalMap with ``C [..., n_basis, n_basis]``.

    Raises:
        ValueError: a size that the bases do not have, or below that of the map.

    Source: Melzi et al. 2019 (arXiv 1904.07865), algorithm 1.
    """
    basis_x, basis_y = at_least_single(basis_x), at_least_single(basis_y)
    largest = min(basis_x.n_basis, basis_y.n_basis)
    n_basis = largest if n_basis is None else n_basis
    start = max(fmap.C.shape[-2:])
    _checks.check_range(
        "n_basis", n_basis, start, largest, f"from the size of the map to what both bases have, {largest}"
    )
    _checks.check_range("step", step, 1, largest, "the size of the bases")
    m = start
    while True:
        m = min(m + step, n_basis)
        fmap = projected_map(pointwise_map(fmap, basis_x, basis_y), basis_x.truncate(m), basis_y.truncate(m))
        if m == n_basis:
            return fmap


@outside_autocast
def icp(
    fmap: FunctionalMap, basis_x: Basis, basis_y: Basis, *, max_iterations: int = 50, tol: float = 1e-6
) -> FunctionalMap:
    """Refine a map at its own size: nearest neighbours in the coefficients, then the best orthogonal map, in turns.

    Without gradient. ``fmap.iterations`` tells the rounds it took, ``fmap.residual`` the last change of the map.

    Args:
        fmap: Map to start from, ``C [..., m_y, m_x]``.
        basis_x: Basis of x.
        basis_y: Basis of y.
        max_iterations: Rounds at most.
        tol: Change of the map, relative to its norm, at which to stop.

    Raises:
        ValueError: bases that do not fit the map.

    Source: Ovsjanikov et al. 2012, section 6.2.
    """
    m_y, m_x = fmap.C.shape[-2:]
    basis_x, basis_y = at_least_single(basis_x.truncate(m_x)), at_least_single(basis_y.truncate(m_y))
    change, used = math.inf, 0
    while used < max_iterations and change > tol:
        used += 1
        new = orthogonalize(projected_map(pointwise_map(fmap, basis_x, basis_y), basis_x, basis_y))
        change = float(((new.C - fmap.C).norm(dim=(-2, -1)) / new.C.norm(dim=(-2, -1))).max())
        fmap = new
    return replace(fmap, iterations=used, residual=change)


@outside_autocast
def projected_map(idx_yx: Tensor, basis_x: Basis, basis_y: Basis) -> FunctionalMap:
    """The functional map of a map between rows: ``Phi_y^T Phi_x[idx_yx]``, ``[..., m_y, m_x]``."""
    rows = idx_yx.unsqueeze(-1).expand(*idx_yx.shape, basis_x.n_basis)
    pulled = basis_x.evecs.gather(-2, rows)
    # rows of eigenvectors scale with 1 / sqrt(n)
    scale = (basis_x.n / basis_y.n) ** 0.5
    C = scale * matmul(basis_y.evecs.mT, pulled)
    return FunctionalMap(C, basis_x.evals, basis_y.evals, n_samples=max(basis_x.n, basis_y.n))


@outside_autocast
def sinkhorn_map(
    fmap: FunctionalMap, basis_x: Basis, basis_y: Basis, *, temperature: float = 0.05, iterations: int = 50
) -> tuple[FunctionalMap, Tensor]:
    """Refine a map through a soft assignment between the rows: differentiable, unlike nearest neighbours.

    The scores ``-|Phi_y[j] - C Phi_x[i]|^2 / temperature``, distances relative to their mean, are scaled to uniform
    marginals in the log domain; the map is projected with the plan in place of the pointwise map.

    Args:
        fmap: Map ``C [..., m_y, m_x]``.
        basis_x: Basis of x.
        basis_y: Basis of y.
        temperature: Softness, relative to the mean squared distance.
        iterations: Sinkhorn sweeps.

    Returns:
        The refined map, and the plan ``[..., n_y, n_x]``, rows summing to 1.

    Raises:
        ValueError: a temperature that is not positive, more than 1e8 entries in the plan.

    Source: Cuturi 2013 (arXiv 1306.0895); soft maps in refinement: Pai et al. 2021 (arXiv 2103.13296), section 4.2.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if basis_x.n * basis_y.n > _LARGEST_PLAN:
        raise ValueError(f"n_x n_y must be at most {_LARGEST_PLAN:.0e} for a soft map, got {basis_x.n} x {basis_y.n}")
    m_y, m_x = fmap.C.shape[-2:]
    points_x, points_y = spectral_points(fmap, basis_x, basis_y)
    squares = points_y.square().sum(-1).unsqueeze(-1) + points_x.square().sum(-1).unsqueeze(-2)
    distance = (squares - 2 * matmul(points_y, points_x.mT)).clamp_min(0)
    scores = -distance / (temperature * distance.detach().mean((-2, -1), keepdim=True))
    plan = log_sinkhorn(scores, iterations).exp()
    basis_x, basis_y = at_least_single(basis_x.truncate(m_x)), at_least_single(basis_y.truncate(m_y))
    scale = (basis_x.n / basis_y.n) ** 0.5
    C = scale * matmul(basis_y.evecs.mT, matmul(plan, basis_x.evecs))
    return FunctionalMap(C, basis_x.evals, basis_y.evals, n_samples=max(basis_x.n, basis_y.n)), plan


def log_sinkhorn(scores: Tensor, iterations: int) -> Tensor:
    """Add potentials to ``scores [..., n, m]`` so that exp has rows summing to 1 and columns to n / m, ever closer.

    The rows are exact, the columns as close as ``iterations`` sweeps bring them.
    """
    n, m = scores.shape[-2:]
    on_columns = math.log(n / m)
    column = scores.new_zeros(*scores.shape[:-2], 1, m)
    for _ in range(iterations):
        row = torch.logsumexp(scores + column, -1, keepdim=True)
        column = on_columns - torch.logsumexp(scores - row, -2, keepdim=True)
    return torch.log_softmax(scores + column, -1)
