"""Block Lanczos on a Chebyshev polynomial of the operator, with full reorthogonalisation and thick restart, batched.

It keeps the whole Krylov space, so that every operator product counts, and a small block makes a product nearly as
cheap as one column. What costs then is keeping the space orthonormal. A short run on the operator itself therefore
surveys the spectrum; the method proper (Zhou & Saad 2007; Li, Xi, Vecharynski, Yang & Saad 2016) runs on the Chebyshev
polynomial that is small on the unwanted part: degree d needs d products for a block, and about d times fewer blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from lfm_torch.linalg.chebyshev import Window, chebyshev_polynomial
from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator, dense_eigenpairs
from lfm_torch.linalg.krylov_space import KrylovSpace
from lfm_torch.linalg.rayleigh_ritz import rayleigh_ritz
from lfm_torch.ops.krylov import BLOCK

_MAX_ITERATIONS = 1000
_SURVEY_STEPS = 4
_SMALL = 4096


class _Filter(NamedTuple):
    """The polynomial ``T_d`` of the operator, its wanted end mapped below -1, and residuals translated back."""

    operator: SymmetricOperator
    window: Window
    degree: int

    def apply(self, block: Tensor) -> Tensor:
        if self.degree == 1:  # shifted to the middle, where most eigenvalues of a graph lie: little then cancels
            return self.operator.apply(block, b=-self.operator.upper_bound / 2)
        return chebyshev_polynomial(self.operator, block, self.degree, self.window)

    def end(self, largest: float) -> float:
        """Where the spectrum ends, from the largest Ritz value: beyond the window the polynomial grows again."""
        if self.degree == 1:
            return largest + self.operator.upper_bound / 2
        half, centre = (self.window.high - self.window.cut) / 2, (self.window.high + self.window.cut) / 2
        return centre + half * math.cosh(math.acosh(max(largest, 1.0)) / self.degree)

    def residuals(self, mu: Tensor, norms: Tensor) -> Tensor:
        """Residual norms of the operator from those of the polynomial at Ritz values ``mu``; infinite inside [-1, 1].

        A component in the unwanted part, of size e, leaves ``e (1 - mu)`` here and about ``e`` times the distance to
        the middle of the window there.
        """
        if self.degree == 1:
            return norms
        half = (self.window.high - self.window.cut) / 2
        outside = (-mu).clamp_min(1.0)
        distance = half * (torch.acosh(outside) / self.degree).cosh()
        return torch.where(mu < -1.0, norms * distance / (outside - 1).clamp_min(1e-3), torch.inf)


def krylov(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    tol: float,
    known: Tensor,
    start: Tensor | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The smallest eigenpairs in the complement of the known eigenvectors; arguments as in :func:`lobpcg`.

    ``iterations`` counts operator products of one block; 0 where the space would hold a quarter of the problem or more
    and the dense decomposition is taken instead.
    """
    room = operator.shape[-1] - known.shape[-1]
    if room < 4 * (n_pairs + BLOCK):
        return dense_eigenpairs(operator, n_pairs, known)
    limit = _MAX_ITERATIONS if max_iterations is None else max_iterations
    pairs = _lowest(operator, n_pairs, tol, known, start, limit, generator)
    while _crowded(operator, pairs, tol):
        beside = torch.cat([known, pairs.evecs], -1)
        more = _lowest(operator, BLOCK, tol, beside, None, limit, generator)
        used = pairs.iterations + more.iterations
        if bool((more.evals[..., 0] >= pairs.evals[..., -1] - tol * operator.upper_bound / 2).all()):
            return pairs._replace(iterations=used)
        joint = torch.cat([pairs.evecs, more.evecs], -1)
        pairs = _polish(operator, joint, n_pairs, used)._replace(window=pairs.window)
    return pairs


def _crowded(operator: SymmetricOperator, pairs: Eigenpairs, tol: float) -> bool:
    """Whether an eigenvalue was found as often as a Krylov space can hold it: once for each vector of a block."""
    apart = pairs.evals[..., BLOCK - 1 :] - pairs.evals[..., : 1 - BLOCK]
    return bool((apart <= tol * operator.upper_bound / 2).any())


def _lowest(
    operator: SymmetricOperator,
    n_pairs: int,
    tol: float,
    known: Tensor,
    start: Tensor | None,
    limit: int,
    generator: torch.Generator | None,
) -> Eigenpairs:
    """Pairs from one Krylov space after another, each with the window that the one before suggests."""
    window, block, slowest = survey(operator, n_pairs, known=known, start=start, generator=generator)
    used, degree = _SURVEY_STEPS, _degree(window, known)
    while True:
        pairs = _run(_Filter(operator, window, degree), n_pairs, tol, known, block, slowest, limit - used, generator)
        used += pairs.iterations
        wanted = float(pairs.evals[..., -1].max())
        # beyond the cut the polynomial takes eigenvalues in any order
        if degree == 1 or used >= limit or (wanted <= window.cut and _done(operator, pairs, tol)):
            return pairs._replace(iterations=used)
        # the survey missed the wanted end; a Ritz value bounds it from above. Or float32 the range of the polynomial:
        # the operator itself is the last resort
        again = window._replace(wanted=wanted, cut=_beyond(wanted, window.high))
        degree = _degree(again, known) if window.cut < wanted < window.high else 1
        window, block = again, _mixed(pairs.evecs, block)


