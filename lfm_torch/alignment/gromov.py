"""Match two point sets of unknown pairing by their distances alone: annealed entropic Gromov-Wasserstein."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single, outside_autocast

# the plan and two scratch arrays of its size are held: 1.2 GB of float32
LARGEST_PLAN = 10**8
# regularisations, relative to the spread of the cost, from where structure just forms to nearly hard assignments
SCHEDULE = (0.25, 0.1, 0.05, 0.025)
# share of the squared Gram matrix that may be left out of the gradient
_DROPPED = 1e-3
_QUANTILES = 128
_TEMPERATURE = 0.05


@dataclass(frozen=True, repr=False, eq=False)
class Coupling:
    """A soft assignment between the rows of two point sets.

    Attributes:
        plan: ``[n_x, n_y]`` non-negative; rows sum to 1 / n_x, columns to about 1 / n_y.
        energy: cosine between the matched kernels, ``<K_x P, P K_y> / (|K_x| |K_y|)`` scaled to 1 for a copy.
        iterations: outer steps taken.
        converged: whether the plan stood still at the last regularisation.
    """

    plan: Tensor
    energy: float
    iterations: int
    converged: bool

    def __repr__(self) -> str:
        n_x, n_y = self.plan.shape
        return f"Coupling({n_x} x {n_y}, energy {self.energy:.3f}, {self.iterations} iterations)"


@outside_autocast
def gromov_wasserstein(
    x: ArrayLike,
    y: ArrayLike,
    *,
    start: ArrayLike | None = None,
    schedule: tuple[float, ...] = SCHEDULE,
    max_iterations: int = 30,
    sweeps: int = 15,
) -> Coupling:
    """Couple the rows of two spaces so that kernels agree: ``max_P <K_x P, P K_y> + eps H(P)``, eps annealed.

    The kernel of a space is the Gram matrix of its centred rows, so that the square-loss Gromov-Wasserstein problem on
    cosine distances (of rows of norm 1) or squared distances is solved. Its gradient is ``X (X^T P Y) Y^T``: a product
    of thin factors instead of two products of n x n matrices. Each outer step linearises there and runs Sinkhorn
    sweeps, stabilised row by row and warm-started.

    Args:
        x: ``[n_x, d_x]`` features, centred; see :func:`lfm_torch.align`, which prepares them.
        y: ``[n_y, d_y]``.
        start: Log-scores of the pairs to start from ``[n_x, n_y]``; None: :func:`signature_scores`.
        schedule: Regularisations, relative to the spread of the cost.
        max_iterations: Outer steps at each regularisation.
        sweeps: Sinkhorn sweeps in an outer step, at most.

    Raises:
        TypeError, ValueError: not points, different dtypes, more than 1e8 entries in the plan.

    Source: Peyré, Cuturi & Solomon 2016 (ICML), algorithm 1 with square loss; low-rank gradient: Scetbon et al. 2022
    (arXiv 2106.01128), section 3; sorted rows as a start: Artetxe et al. 2018 (arXiv 1805.06297), section 3.2.
    """
    x, y = _checks.check_points("x", x), _checks.check_points("y", y)
    _checks.check_same_device_dtype("x", x, "y", y)
    n, m = len(x), len(y)
    check_size(n, m)
    x, y = _thin(at_least_single(x)), _thin(at_least_single(y))
    squares = [(f.mT @ f / len(f)).square().sum() for f in (x, y)]
    fourth = [torch.linalg.matrix_norm(torch.linalg.matrix_power(f.mT @ f / len(f), 2)) for f in (x, y)]
    spread = float((fourth[0] * fourth[1]).sqrt())
    if not spread > 0:
        raise ValueError("x and y must have rows that differ, got all equal ones")
    scores = signature_scores(x, y) if start is None else _checks.as_tensor("start", start).to(x, copy=True)
    plan = _sinkhorn(scores, x.new_zeros(m), 50)[0]
    potential = x.new_zeros(m)
    used, change, previous = 0, math.inf, schedule[0]
    for level in schedule:
        potential = potential * (previous / level)
        previous = level
        for _ in range(max_iterations):
            cross = x.mT @ (plan @ y)
            scores = ((x @ cross) @ y.mT).div_(level * spread)
            new, potential = _sinkhorn(scores, potential, sweeps)
            change = float((new - plan).abs().sum())
            plan = new
            used += 1
            if change < 1e-2:
                break
    energy = (x.mT @ (plan @ y)).square().sum() / (squares[0] * squares[1]).sqrt()
    return Coupling(plan, float(energy), used, change < 1e-2)


def check_size(n: int, m: int) -> None:
    """Raise ValueError where the plan would have more than 1e8 entries."""
    if n * m > LARGEST_PLAN:
        raise ValueError(
            f"x and y must have at most {LARGEST_PLAN:.0e} pairs of rows to be matched by distances alone, got "
            f"{n} x {m}; give anchors, or align a subset of the rows and translate the others"
        )


def _thin(x: Tensor) -> Tensor:
    """Principal components that carry all but a thousandth of the squared Gram matrix: fewer columns to multiply."""
    components, sizes, _ = torch.linalg.svd(x, full_matrices=False)
    fourth = sizes.double().pow(4)
    kept = int((fourth.cumsum(0) < (1 - _DROPPED) * fourth.sum()).sum()) + 1
    thin: Tensor = components[:, :kept] * sizes[:kept]
    return thin


def _sinkhorn(scores: Tensor, potential: Tensor, sweeps: int) -> tuple[Tensor, Tensor]:
    """Scale ``exp(scores + potential)`` to uniform marginals; overwrites the scores, returns plan and potential.

    Rows are divided by their largest entry first. A column that underflows altogether gets mass from its potential,
    which rises until the next call sees it.
    """
    n, m = scores.shape
    kernel = scores.add_(potential)
    kernel.sub_(kernel.amax(1, keepdim=True)).exp_()
    tiny = 1e-30
    row, column = scores.new_ones(n), scores.new_ones(m)
    for sweep in range(sweeps):
        row = 1 / (n * (kernel @ column).clamp_min(tiny))
        column = 1 / (m * (kernel.mT @ row).clamp_min(tiny))
        if sweep % 5 == 4 and float((row * (kernel @ column) - 1 / n).abs().sum()) < 1e-3:
            break
    row = 1 / (n * (kernel @ column).clamp_min(tiny))
    plan = kernel.mul_(row.unsqueeze(1)).mul_(column)
    return plan, potential + column.log()


@outside_autocast
def kernel_signatures(x: Tensor, quantiles: int = _QUANTILES) -> Tensor:
    """Quantiles of each row of the Gram matrix, ``[n, q]``: the same for every rotation and order of the rows."""
    n = len(x)
    places = torch.linspace(0, n - 1, quantiles, device=x.device, dtype=x.dtype)
    low, share = places.floor().long(), places - places.floor()
    parts = []
    for rows in torch.split(x, max(1, (1 << 24) // n)):
        ordered = (rows @ x.mT).sort(1).values
        parts.append(ordered[:, low] * (1 - share) + ordered[:, (low + 1).clamp_max(n - 1)] * share)
    return torch.cat(parts)


@outside_autocast
def signature_scores(x: Tensor, y: Tensor) -> Tensor:
    """Log-scores of all pairs from their sorted kernel rows, which depend on no pairing: ``[n_x, n_y]``."""
    return feature_scores(kernel_signatures(x), kernel_signatures(y))


@outside_autocast
def feature_scores(f_x: Tensor, f_y: Tensor) -> Tensor:
    """Log-scores of all pairs from the squared distances of features, relative to their mean."""
    cost = torch.cdist(f_x, f_y).square()
    return cost.div_(-cost.mean().clamp_min(torch.finfo(cost.dtype).tiny) * _TEMPERATURE)
