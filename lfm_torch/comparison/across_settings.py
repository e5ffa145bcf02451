"""What a similarity owes to its settings: the measures under other numbers of samples, neighbours, eigenvectors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import collecting, said_once
from lfm_torch.graphs.neighbors import default_n_neighbors
from lfm_torch.maps.fmap import paired_map
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import DEFAULT_MEASURES, MAP_MEASURES, POINT_MEASURES, check_measures
from lfm_torch.pipeline import bases_of_pair, check_pair, similarity
from lfm_torch.representations.nonfinite import Nonfinite
from lfm_torch.spectral.sizes import default_n_basis


@dataclass(frozen=True)
class Sensitivity:
    """Values of measures as one setting at a time is changed: see :func:`sensitivity`.

    Attributes:
        base: The settings that stay where another one is changed.
        values: ``{setting: {its value: {measure: value}}}`` with the settings "n_samples", "n_neighbors", "n_basis".
    """

    base: Mapping[str, int]
    values: Mapping[str, Mapping[int, Mapping[str, float]]]

    def spread(self, measure: str) -> dict[str, float]:
        """Return the largest difference between two values of the measure, per setting."""
        found = {}
        for setting, rows in self.values.items():
            column = [row[measure] for row in rows.values()]
            found[setting] = max(column) - min(column)
        return found


@said_once
@outside_autocast
def sensitivity(
    x: ArrayLike,
    y: ArrayLike,
    *,
    measures: str | Sequence[str] = DEFAULT_MEASURES,
    n_samples: Sequence[int] | None = None,
    n_neighbors: Sequence[int] | None = None,
    n_basis: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    nonfinite: Nonfinite = "raise",
    **settings: Any,
) -> Sensitivity:
    """Compare two representations under other numbers of samples, neighbours and eigenvectors.

    A score that moves much with a setting is not a property of the two representations. Numbers of samples take random
    subsets with neighbours in proportion; numbers of eigenvectors share one basis.

    Args:
        x: ``[n, d_x]``; row i of ``x`` and row i of ``y`` come from the same input.
        y: ``[n, d_y]``.
        measures: One name or several, as in :func:`similarity`.
        n_samples: Sizes of subsets; None for a quarter, a half, and all.
        n_neighbors: None for a third, two thirds, all of the default (15% of the samples, at most 300), and its double
            where there are that many.
        n_basis: None for 30, 50, 70 and 100, as far as they are fewer than half of the samples.
        generator: Source of subsets, on the CPU; None for a fixed seed.
        nonfinite: "drop" leaves samples with a NaN or an infinity out, as in :func:`similarity`.
        settings: ``metric`` and ``weights`` of :func:`similarity`.

    Returns:
        Sensitivity.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: what :func:`similarity` refuses, batch dimensions, or a setting that the samples do not allow.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
        >>> found = lfm.sensitivity(x, x.tanh(), n_samples=[100, 200], n_neighbors=[15, 30], n_basis=[5, 10])
        >>> {setting: list(rows) for setting, rows in found.values.items()}
        {'n_samples': [100, 200], 'n_neighbors': [15, 30], 'n_basis': [5, 10]}
    """
    measures = check_measures(measures)
    x, y = check_pair(x, y, nonfinite=nonfinite)
    n = len(x)
    k = default_n_neighbors(n)
    m = default_n_basis(n)
    subsets = list(n_samples or sorted({max(4, n // 4), max(4, n // 2), n}))
    counts = list(n_neighbors or sorted({max(1, k // 3), max(1, 2 * k // 3), k, min(2 * k, n - 1)}))
    sizes = list(n_basis or sorted({size for size in (30, m, 70, 100) if size <= max(m, n // 2)}))
    for size in subsets:
        _checks.check_range("n_samples", size, 4, n, f"there are {n} samples")
    base = {"n_samples": n, "n_neighbors": k, "n_basis": m}
    generator = generator or torch.Generator().manual_seed(0)
    values: dict[str, dict[int, dict[str, float]]] = {"n_samples": {}, "n_neighbors": {}, "n_basis": {}}
    with torch.no_grad():
        for size in subsets:
            rows = torch.randperm(n, generator=generator, device="cpu")[:size].sort().values.to(x.device)
            fewer = {**settings, "n_neighbors": max(1, round(k * size / n)), "n_basis": default_n_basis(size)}
            with collecting():  # what is to be said of the data is said of all samples, below
                values["n_samples"][size] = _floats(similarity(x[rows], y[rows], measures=measures, **fewer))
        for count in counts:
            changed = {**settings, "n_neighbors": count, "n_basis": m}
            values["n_neighbors"][count] = _floats(similarity(x, y, measures=measures, **changed))
        values["n_basis"] = dict(_over_sizes(x, y, measures, sizes, {**settings, "n_neighbors": k}))
    return Sensitivity(base, values)


def _over_sizes(
    x: Tensor, y: Tensor, measures: Sequence[str], sizes: Sequence[int], settings: Mapping[str, Any]
) -> Iterator[tuple[int, dict[str, float]]]:
    maps = [name for name in measures if name in MAP_MEASURES]
    points = [name for name in measures if name in POINT_MEASURES]
    fixed = _floats(similarity(x, y, measures=points)) if points else {}
    bases = bases_of_pair(x, y, n_basis=max(sizes), **settings) if maps else ()
    for size in sizes:
        read = {}
        if maps:
            fmap = Maps.of(paired_map(*(basis.truncate(size) for basis in bases)))
            read = {name: float(MAP_MEASURES[name].read(fmap)) for name in maps}
        yield size, {name: (read | fixed)[name] for name in measures}


def _floats(scores: Mapping[str, Tensor]) -> dict[str, float]:
    return {name: float(value) for name, value in scores.items()}
