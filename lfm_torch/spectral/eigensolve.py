"""The low eigenpairs of a Laplacian: the known null space, a solver for the rest, and derivatives."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lfm_torch._precision import outside_autocast, product
from lfm_torch._warnings import warn
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.linalg import differentiable_eigenpairs, smallest_eigenpairs
from lfm_torch.linalg.chebyshev import Window
from lfm_torch.linalg.eigenpairs import Eigenpairs
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.null_space import constant_first, only_null_space, with_null_space

Solver = Literal["auto", "lobpcg", "krylov", "dense"]


# not one that data is likely to be drawn with: a start that is the data itself misleads the survey of the spectrum
_SEED = 0x5EED_BA515


SOLVERS = ("auto", "lobpcg", "krylov", "dense")


@outside_autocast
def solve_basis(
    laplacian: Laplacian,
    n_basis: int,
    solver: Solver,
    tol: float,
    max_iterations: int | None,
    warm_start: Basis | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """Compute what :func:`spectral_basis` has checked, of a Laplacian whose values are there."""
    pairs, converged, used = _solve(laplacian, n_basis, solver, tol, max_iterations, warm_start, generator)
    if not bool(converged.all()):
        warn(
            f"spectral_basis: {int((~converged).sum())} of {converged.numel()} eigenpairs did not reach "
            f"tol={tol:g} in {pairs.iterations} iterations of {used}; largest residual "
            f"{float(pairs.residuals.max()):.2g}, largest entry of V^T V - I {_lack(pairs.evecs):.2g}",
        )
    evecs, components = _fix_signs(pairs.evecs), laplacian.graph.n_components
    how = (pairs.iterations, used, pairs.guards, pairs.window)
    return Basis(pairs.evals, evecs, pairs.residuals, converged, components, *how)


def _solve(
    laplacian: Laplacian,
    n_basis: int,
    solver: Solver,
    tol: float,
    max_iterations: int | None,
    warm_start: Basis | None,
    generator: torch.Generator | None,
) -> tuple[Eigenpairs, Tensor, str]:
    chosen = _choose_solver(laplacian, n_basis) if solver == "auto" else solver
    known = laplacian.null_space(n_basis)
    missing = n_basis - int(laplacian.graph.n_components.min())
    if missing <= 0:
        return *only_null_space(laplacian, constant_first(laplacian, known), tol), chosen
    differentiable = torch.is_grad_enabled() and laplacian.graph.weight.requires_grad
    with torch.no_grad():
        found = missing + _guards(laplacian, missing, chosen) if differentiable else missing
        start = None if warm_start is None or chosen == "dense" else _start_vectors(warm_start, known)
        if generator is None:
            generator = torch.Generator(known.device).manual_seed(_SEED)
        rest, converged, used = smallest_eigenpairs(
            laplacian,
            found,
            solver=chosen,
            tol=tol,
            known=known,
            needed=(n_basis - laplacian.graph.n_components).clamp_min(0),
            start=start,
            window=_window(warm_start, start, found) if warm_start is not None and solver != "lobpcg" else None,
            max_iterations=max_iterations,
            generator=generator,
        )
    if differentiable:
        evals, evecs = differentiable_eigenpairs(laplacian, rest, missing, known)
        spare = rest.evecs[..., missing:] if chosen != "dense" else None
        guards = spare if spare is None or rest.guards is None else torch.cat([spare, rest.guards], -1)
        rest = rest._replace(evals=evals, evecs=evecs, residuals=rest.residuals[..., :missing], guards=guards)
    return *with_null_space(laplacian, known, rest, converged[..., :missing], n_basis, tol), used


def _start_vectors(warm_start: Basis, known: Tensor) -> Tensor:
    """What a former basis offers to start from: its vectors of eigenvalues above 0, and its guards."""
    null = min(int(warm_start.n_components.min()), known.shape[-1])
    vectors = warm_start.evecs[..., null:]
    return (vectors if warm_start.guards is None else torch.cat([vectors, warm_start.guards], -1)).to(known)


def _window(warm_start: Basis, start: Tensor | None, found: int) -> Window | None:
    """The spectrum that a former basis belongs to; None where the basis holds too little to be refined."""
    positive = warm_start.evals[warm_start.evals > 0]
    if warm_start.window is None or start is None or start.shape[-1] < found or positive.numel() == 0:
        return None
    return Window(float(positive.min()), float(positive.max()), *warm_start.window)


def _guards(laplacian: Laplacian, missing: int, solver: str) -> int:
    """Pairs to compute beyond the basis where derivatives are wanted: they make the linear systems easy.

    The dense solver has them all at no cost, and nothing is left to solve.
    """
    room = laplacian.graph.n_nodes - int(laplacian.graph.n_components.min()) - missing
    return room if solver == "dense" else min(room, max(8, missing // 4))


def _choose_solver(laplacian: Laplacian, n_basis: int) -> str:
    n = laplacian.graph.n_nodes
    if n <= 512 or 4 * n_basis > n:
        return "dense"
    return "lobpcg" if laplacian.graph.weight.is_cuda else "krylov"


def _lack(evecs: Tensor) -> float:
    """Largest entry of ``V^T V - I``."""
    gram = product(evecs.detach().mT, evecs.detach())
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())


def _fix_signs(evecs: Tensor) -> Tensor:
    """Make the entry of largest magnitude of every eigenvector positive."""
    largest = evecs.detach().gather(-2, evecs.detach().abs().argmax(-2, keepdim=True))
    return evecs * (1 - 2 * (largest < 0).to(evecs.dtype))
