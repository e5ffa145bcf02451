"""Eigenpairs that are what they say: each solver's answer is checked, repaired, and handed to the next where it fails.

A pair has converged where its residual is within the tolerance and its vector is a unit vector orthogonal to the others
and to the known ones. A small residual alone says nothing of that: a vector that is found twice has two of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lfm_torch._precision import product
from lfm_torch.linalg.chebyshev import Window
from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator, dense_eigenpairs
from lfm_torch.linalg.krylov import krylov
from lfm_torch.linalg.lobpcg import lobpcg
from lfm_torch.linalg.orthogonalize import orthonormalize
from lfm_torch.linalg.rayleigh_ritz import rayleigh_ritz
from lfm_torch.linalg.refine import refine

# each is followed by those that take over where it fails
_SOLVERS = ("lobpcg", "krylov", "dense", "dense in float64")
# the largest graph that is handed on to a dense decomposition: 128 MiB a matrix in float64
_DENSE_AT_MOST = 4096


def smallest_eigenpairs(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    solver: str,
    tol: float,
    known: Tensor,
    needed: Tensor,
    start: Tensor | None = None,
    window: Window | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Eigenpairs, Tensor, str]:
    """The smallest eigenpairs in the complement of the known eigenvectors, checked.

    Args:
        operator: Symmetric, on ``[..., n, m]``.
        n_pairs: Number of pairs.
        solver: "lobpcg", "krylov" or "dense"; a graph for which it fails is handed to the next of them.
        tol: Residual norm, relative to half the operator's upper bound; also what the vectors may lack of being
            orthonormal, as far as the dtype tells it from rounding.
        known: Orthonormal eigenvectors to stay orthogonal to, ``[..., n, c]``, zero columns allowed, c may be 0.
        needed: How many of the pairs are asked for, ``[...]``; those after them count as converged.
        start: None or vectors to start from, ``[..., n, p]``.
        window: The spectrum that the start belongs to, for :func:`refine` to have a try at it; or None.
        max_iterations: A limit for the iterations of the solver, under which nothing is handed on; None for its own.
        generator: Source of the random start.

    Returns:
        The pairs, which of them have converged ``[..., n_pairs]``, and the solver they come from ("krylov, dense" where
        some are of the second).
    """
    problem = _Problem(operator, n_pairs, tol, known, needed)
    if start is not None and window is not None:
        found = problem.tried(partial(refine, tol=tol, start=start, window=window, generator=generator))
        if found.all_converged:
            return *found, "refine"
    found = problem.attempt(_method(solver, tol, generator, start, max_iterations))
    following = _SOLVERS[_SOLVERS.index(solver) + 1 :]
    if operator.shape[-1] > _DENSE_AT_MOST and solver != "dense":
        following = tuple(name for name in following if not name.startswith("dense"))
    if found.all_converged or max_iterations is not None or not following:
        return *found, solver
    used, results = [solver], []
    for part, result in zip(problem.unbatch(), found.unbatch(), strict=True):
        for name in following:
            if result.all_converged:
                break
            result = result.better(part.attempt(_method(name, tol, generator)))
            used.append(name.split()[0])
        results.append(result)
    return *_Checked.batch(results, known.shape[:-2]), ", ".join(dict.fromkeys(used))


def _method(
    solver: str,
    tol: float,
    generator: torch.Generator | None,
    start: Tensor | None = None,
    max_iterations: int | None = None,
) -> Callable[..., Eigenpairs]:
    if solver.startswith("dense"):
        return partial(dense_eigenpairs, dtype=torch.float64 if solver.endswith("float64") else None)
    method: Callable[..., Eigenpairs] = lobpcg if solver == "lobpcg" else krylov
    return partial(method, tol=tol, start=start, max_iterations=max_iterations, generator=generator)


class _Checked(NamedTuple):
    """Pairs, and which of them have converged, ``[..., m]``."""

    pairs: Eigenpairs
    converged: Tensor

    @property
    def all_converged(self) -> bool:
        return bool(self.converged.all())

    def better(self, other: _Checked) -> _Checked:
        """Of each graph these pairs or the others, whichever have more of them converged; the iterations of both."""
        more = (other.converged.sum(-1) > self.converged.sum(-1)).unsqueeze(-1)
        evals, residuals, converged = (
            torch.where(more, theirs, ours)
            for ours, theirs in (
                (self.pairs.evals, other.pairs.evals),
                (self.pairs.residuals, other.pairs.residuals),
                (self.converged, other.converged),
            )
        )
        evecs = torch.where(more.unsqueeze(-1), other.pairs.evecs, self.pairs.evecs)
        iterations = self.pairs.iterations + other.pairs.iterations
        return _Checked(Eigenpairs(evals, evecs, residuals, iterations, window=self.pairs.window), converged)

    def unbatch(self) -> list[_Checked]:
        """The results of the graphs one by one, without guards."""
        pairs, batch = self.pairs, self.converged.shape[:-1]
        parts = (pairs.evals, pairs.evecs, pairs.residuals, self.converged)
        flat = zip(*(part.reshape(batch.numel(), *part.shape[len(batch) :]).unbind() for part in parts), strict=True)
        return [
            _Checked(Eigenpairs(evals, evecs, residuals, pairs.iterations, window=pairs.window), converged)
            for evals, evecs, residuals, converged in flat
        ]

    @classmethod
    def batch(cls, results: Sequence[_Checked], shape: Sequence[int]) -> _Checked:
        """Put the results of several graphs side by side, with the iterations of the one that took most."""

        def stacked(parts: list[Tensor]) -> Tensor:
            return torch.stack(parts).reshape(*shape, *parts[0].shape)

        pairs = [result.pairs for result in results]
        evals, evecs, residuals = (stacked(list(parts)) for parts in zip(*(one[:3] for one in pairs), strict=True))
        most = max(one.iterations for one in pairs)
        together = Eigenpairs(evals, evecs, residuals, most, window=pairs[0].window)
        return cls(together, stacked([result.converged for result in results]))


class _Problem(NamedTuple):
    """What is asked for: see :func:`smallest_eigenpairs`."""

    operator: SymmetricOperator
    n_pairs: int
    tol: float
    known: Tensor
    needed: Tensor

    def attempt(self, method: Callable[..., Eigenpairs]) -> _Checked:
        """The method's pairs; those that fail once more, after a last Rayleigh-Ritz step."""
        found = self.tried(method)
        return found if found.all_converged else found.better(self.tried(partial(_repaired, pairs=found.pairs)))

    def tried(self, method: Callable[..., Eigenpairs]) -> _Checked:
        """The method's pairs, checked; zeros where it fails."""
        try:
            return self._checked(method(self.operator, self.n_pairs, known=self.known))
        except LinAlgError:  # values that are not finite: a polynomial that outgrew the dtype
            nothing = self.known.new_zeros(*self.operator.shape[:-1], self.n_pairs)
            no_values = torch.full_like(nothing[..., 0, :], torch.inf)
            return _Checked(Eigenpairs(no_values, nothing, no_values, 0), torch.zeros_like(no_values, dtype=torch.bool))

    def unbatch(self) -> list[_Problem]:
        """The problems of the graphs one by one."""
        if self.needed.dim() == 0:
            return [self]
        known = self.known.flatten(0, -3).unbind()
        parts = zip(self.operator.unbatch(), known, self.needed.flatten().unbind(), strict=True)
        return [_Problem(operator, self.n_pairs, self.tol, k, needed) for operator, k, needed in parts]

    def _checked(self, pairs: Eigenpairs) -> _Checked:
        gram = product(pairs.evecs.mT, pairs.evecs)
        lack = (gram - torch.eye(self.n_pairs, dtype=gram.dtype, device=gram.device)).abs().amax(-1)
        if self.known.shape[-1]:
            lack = torch.maximum(lack, product(self.known.mT, pairs.evecs).abs().amax(-2))
        orthonormal = lack <= max(self.tol, 100 * torch.finfo(gram.dtype).eps)
        accurate = pairs.residuals <= self.tol * self.operator.upper_bound / 2
        spare = torch.arange(self.n_pairs, device=gram.device) >= self.needed.unsqueeze(-1)
        # none is negative but by rounding; as it is, it would stand before the known ones
        return _Checked(pairs._replace(evals=pairs.evals.clamp_min(0)), (orthonormal & accurate) | spare)


def _repaired(operator: SymmetricOperator, n_pairs: int, *, known: Tensor, pairs: Eigenpairs) -> Eigenpairs:
    """The pairs once more from the span of their vectors."""
    vectors = pairs.evecs if pairs.guards is None else torch.cat([pairs.evecs, pairs.guards], -1)
    vectors, _ = orthonormalize(vectors, known)
    theta, vectors, image = rayleigh_ritz(vectors, operator.apply(vectors), n_pairs)
    rest = torch.addcmul(image, vectors, theta.unsqueeze(-2), value=-1)
    residuals = torch.linalg.vector_norm(rest, dim=-2)
    return pairs._replace(evals=theta, evecs=vectors, residuals=residuals, iterations=1, guards=None)
