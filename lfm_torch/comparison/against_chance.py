"""What a similarity is worth: its chance level, by shuffled rows, and its standard error, by halves of the samples."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import collecting, note, said_once
from lfm_torch.baselines.points import Points
from lfm_torch.graphs.neighbors import default_n_neighbors
from lfm_torch.maps.fmap import paired_map
from lfm_torch.measures.pairs import shuffled_maps, shuffled_scores
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import (
    DEFAULT_MEASURES,
    MAP_MEASURES,
    MEASURES,
    POINT_MEASURES,
    Measure,
    below_chance,
    check_measures,
)
from lfm_torch.pipeline import bases_of_pair, check_pair, similarity, states_of_pair
from lfm_torch.representations.nonfinite import Nonfinite
from lfm_torch.spectral.sizes import default_n_basis

# halves of so many entries of n x n arrays are taken at once
_HALVES_ENTRIES = 2**25
# standard deviations below chance that are no accident, given enough shuffles to know one
_SIGNIFICANT, _FEWEST_SHUFFLES = 3.0, 20


@dataclass(frozen=True)
class Significance:
    """What one value of a measure is worth.

    Attributes:
        value: The measure of the two representations.
        chance: Its mean with shuffled rows, NaN where it does not depend on which row belongs to which.
        chance_std: Its standard deviation with shuffled rows.
        z: By how many of those it is closer than chance.
        p: Probability of a value as close by chance, ``(1 + #{null as close}) / (1 + permutations)``. It is one-sided:
            near 1 it is no sign of unrelated spaces where the value is :attr:`below_chance`.
        stderr: Standard error over samples.
        low: Lower end of the interval at ``level``, inside the range of the measure.
        high: Upper end.
        half: Mean over halves of the samples: far from ``value`` where the measure depends on their number.
        level: Coverage of the interval.
        n_permutations: Shuffles behind ``chance``.
        n_splits: Halves behind ``stderr``.
    """

    value: float
    chance: float
    chance_std: float
    z: float
    p: float
    stderr: float
    low: float
    high: float
    half: float
    level: float
    n_permutations: int
    n_splits: int

    @property
    def below_chance(self) -> bool:
        """Whether shuffled rows are significantly closer: then the measure does not order these spaces."""
        return self.n_permutations >= _FEWEST_SHUFFLES and self.z < -_SIGNIFICANT and self.p > 0.95

    def __str__(self) -> str:
        chance = f"chance {self.chance:.3f} ± {self.chance_std:.3f}, z = {self.z:.1f}, p = {self.p:.2g}"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}] ({chance})"


@said_once
@outside_autocast
def significance(
    x: ArrayLike,
    y: ArrayLike,
    *,
    measures: str | Sequence[str] = DEFAULT_MEASURES,
    n_permutations: int = 100,
    n_splits: int = 10,
    level: float = 0.95,
    generator: torch.Generator | None = None,
    nonfinite: Nonfinite = "raise",
    **settings: Any,
) -> dict[str, Significance]:
    """Compare two representations, with the chance level and the standard error of every measure.

    Chance is a permutation test: the rows of y are shuffled, so both spaces keep their geometry and only the
    correspondence goes. Graphs and bases do not change with the order of rows, so all permutations cost one product.
    The standard error is the delete-half jackknife: the standard deviation of the measure over random halves of the
    samples, with half as many neighbours.

    Args:
        x: ``[n, d_x]``; row i of ``x`` and row i of ``y`` come from the same input.
        y: ``[n, d_y]``.
        measures: One name or several, as in :func:`similarity`.
        n_permutations: Shuffles, at least 2; the smallest p-value is ``1 / (n_permutations + 1)``.
        n_splits: Random halves, at least 2; 0 leaves the standard error and the interval NaN.
        level: Coverage of the interval.
        generator: Source of shuffles and halves, on the CPU; None for a fixed seed.
        nonfinite: "drop" leaves samples with a NaN or an infinity out, as in :func:`similarity`.
        settings: ``n_neighbors``, ``n_basis``, ``metric`` and ``weights`` of :func:`similarity`; halves have as many
            eigenvectors as the whole.

    Returns:
        A :class:`Significance` per measure.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: what :func:`similarity` refuses, batch dimensions, numbers out of range, or halves of no more than
            ``n_basis`` samples.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(300, 6, generator=torch.Generator().manual_seed(0))
        >>> found = lfm.significance(x, x.tanh(), n_basis=10, n_permutations=20)
        >>> found["heat"].z > 10, found["heat"].chance < found["heat"].low <= found["heat"].value
        (True, True)

    Warns:
        LFMWarning: a value lies significantly below chance, as that of "lfm_paper" does for spaces that are related.

    Source: Phipson & Smyth 2010 for the p-value; Shao & Wu 1989 for the delete-half jackknife.
    """
    from statistics import NormalDist  # takes longer to import than most of the library

    measures = check_measures(measures)
    x, y = check_pair(x, y, nonfinite=nonfinite)
    _checks.check_range("n_permutations", n_permutations, 2, 2**31 - 1, "shuffles")
    if n_splits != 0:
        _checks.check_range("n_splits", n_splits, 2, 2**31 - 1, "halves, or 0 for none")
    if not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, got {level}")
    generator = generator or torch.Generator().manual_seed(0)
    values, nulls = _with_null(x, y, measures, n_permutations, generator, settings)
    halves = _over_halves(x, y, measures, n_splits, generator, settings)
    reach = NormalDist().inv_cdf((1 + level) / 2)
    found = {
        name: _significance(MEASURES[name], values[name], nulls.get(name), halves[name], reach, level)
        for name in measures
    }
    for name, one in found.items():
        if one.below_chance:
            note(f"significance: {below_chance(name, one.value, one.chance)}")
    return found


def _with_null(
    x: Tensor,
    y: Tensor,
    measures: Sequence[str],
    n_permutations: int,
    generator: torch.Generator,
    settings: Mapping[str, Any],
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Values of the measures, and ``[P]`` values with shuffled rows of those that depend on the pairing."""
    values: dict[str, float] = {}
    nulls: dict[str, Tensor] = {}
    orders = torch.stack([_order(len(x), generator) for _ in range(n_permutations)]).to(x.device)
    with torch.no_grad():
        if any(name in MAP_MEASURES for name in measures):
            bases = bases_of_pair(x, y, **settings)
            evecs, evals = zip(*((basis.evecs.mT.contiguous(), basis.evals) for basis in bases), strict=True)
            maps = Maps.of(paired_map(*bases))
            shuffled = shuffled_maps(evecs[0], evals[0], evecs[1], evals[1], orders)
        parts = Points(x), Points(y)
        for name in measures:
            if name in MAP_MEASURES:
                read = MAP_MEASURES[name].read
                values[name] = float(read(maps))
                null = read(shuffled).flatten()
            else:
                measure = POINT_MEASURES[name]
                a, b = states_of_pair(measure, *parts)
                values[name] = float(measure.score(a, b))
                null = shuffled_scores(measure, a, b, orders)
            if MEASURES[name].paired:
                nulls[name] = null.double().cpu()
    return values, nulls


def _over_halves(
    x: Tensor,
    y: Tensor,
    measures: Sequence[str],
    n_splits: int,
    generator: torch.Generator,
    settings: Mapping[str, Any],
) -> dict[str, Tensor]:
    """Values ``[n_splits]`` on random halves of the samples, with half as many neighbours."""
    if n_splits == 0:
        return {name: torch.empty(0, dtype=torch.float64, device="cpu") for name in measures}
    size = len(x) // 2
    if any(name in MAP_MEASURES for name in measures):
        _checks.check_enough("a half of the samples", size, "; n_splits=0 takes none")
    k, m = settings.get("n_neighbors"), settings.get("n_basis")
    n_neighbors = max(1, (default_n_neighbors(len(x)) if k is None else k) // 2)
    n_basis = default_n_basis(len(x)) if m is None else m
    halved = {**settings, "n_neighbors": n_neighbors, "n_basis": n_basis}
    rows = torch.stack([_order(len(x), generator)[:size] for _ in range(n_splits)]).to(x.device)
    found: dict[str, list[Tensor]] = {name: [] for name in measures}
    # what is to be said of the data has been said of all samples
    with torch.no_grad(), collecting():
        for part in torch.split(rows, max(1, _HALVES_ENTRIES // size**2)):
            scores = similarity(x[part], y[part], measures=measures, batched=True, **halved)
            for name, values in scores.items():
                found[name].append(values.double().cpu())
    return {name: torch.cat(values) for name, values in found.items()}


def _significance(
    measure: Measure, value: float, null: Tensor | None, halves: Tensor, reach: float, level: float
) -> Significance:
    nan = math.nan
    chance = chance_std = z = p = stderr = low = high = half = nan
    n_permutations = 0
    if null is not None:
        sign = -1 if measure.is_distance else 1
        n_permutations = len(null)
        chance, chance_std = float(null.mean()), float(null.std())
        z = sign * (value - chance) / chance_std if chance_std > 0 else nan
        p = (1 + int((sign * null >= sign * value).sum())) / (1 + n_permutations)
    if len(halves):
        stderr, half = float(halves.std()), float(halves.mean())
        low, high = max(measure.range[0], value - reach * stderr), min(measure.range[1], value + reach * stderr)
    return Significance(value, chance, chance_std, z, p, stderr, low, high, half, level, n_permutations, len(halves))


def _order(n: int, generator: torch.Generator) -> Tensor:
    return torch.randperm(n, generator=generator, device="cpu")