def survey(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    known: Tensor,
    start: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Window, Tensor, int | None]:
    """Find where the wanted end of the spectrum lies, by a few Lanczos steps on a random block.

    Gauss quadrature: a Ritz vector stands for as many eigenvalues as its share in the random block says. The window
    begins where twice the pairs asked for are counted.

    Returns:
        The window, the random block with the unwanted part damped, and of a batch the graph with the highest wanted
        end, None of a single one.
    """
    shape = (*operator.shape[:-1], BLOCK)
    begin = torch.randn(shape, dtype=known.dtype, device=known.device, generator=generator)
    space = KrylovSpace(known, _SURVEY_STEPS * BLOCK, generator)
    space.start(begin)
    for _ in range(_SURVEY_STEPS):
        coupling = space.extend(operator.apply(space.block, b=-operator.upper_bound / 2), operator.upper_bound / 2)
    theta, rotation = space.ritz(dtype=torch.float32)  # a rough picture is all that is wanted
    share = rotation[..., :BLOCK, :].square().sum(-2) * (operator.shape[-1] / BLOCK)
    count = share.cumsum(-1)
    values = theta + operator.upper_bound / 2

    def levels(pairs: float) -> Tensor:
        index = (count < pairs).sum(-1, keepdim=True).clamp_max(values.shape[-1] - 1)
        return values.gather(-1, index).flatten()

    beyond = (coupling @ rotation[..., -BLOCK:, :]).norm(dim=-2)
    high = min(float((values + beyond)[..., -1].max()), operator.upper_bound)
    wanted = levels(n_pairs)
    last, cut = float(wanted.max()), float(levels(2 * n_pairs).max())
    if cut - last < 1e-3 * (high - last):  # an eigenvalue of high multiplicity: nothing would stand out
        cut = _beyond(last, high)
    window = Window(float(values.min()), last, cut, high)
    damped = rotation * (values <= window.cut).unsqueeze(-2)
    block = space.combine(damped @ rotation[..., :BLOCK, :].mT)
    slowest = int(wanted.argmax()) if len(wanted) > 1 else None
    return window, block if start is None else _mixed(start, block), slowest


def _beyond(wanted: float, high: float) -> float:
    """Where to cut a spectrum of which the wanted end is known, and what comes after is not."""
    return wanted + 0.1 * (high - wanted)


def _mixed(vectors: Tensor, block: Tensor) -> Tensor:
    """Add the given vectors to a block, column by column: a Krylov space of the sum finds them again at once."""
    scale = block.norm(dim=-2, keepdim=True).amax(-1, keepdim=True)
    for column in range(0, vectors.shape[-1], BLOCK):
        given = vectors[..., column : column + BLOCK]
        block[..., : given.shape[-1]] += given * scale
    return block


def _degree(window: Window, known: Tensor) -> int:
    """Degree of the polynomial: odd, so that eigenvalues above the window land on the unwanted side.

    A growth of e^4.5 a block where the pairs end balances products against the work on the space; of e^9 in small
    graphs, where the Ritz problems weigh more. The lowest pairs must not drown the last ones in rounding, nor may what
    rounding leaves of the known vectors, of eigenvalue 0, outgrow the wanted ones: it is removed, but takes as many
    digits with it.
    """
    # nearly nothing to damp, or an interval so short that rounding leaves it and is blown up
    if window.high - window.cut < max(0.1 * (window.high - window.low), 1e-3 * window.high):
        return 1
    # a survey too short to tell the wanted end from the window says less than this
    wanted, lowest = max(window.place(window.wanted), 1.2), window.place(window.low)
    degree = min(15, max(1, round((9 if known.shape[-2] <= _SMALL else 4.5) / math.acosh(wanted)))) // 2 * 2 + 1
    most = math.log(1e8 if known.dtype == torch.float64 else 100)
    spread = math.acosh(max(lowest, wanted)) - math.acosh(wanted)
    null = math.acosh(max(window.place(0.0), 1.0)) - math.acosh(max(window.place(window.wanted), 1.0))
    most_null = math.log(0.01 / torch.finfo(known.dtype).eps) if known.shape[-1] else math.inf
    while degree > 1 and (degree * spread > most or degree * null > most_null):
        degree -= 2
    return degree


