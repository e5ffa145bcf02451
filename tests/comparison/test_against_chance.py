"""Chance level and standard error: against exact expectations, and on planted relations."""

from __future__ import annotations

import math
import warnings
from pathlib import Path

import pytest
import torch
from clouds import related

import lfm_torch as lfm
from lfm_torch.measures.table import MEASURES

SETTINGS = {"n_neighbors": 12, "n_basis": 10}


def expected_inner_product(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over all permutations P of ``<A, P B P^T>`` (Mantel 1967): diagonals meet diagonals, the rest the rest."""
    n = len(a)
    diagonals = [m.trace() for m in (a, b)]
    rest = [m.sum() - d for m, d in zip((a, b), diagonals, strict=True)]
    return float(diagonals[0] * diagonals[1] / n + rest[0] * rest[1] / (n * (n - 1)))


def test_chance_is_the_exact_expectation_of_quadratic_measures() -> None:
    x, y = related()
    found = lfm.significance(
        x, y, measures=["overlap", "heat_raw", "linear_cka", "heat"], n_permutations=400, n_splits=0, **SETTINGS
    )
    bases = [lfm.pipeline.representation_basis(p, **SETTINGS) for p in (x, y)]
    projectors = [b.evecs @ b.evecs.mT for b in bases]
    kernels = [b.evecs * (-2 * b.evals).exp() @ b.evecs.mT for b in bases]
    grams = [(p - p.mean(0)) @ (p - p.mean(0)).mT for p in (x, y)]
    for name, (a, b) in {"overlap": projectors, "heat_raw": kernels, "linear_cka": grams}.items():
        wanted = expected_inner_product(a, b) / float(a.norm() * b.norm())
        assert abs(found[name].chance - wanted) < 4 * found[name].chance_std / math.sqrt(400), name
    # but for the angle between the constants of the two graphs
    assert abs(found["heat"].chance) < 4 * found["heat"].chance_std / math.sqrt(400) + 2e-3


def test_related_spaces_are_far_from_chance_and_unrelated_ones_are_not() -> None:
    x, y = related()
    names = [name for name in MEASURES if MEASURES[name].paired]
    with pytest.warns(lfm.LFMWarning, match="lfm_.* wrong side of chance"):
        near = lfm.significance(x, y, measures=names, n_permutations=50, n_splits=0, **SETTINGS)
    for name in set(names) - {"lfm_paper", "lfm_unsquared"}:  # chance is at their upper end
        assert near[name].z > 3, name
        assert near[name].p == pytest.approx(1 / 51)
    noise = torch.randn(240, 5, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    far = lfm.significance(x, noise, measures=names, n_permutations=50, n_splits=0, **SETTINGS)
    assert all(abs(value.z) < 4.5 for value in far.values())
    assert sum(value.p < 0.05 for value in far.values()) <= 4


def test_p_values_of_unrelated_spaces_are_uniform() -> None:
    generator = torch.Generator().manual_seed(1)
    ps = []
    for _ in range(40):
        x, y = (torch.randn(60, 4, generator=generator, dtype=torch.float64) for _ in range(2))
        found = lfm.significance(x, y, measures=["overlap"], n_permutations=39, n_splits=0, n_neighbors=8, n_basis=6)
        ps.append(found["overlap"].p)
    assert min(ps) >= 1 / 40
    assert sum(p <= 0.25 for p in ps) <= 20  # 10 expected
    assert 0.3 < sum(ps) / 40 < 0.7


def test_a_measure_that_ignores_the_pairing_has_no_chance_level() -> None:
    x, y = related()
    found = lfm.significance(x, y, measures=["spectral_distance"], n_permutations=5, n_splits=2, **SETTINGS)
    value = found["spectral_distance"]
    assert math.isnan(value.chance)
    assert math.isnan(value.z)
    assert value.low <= value.value <= value.high


def test_standard_error_is_that_of_repeated_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    values, errors = [], []
    for _ in range(24):
        x = torch.randn(300, 3, generator=generator, dtype=torch.float64)
        y = x + torch.randn(300, 3, generator=generator, dtype=torch.float64)
        found = lfm.significance(x, y, measures=["linear_cka"], n_permutations=2, n_splits=16)["linear_cka"]
        values.append(found.value)
        errors.append(found.stderr)
    actual = float(torch.tensor(values).std())
    assert 0.6 * actual < sum(errors) / 24 < 1.6 * actual


def test_interval_shrinks_with_samples_and_stays_in_range() -> None:
    wide, narrow = (
        lfm.significance(*related(n), measures=["heat"], n_permutations=2, n_splits=8, **SETTINGS)["heat"]
        for n in (120, 480)
    )
    assert narrow.stderr < wide.stderr
    x, _ = related()
    same = lfm.significance(x, x, measures=["heat", "procrustes"], n_permutations=2, n_splits=2, **SETTINGS)
    assert same["heat"].high <= 1
    assert same["heat"].high == pytest.approx(1, abs=1e-9)
    assert same["procrustes"].low >= 0
    assert same["procrustes"].low == pytest.approx(0, abs=1e-7)
    assert "z = " in str(same["heat"])


def test_a_generator_decides_the_draws() -> None:
    x, y = related()
    runs = [
        lfm.significance(x, y, n_permutations=10, n_splits=2, generator=torch.Generator().manual_seed(s), **SETTINGS)
        for s in (3, 3, 4)
    ]
    assert runs[0] == runs[1] != runs[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_permutations": 1}, "n_permutations must be between 2"),
        ({"n_splits": 1}, "n_splits must be between 2"),
        ({"level": 1.0}, "level must be between 0 and 1"),
        ({"n_basis": 130}, "n_basis must be between 1 and 119"),
        ({"measures": ["heet"]}, "did you mean 'heat'"),
    ],
)
def test_bad_input(options: dict[str, object], message: str) -> None:
    x, y = related()
    with pytest.raises(ValueError, match=message):
        lfm.significance(x, y, **options)  # type: ignore[arg-type]


def test_batches_and_subsets_that_do_not_fit_are_refused() -> None:
    x, y = related()
    with pytest.raises(ValueError, match=r"x must have shape \[n, d\], a row per sample, got \[1, "):
        lfm.significance(x[None], y[None])
    with pytest.raises(ValueError, match="n_samples must be between 4 and 240"):
        lfm.sensitivity(x, y, n_samples=[241])


def test_a_value_below_chance_is_said() -> None:
    x, y = related()
    with pytest.warns(lfm.LFMWarning, match="lfm_paper is .* wrong side of chance.*read 'lfm'") as caught:
        found = lfm.significance(x, y, measures=["lfm_paper", "heat", "spectral_distance"], n_splits=0, **SETTINGS)
    assert len(caught) == 1
    assert Path(caught[0].filename) == Path(__file__)
    assert found["lfm_paper"].below_chance
    assert found["lfm_paper"].p > 0.9
    assert not found["heat"].below_chance
    assert not found["spectral_distance"].below_chance


def test_unrelated_spaces_are_not_below_chance() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for seed in range(3):
            x, y = (torch.randn(150, 5, generator=torch.Generator().manual_seed(10 * seed + s)) for s in (0, 1))
            lfm.significance(x, y, measures=["lfm", "heat", "overlap", "linear_cka"], n_splits=0, **SETTINGS)
