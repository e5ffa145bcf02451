"""The table of measures: every property it claims is checked, for every measure, on the same few representations."""

from __future__ import annotations

import math

import pytest
import torch

import lfm_torch as lfm
from lfm_torch import _checks
from lfm_torch.baselines import relative_similarity
from lfm_torch.baselines.points import Points
from lfm_torch.measures.map_readings import commutativity_error
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import MAP_MEASURES, MEASURES, POINT_MEASURES, check_measures
from lfm_torch.report.scales import name_of

N, D = 120, 5
SETTINGS = {"n_neighbors": 15, "n_basis": 12}
NAMES = list(MEASURES)
CHANGES = ("translation", "scaling", "orthogonal", "linear")


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    x = randn(N, D)
    return x, x @ randn(D, 7, seed=1) + 0.6 * randn(N, 7, seed=2)


def value(name: str, x: torch.Tensor, y: torch.Tensor) -> float:
    return float(lfm.similarity(x, y, measures=[name], **SETTINGS)[name])


def changed(x: torch.Tensor, change: str) -> torch.Tensor:
    d = x.shape[1]
    orthogonal = torch.linalg.qr(randn(d, d, seed=3)).Q
    stretch = torch.linspace(0.3, 3, d, dtype=x.dtype)
    return {
        "translation": x + 1.5 * randn(d, seed=4),
        "scaling": 3.7 * x,
        "orthogonal": x @ orthogonal,
        "linear": (x @ orthogonal) * stretch @ torch.linalg.qr(randn(d, d, seed=5)).Q,
    }[change]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", NAMES)
def test_invariances_are_those_of_the_table(name: str, change: str) -> None:
    x, y = pair()
    before = value(name, x, y)
    for after in (value(name, changed(x, change), y), value(name, x, changed(y, change))):
        if change in MEASURES[name].invariances:
            assert after == pytest.approx(before, abs=1e-7)
    differences = [abs(value(name, changed(x, change), y) - before), abs(value(name, x, changed(y, change)) - before)]
    # not claimed: then one of the two sides shows it
    assert change in MEASURES[name].invariances or max(differences) > 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_range_closest_value_and_direction(name: str) -> None:
    measure = MEASURES[name]
    x, y = pair()
    low, high = measure.range
    assert measure.closest in (low, high)
    # roots of differences of sums leave half of the digits
    assert value(name, x, x) == pytest.approx(measure.closest, abs=1e-6)
    near, far = value(name, x, y), value(name, x, randn(N, 7, seed=9))
    assert low - 1e-9 <= near <= high + 1e-9
    assert low - 1e-9 <= far <= high + 1e-9
    if name in ("lfm_paper", "lfm_unsquared"):
        assert near < far  # why "lfm" leaves the constant function out: noise scores higher than a related space here
    elif measure.paired:
        assert (near < far) if measure.is_distance else (near > far)


def hostile(kind: str) -> torch.Tensor:
    x = randn(48, 6)
    rows = torch.randint(6, (48,), generator=torch.Generator().manual_seed(0))
    kinds = {
        "one-hot codes": lambda: torch.eye(6, dtype=x.dtype)[rows],
        "rows orthogonal to one another": lambda: torch.eye(48, dtype=x.dtype),
        "binary codes": lambda: torch.cat([x > 0, x <= 0], 1).to(x.dtype),
        "duplicates": lambda: x[torch.arange(48) % 16],
        "rank one": lambda: x[:, :1] @ x[:1],
        "a constant column": lambda: torch.cat([x, torch.ones_like(x[:, :1])], 1),
        "two far clusters": lambda: 1e-3 * x + torch.where(rows > 2, 1.0, -1.0).unsqueeze(1),
        "an outlier": lambda: x * torch.where(torch.arange(48) == 0, 1e6, 1.0).unsqueeze(1),
        "huge": lambda: 1e30 * x,
        "tiny": lambda: 1e-30 * x,
        "more features than rows": lambda: randn(48, 400),
        "four rows": lambda: x[:4, :3],
        "four rows, two alike": lambda: x[[0, 1, 1, 2]],
    }
    return kinds[kind]()