def _run(
    polynomial: _Filter,
    n_pairs: int,
    tol: float,
    known: Tensor,
    block: Tensor,
    slowest: int | None,
    limit: int,
    generator: torch.Generator | None,
) -> Eigenpairs:
    operator, degree = polynomial.operator, polynomial.degree
    room = operator.shape[-1] - known.shape[-1]
    capacity = min(room - BLOCK, max((8 if degree == 1 else 4) * n_pairs, 256)) // BLOCK * BLOCK
    kept = -(-(n_pairs + max(n_pairs // 2, BLOCK)) // BLOCK) * BLOCK
    # enough steps for the space to hold what is asked for, whatever the limit
    steps = max(limit // degree, (n_pairs + _guards(n_pairs)) // BLOCK + 1)
    scale = operator.upper_bound / 2 if degree == 1 else 1.0
    target, enough = tol * operator.upper_bound / 2, 0.5
    space = KrylovSpace(known, capacity, generator)
    space.start(block)
    next_check, wait = (3 if degree == 1 else 2) * n_pairs, 4 if degree == 1 else 1
    history: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        coupling = space.extend(polynomial.apply(space.block), scale)
        if not (space.full or space.size >= next_check or step == steps):
            continue
        # of a batch, the graph that was furthest from its end speaks for all until it is there
        watched = None if space.full or step == steps else slowest
        large = space.full or space.size >= max(4 * n_pairs, 8 * BLOCK)
        theta, rotation, residuals = _ritz_residuals(polynomial, space, coupling, n_pairs, watched)
        worst = float(residuals.max())
        if watched is not None and (worst <= enough * target or (worst == math.inf and large)):
            watched = None
            theta, rotation, residuals = _ritz_residuals(polynomial, space, coupling, n_pairs, None)
            worst = float(residuals.max())
        if watched is None and residuals.numel() > 1:
            slowest = int(residuals.flatten().argmax())
        missed = worst == math.inf and large
        if worst <= enough * target or step == steps or missed:
            vectors = space.combine(rotation[..., : n_pairs + _guards(n_pairs)])
            end = min(polynomial.end(float(theta[..., -1].max())), operator.upper_bound)
            pairs = _polish(operator, vectors, n_pairs, step * degree)._replace(window=(polynomial.window.cut, end))
            # where rounding of the polynomial stands in the way more steps do not help
            drowned = degree > 1 and worst <= 0.05 * target
            if drowned or missed or step == steps or _done(operator, pairs, tol):
                return pairs
            enough = 0.1 * worst / target
        history.append((space.size, worst))
        next_check = space.size + _blocks_to_wait(history, target, wait) * BLOCK
        if space.full:
            space.restart(theta, rotation, kept)
            history, next_check = [], kept + wait * BLOCK
    raise AssertionError("unreachable: the last step returns")


def _ritz_residuals(
    polynomial: _Filter, space: KrylovSpace, coupling: Tensor, n_pairs: int, graph: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Ritz values, rotation and the largest residual ``[...]`` among the pairs, of all graphs or of one."""
    theta, rotation = space.ritz(graph)
    if graph is not None:
        coupling = coupling.flatten(0, -3)[graph]
    # residual of a Ritz pair: the part of its image that leaves the space
    norms = (coupling @ rotation[..., -BLOCK:, :n_pairs]).norm(dim=-2)
    return theta, rotation, polynomial.residuals(theta[..., :n_pairs], norms).amax(-1)


def _guards(n_pairs: int) -> int:
    """Vectors kept beyond the pairs for a warm start: at least 8, and a whole number of blocks with the pairs."""
    return (n_pairs + 8 + BLOCK - 1) // BLOCK * BLOCK - n_pairs


def _done(operator: SymmetricOperator, pairs: Eigenpairs, tol: float) -> bool:
    return bool((pairs.residuals <= tol * operator.upper_bound / 2).all())


def _blocks_to_wait(history: list[tuple[int, float]], target: float, most: int) -> int:
    """Blocks until the next look, from the rate at which the residual fell between the last two."""
    if len(history) < 2 or not 0 < history[-1][1] < history[-2][1] < math.inf:
        return most
    (before, high), (now, low) = history[-2:]
    rate = math.log(high / low) / (now - before)
    needed = math.log(max(low / (0.5 * target), 1.0)) / rate
    # convergence speeds up as it goes: look a little before the straight line would be there
    return max(1, min(most, round(0.75 * needed / BLOCK)))


def _polish(operator: SymmetricOperator, vectors: Tensor, n_pairs: int, iterations: int) -> Eigenpairs:
    """A last Rayleigh-Ritz step with true residuals."""
    theta, vectors, image = rayleigh_ritz(vectors, operator.apply(vectors), vectors.shape[-1])
    theta, wanted, guards = theta[..., :n_pairs], vectors[..., :n_pairs], vectors[..., n_pairs:]
    rest = torch.addcmul(image[..., :n_pairs], wanted, theta.unsqueeze(-2), value=-1)
    residuals = torch.linalg.vector_norm(rest, dim=-2)
    return Eigenpairs(theta, wanted.contiguous(), residuals, iterations, guards=guards.contiguous())
