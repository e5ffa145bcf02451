"""The map of two bases solved from functions that should correspond, and the terms that keep it near an isometry."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch._warnings import warn
from lfm_torch.maps.energy import MapEnergy
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.maps.minimizer import attach_gradient, minimize
from lfm_torch.spectral.basis import Basis

# numbers of products of eigenvectors held at a time: 1 MiB of float64
_PRODUCTS = 1 << 17


@outside_autocast
def functional_map(
    basis_x: Basis,
    basis_y: Basis,
    f_x: ArrayLike,
    f_y: ArrayLike,
    *,
    laplacian_weight: float | Tensor = 1e-2,
    commutativity_weight: float | Tensor = 0.0,
    orthogonality_weight: float | Tensor = 0.0,
    ridge: float = 1e-6,
    tol: float | None = None,
    max_iterations: int = 500,
) -> FunctionalMap:
    r"""Solve for the map between two bases from descriptors that should correspond.

    With ``A = Phi_x^T f_x``, ``B = Phi_y^T f_y``, columns of the descriptors scaled to norm 1, eigenvalues a of x and b
    of y, and multiplication operators ``S_k = Phi^T diag(sqrt(n) f_k) Phi``, ``C`` minimises

        1/p |C A - B|^2  +  laplacian_weight / m_x  sum_ij w_ij C_ij^2,  w_ij = (b_i - a_j)^2 scaled to mean 1
        +  commutativity_weight / (m_x p)  sum_k |S_k^y C - C S_k^x|^2
        +  orthogonality_weight / m_x  |C^T C - I|^2  +  ridge / m_x |C|^2.

    Without the commutativity and orthogonality terms each row of C is a linear system of its own, solved exactly. With
    commutativity, conjugate gradients preconditioned by these systems; with orthogonality, a local minimum by Newton
    steps from there. No array has ``(m_x m_y)^2`` entries. Batched over pairs, and differentiable in descriptors, bases
    and weights by the implicit function theorem.

    How to choose the weights: :func:`lfm_torch.alignment.choose_weights` leaves anchors out.

    Args:
        basis_x: Basis of x, ``evecs [..., n_x, m_x]``.
        basis_y: Basis of y, ``evecs [..., n_y, m_y]``.
        f_x: Descriptors ``[..., n_x, p]``, see :mod:`lfm_torch.descriptors`.
        f_y: The corresponding descriptors ``[..., n_y, p]``.
        laplacian_weight: How much the map should commute with the Laplacians; a number or a tensor ``[...]``.
        commutativity_weight: How much it should commute with multiplication by the descriptors.
        orthogonality_weight: How orthogonal it should be.
        ridge: Keeps the system regular where few descriptors determine it; reported as ``fmap.ridge``.
        tol: Relative gradient norm asked for; None for 1e-5 in float32 and 1e-10 in float64.
        max_iterations: Conjugate gradient steps before the solver gives up with a warning.

    Returns:
        FunctionalMap with ``C [..., m_y, m_x]``, ``ridge``, ``iterations`` and ``residual``.

    Raises:
        TypeError: descriptors that are not floating point, or of another dtype than the bases.
        ValueError: shapes that do not fit, negative weights, a descriptor that is zero, values that are not finite.

    Warns:
        LFMWarning: the solver did not reach ``tol``, with the residual.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> basis = lfm.spectral_basis(lfm.build_graph(torch.randn(40, 3), n_neighbors=8), n_basis=6)
        >>> f = torch.randn(40, 10)
        >>> fmap = lfm.functional_map(basis, basis, f, f)
        >>> torch.allclose(fmap.C, torch.eye(6), atol=1e-3)
        True

    Source: Ovsjanikov et al. 2012, equation 7; commutativity: Nogneng & Ovsjanikov 2017, equation 5; Fumero et al. 2024
    (arXiv 2406.14183), equation 2.
    """
    basis_x, basis_y = at_least_single(basis_x), at_least_single(basis_y)
    f_x, f_y = (_checked(*given) for given in (("f_x", f_x, basis_x), ("f_y", f_y, basis_y)))
    if f_x.shape[-1] != f_y.shape[-1]:
        raise ValueError(f"f_y must have the {f_x.shape[-1]} descriptors of f_x, got {f_y.shape[-1]}")
    _checks.check_same_device_dtype("f_x", f_x, "f_y", f_y)
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    m_x, p = basis_x.n_basis, f_x.shape[-1]
    given = {"laplacian_weight": laplacian_weight, "commutativity_weight": commutativity_weight}
    given["orthogonality_weight"] = orthogonality_weight
    laplacian, commutativity, orthogonality = (_weight(name, value, f_x) for name, value in given.items())
    penalty = laplacian[..., None, None] * laplacian_mask(basis_x.evals, basis_y.evals) + ridge
    commutes = bool((commutativity != 0).any()) or commutativity.requires_grad
    energy = MapEnergy(
        basis_x.project(f_x),
        basis_y.project(f_y),
        penalty / m_x,
        multiplication_operators(basis_x, f_x) if commutes else None,
        multiplication_operators(basis_y, f_y) if commutes else None,
        commutativity / (m_x * p),
        orthogonality / m_x,
    )
    tol = (1e-10 if f_x.dtype == torch.float64 else 1e-5) if tol is None else tol
    with torch.no_grad():
        solution = minimize(energy.detach(), tol=tol, max_iterations=max_iterations)
    residual = float(solution.residual.max())
    # a solve without iterations is as good as its factorisation, whatever the ridge
    if not residual <= tol and solution.iterations:
        warn(
            f"functional_map: the relative gradient norm is {residual:.2g} after {solution.iterations} conjugate "
            f"gradient steps, not below tol={tol:g}; a larger ridge or max_iterations helps",
        )
    C = attach_gradient(energy, solution, tol=tol, max_iterations=max_iterations)
    n_samples = max(basis_x.n, basis_y.n)
    return FunctionalMap(C, basis_x.evals, basis_y.evals, ridge, solution.iterations, residual, n_samples)


@outside_autocast
def laplacian_mask(evals_x: Tensor, evals_y: Tensor) -> Tensor:
    """``(b_i - a_j)^2`` scaled to mean 1, ``[..., m_y, m_x]``: what an entry of C costs that mixes frequencies."""
    mask = (evals_y.unsqueeze(-1) - evals_x.unsqueeze(-2)).square()
    mean = mask.mean((-2, -1), keepdim=True)
    return mask / torch.where(mean > 0, mean, 1.0)


@outside_autocast
def multiplication_operators(basis: Basis, f: Tensor) -> Tensor:
    """``Phi^T diag(sqrt(n) f_k) Phi`` for every column of ``f [..., n, p]``: ``[..., p, m, m]``."""
    m, p = basis.n_basis, f.shape[-1]
    batch = (f[..., :1, :1] * basis.evecs[..., :1, :1]).shape[:-2]
    products = f.new_zeros(*batch, p, m * m)
    # phi_i phi_j of a few samples at a time: in the cache while it is multiplied, and no smaller than the sums
    rows = max(p, _PRODUCTS // (m * m))
    for phi, part in zip(torch.split(basis.evecs, rows, -2), torch.split(f, rows, -2), strict=True):
        products += part.mT @ (phi.unsqueeze(-1) * phi.unsqueeze(-2)).flatten(-2)
    operators: Tensor = (f.shape[-2] ** 0.5 * products).view(*batch, p, m, m)
    return operators


def _checked(name: str, f: ArrayLike, basis: Basis) -> Tensor:
    """Descriptors with columns of norm 1, after checking them against their basis."""
    f = at_least_single(_checks.check_points(name, f))
    if f.shape[-2] != basis.n:
        raise ValueError(f"{name} must have the {basis.n} rows of its basis, got shape {list(f.shape)}")
    if f.dtype != basis.evecs.dtype:
        raise TypeError(f"{name} must have the dtype of its basis, {basis.evecs.dtype}, got {f.dtype}")
    norms: Tensor = torch.linalg.vector_norm(f, dim=-2, keepdim=True)
    if bool((norms == 0).any()):
        column = (norms == 0).nonzero()[0, -1].item()
        raise ValueError(f"{name} must have no zero descriptor, got one in column {column}")
    return f / norms


def _weight(name: str, value: float | Tensor, like: Tensor) -> Tensor:
    weight = value.to(like) if isinstance(value, Tensor) else like.new_tensor(value)
    if not bool(((weight >= 0) & weight.isfinite()).all()):
        raise ValueError(f"{name} must be finite and not negative, got {weight.tolist()}")
    return weight