HOSTILE = (
    "one-hot codes", "rows orthogonal to one another", "binary codes", "duplicates", "rank one", "a constant column",
    "two far clusters", "an outlier", "huge", "tiny", "more features than rows", "four rows", "four rows, two alike",
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", HOSTILE)
def test_values_stay_in_their_range_on_hostile_input(kind: str, dtype: torch.dtype) -> None:
    x = hostile(kind).to(dtype)
    for y in (x, randn(len(x), 5, seed=1).to(dtype), hostile("one-hot codes")[: len(x)].to(dtype)):
        scores = lfm.similarity(x, y, measures=NAMES, n_basis=min(10, len(x) // 2))
        for name, score in scores.items():
            low, high = MEASURES[name].range
            assert low <= float(score) <= high, name


def test_pairs_of_a_comparison_stay_in_their_range() -> None:
    x = {kind: hostile(kind) for kind in HOSTILE if len(hostile(kind)) == 48}
    comparison = lfm.compare(x, measures=NAMES, n_basis=10)
    assert not comparison.failures
    for name in NAMES:
        low, high = MEASURES[name].range
        assert low <= float(comparison.matrix(name).min()) <= float(comparison.matrix(name).max()) <= high, name


def test_only_rounding_is_taken_off() -> None:
    value = torch.tensor([1 + 1e-9, -1e-12, 0.3, 1.5, math.nan], dtype=torch.float64, requires_grad=True)
    found = _checks.within(value, 0, 1)
    assert found[:4].tolist() == [1.0, 0.0, 0.3, 1.5]  # far outside is no rounding
    assert math.isnan(float(found[4].detach()))
    (slope,) = torch.autograd.grad(found[:4].sum(), value)
    assert slope.tolist() == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_samples_orthogonal_to_all_anchors_are_like_one_another() -> None:
    x = torch.eye(6, dtype=torch.float64)[[0, 1, 1, 0, 2, 0, 1, 0]]
    x[6] = torch.tensor([1.0, 1, 0, 0, 0, 0], dtype=torch.float64)
    y = x.clone()
    y[4] = x[0]
    anchors = torch.tensor([0, 1])  # sample 4 is orthogonal to both in x, and to one of them in y
    turned = x @ torch.linalg.qr(randn(6, 6)).Q
    for same in (x, turned):
        assert float(relative_similarity(x, same, anchors=anchors)) == pytest.approx(1, abs=1e-12)
    assert float(relative_similarity(x, y, anchors=anchors)) == pytest.approx(5 / 6, abs=1e-12)


def test_a_map_that_carries_nothing_has_the_worst_value() -> None:
    a, b = torch.tensor([0.0, 0.2, 0.3]), torch.tensor([0.0, 0.1, 0.5])
    nothing, constant = torch.zeros(3, 3), torch.zeros(3, 3)
    constant[0, 0] = 1
    for c in (nothing, constant):
        assert float(commutativity_error(lfm.FunctionalMap(c, a, b), centered=True)) == 2
    with pytest.raises(ValueError, match="n_basis must be at least 2"):
        commutativity_error(lfm.FunctionalMap(constant[:1, :1], a[:1], b[:1]), centered=True)


@pytest.mark.parametrize("name", NAMES)
def test_symmetry(name: str) -> None:
    x, y = pair()
    forth, back = value(name, x, y), value(name, y, x)
    assert (forth == pytest.approx(back, abs=1e-9)) == MEASURES[name].symmetric


@pytest.mark.parametrize("name", [name for name in NAMES if MEASURES[name].metric])
def test_metrics_obey_the_triangle_inequality(name: str) -> None:
    points = [randn(N, d, seed=s) for s, d in enumerate((2, 3, 4, 5, 6))]
    points += [points[0] + 0.3 * randn(N, 2, seed=11), points[1] + 0.1 * randn(N, 3, seed=12)]
    table = [[value(name, x, y) for y in points] for x in points]
    for i, j, k in torch.cartesian_prod(*(torch.arange(len(points)),) * 3).tolist():
        assert table[i][k] <= table[i][j] + table[j][k] + 1e-7


@pytest.mark.parametrize("name", NAMES)
def test_shuffled_rows_matter_where_the_table_says_so(name: str) -> None:
    x, y = pair()
    shuffled = value(name, x, y[torch.randperm(N, generator=torch.Generator().manual_seed(0))])
    assert (abs(shuffled - value(name, x, y)) > 1e-3) == MEASURES[name].paired


@pytest.mark.parametrize("name", [name for name in POINT_MEASURES if MEASURES[name].differentiable])
def test_gradients_of_point_measures(name: str) -> None:
    x, y = randn(12, 3).requires_grad_(), randn(12, 4, seed=1).requires_grad_()
    measure = POINT_MEASURES[name]

    def score(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return measure.score(measure.prepare(Points(x)), measure.prepare(Points(y)))

    assert torch.autograd.gradcheck(score, (x, y))


@pytest.mark.parametrize("name", [name for name in MAP_MEASURES if MEASURES[name].differentiable])
def test_gradients_of_map_measures(name: str) -> None:
    c = (0.5 * randn(2, 3, 4)).requires_grad_()
    a, b = randn(4, seed=1).abs().requires_grad_(), randn(3, seed=2).abs().requires_grad_()

    def read(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return MAP_MEASURES[name].read(Maps.of(lfm.FunctionalMap(c, a, b)))

    assert torch.autograd.gradcheck(read, (c, a, b))
    assert torch.autograd.gradgradcheck(read, (c, a, b))


@pytest.mark.parametrize("name", list(POINT_MEASURES))
def test_permuted_state_is_the_state_of_permuted_rows(name: str) -> None:
    if name in ("minibatch_cka", "relative"):
        pytest.skip("shuffled inside minibatches, and with the anchors kept")
    measure = POINT_MEASURES[name]
    for d in (5, 90, 300):  # features, Gram matrix, more features than rows
        x, y = randn(N, d), randn(N, 6, seed=1)
        orders = torch.stack([torch.randperm(N) for _ in range(3)])
        shuffled = measure.permute(measure.prepare(Points(x)), orders)
        got = measure.score(measure.prepare(Points(y)), shuffled)
        for order, score in zip(orders, got, strict=True):
            wanted = measure.score(measure.prepare(Points(y)), measure.prepare(Points(x[order])))
            assert float(score) == pytest.approx(float(wanted), abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_batched_is_one_by_one(name: str) -> None:
    x, y = randn(2, 60, 4), randn(2, 60, 3, seed=1)
    scores = lfm.similarity(x, y, measures=[name], n_neighbors=10, n_basis=6, batched=True)[name]
    for a, b, score in zip(x, y, scores, strict=True):
        single = lfm.similarity(a, b, measures=[name], n_neighbors=10, n_basis=6)[name]
        torch.testing.assert_close(score, single, atol=1e-6, rtol=0)


def test_every_measure_says_what_it_is() -> None:
    for name, measure in MEASURES.items():
        assert measure.name == name
        assert name_of(name) == measure.title
        assert len(measure.reading) > 20
        assert measure.source
        assert all(math.isfinite(end) for end in measure.range)
        assert not measure.metric or (measure.is_distance and measure.symmetric)
    check_measures(NAMES)
