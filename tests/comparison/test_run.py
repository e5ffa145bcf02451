from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clouds import cloud
from extras import need
from torch import Tensor, nn

from lfm_torch import LFMWarning, similarity
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.run import compare
from lfm_torch.measures.table import MEASURES
from lfm_torch.representations.checkpoints import Checkpoints

N = 80
OPTIONS: dict[str, Any] = {"n_basis": 8, "n_neighbors": 12}
ALL = ("lfm", "lfm_paper", "overlap", "heat", "linear_cka")


def test_numbers_are_those_of_single_pairs_whatever_the_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {f"m{k}": cloud(k, d=3 + k % 2) for k in range(5)}
    every = tuple(MEASURES)
    whole = compare(points, measures=every, **OPTIONS)
    # two items per block: the blocks below the diagonal come from adjoint maps
    monkeypatch.setattr("lfm_torch.comparison.jobs.blocks._COLUMNS", {"cpu": 16})
    blocks = compare(points, measures=every, **OPTIONS)
    singles = [[similarity(x, y, measures=every, **OPTIONS) for y in points.values()] for x in points.values()]
    for measure in every:
        pairs = torch.stack([torch.stack([single[measure] for single in row]) for row in singles])
        # distances are roots of differences: single precision leaves half the digits
        atol = 1e-3 if MEASURES[measure].is_distance else 1e-5
        torch.testing.assert_close(whole.matrix(measure), pairs, atol=atol, rtol=0)
        torch.testing.assert_close(blocks.matrix(measure), pairs, atol=atol, rtol=0)
    lfm = whole.matrix("lfm_paper")
    assert float((lfm - lfm.mT).abs().max()) > 1e-3  # the full matrix is kept: the score has a direction


def test_double_precision_is_kept() -> None:
    x = {"a": cloud(1).double(), "b": cloud(2).double()}
    matrix = compare(x, measures=["heat"], **OPTIONS).matrix("heat")
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix[0, 1], similarity(x["a"], x["b"], measures=["heat"], **OPTIONS)["heat"])
    mixed = compare({"a": cloud(1), "b": cloud(1).double()}, measures=["heat"], **OPTIONS).matrix("heat")
    torch.testing.assert_close(mixed, torch.ones(2, 2, dtype=torch.float64), atol=1e-4, rtol=0)


def test_chance_is_the_value_without_correspondence() -> None:
    x = {f"m{k}": cloud(k, n=300) for k in range(4)}
    comparison = compare(x, measures=ALL, n_basis=10, n_neighbors=30)
    matrix = {name: comparison.matrix(name) for name in ALL}
    apart = ~torch.eye(4, dtype=torch.bool)
    for name in ALL:
        # independent clouds do not correspond either: shuffling and independence give the same level
        assert float(comparison.chance[name].mean()) == pytest.approx(float(matrix[name][apart].mean()), abs=0.06)
    assert float(comparison.chance["lfm"].mean()) > 0.3


def test_runs_can_be_given() -> None:
    x = {"w1": cloud(1), "w2": cloud(2), "other": cloud(3)}
    comparison = compare(x, measures=["heat"], runs={"w1": ("w", 7), "w2": ("w", 3)}, **OPTIONS)
    assert [(c.name, c.run, c.step) for c in comparison.checkpoints] == [
        ("other", "other", None), ("w2", "w", 3), ("w1", "w", 7)
    ]  # fmt: skip


def test_what_fails_is_reported_and_the_rest_compared() -> None:
    bad = cloud(4)
    bad[3, 1] = math.nan
    zero = cloud(5)
    zero[:] = 0
    x = {
        "good": {"a": cloud(1), "b": cloud(2)},
        "nan": {"a": cloud(3), "b": bad},
        "short": {"a": cloud(1)[:50], "b": zero},
        "odd": {"a": torch.ones(N, dtype=torch.long), "b": torch.ones(2, N, 3)},
    }
    with pytest.warns(LFMWarning, match="5 could not be compared"):
        comparison = compare(x, measures=["heat"], **OPTIONS)
    reasons = {(failure.checkpoint, failure.layer): failure.reason for failure in comparison.failures}
    assert "must be finite, got nan in row 3" in reasons["nan", "b"]
    assert "must have the 80 rows of the others, got 50" in reasons["short", "a"]
    assert "(a collapsed representation)" in reasons["short", "b"]
    assert "float16, bfloat16, float32 or float64, got torch.int64" in reasons["odd", "a"]
    assert "shape [n, d], a row per sample, got [2, 80, 3]" in reasons["odd", "b"]
    assert [(item.checkpoint, item.layer) for item in comparison.items] == [("good", "a"), ("good", "b"), ("nan", "a")]
    between = comparison.between_checkpoints("heat", "b")
    assert not bool(between[0, 0].isnan())
    assert bool(between[0, 1].isnan())
    assert not bool(comparison.between_checkpoints("heat").isnan().any())


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x).tanh())


def test_bad_checkpoints_among_good_ones(tmp_path: Path) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        torch.save(Net().state_dict(), tmp_path / f"good_seed_{seed}.pt")
    torch.save(nn.Linear(4, 6).state_dict(), tmp_path / "misfit.pt")
    (tmp_path / "garbage.pt").write_bytes(b"no checkpoint")
    spoilt = Net()
    nn.init.constant_(spoilt.two.bias, math.nan)
    torch.save(spoilt.state_dict(), tmp_path / "spoilt.pt")
    data = cloud(0, 4)
    seen: list[tuple[str, int, int]] = []
    paths = [tmp_path, tmp_path / "missing.pt"]
    with pytest.warns(LFMWarning, match="4 could not be compared"):
        comparison = compare(
            Checkpoints(paths, Net, data, layers=["one", "two"]), progress=lambda *step: seen.append(step), **OPTIONS
        )
    reasons = {(failure.checkpoint, failure.layer): failure.reason for failure in comparison.failures}
    assert "must fit the model Net" in reasons["misfit", None]
    assert "do not read" in reasons["garbage", None]
    assert "existing file, got none" in reasons["missing", None]
    assert "got nan" in reasons["spoilt", "two"]
    assert {item.checkpoint for item in comparison.items} == {"good_seed_0", "good_seed_1", "spoilt"}
    assert seen[0] == ("representations", 0, 6)
    assert ("representations", 6, 6) in seen
    assert seen[-1] == ("pairs", 15, 15)
    assert comparison.settings["layers"] == ["one", "two"]


def test_nothing_left_is_an_error_with_the_first_reason(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_bytes(b"no checkpoint")
    (tmp_path / "b.pt").write_bytes(b"no checkpoint")
    with pytest.raises(
        ValueError, match=r"at least two that can be compared, got 0; 2 failed, the first: a: .*do not read"
    ):
        compare(Checkpoints(tmp_path, Net, cloud(0, 4), layers="one"), **OPTIONS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_basis": N}, r"n_basis must be between 1 and 79 \(less than the 80 samples\), got 80"),
        ({"n_neighbors": N}, "n_neighbors must be between 1 and 79"),
        ({"measures": ["hea"]}, "got 'hea'; did you mean 'heat'"),
        ({"measures": []}, "at least one measure"),
        ({"runs": {"A": ("run", 1)}}, "runs must be one of 'a', 'b', got 'A'"),
        ({"metric": "angle"}, "metric must be one of .*did you mean 'angular'"),
        ({"metric": "inner_product"}, "weights must be 'binary'"),
    ],
)
def test_settings_that_do_not_fit_are_errors_not_failures(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare({"a": cloud(1), "b": cloud(2)}, **(OPTIONS | options))


def test_other_input_is_refused() -> None:
    with pytest.raises(TypeError, match="mapping"):
        compare([cloud(1), cloud(2)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got none"):
        compare({})
    with pytest.raises(ValueError, match="got 1"):
        compare({"a": cloud(1)}, **OPTIONS)
    with pytest.raises(ValueError, match="at least 2 rows, got 1"):
        compare({"a": cloud(1)[:1], "b": cloud(2)[:1]}, **OPTIONS)
    with pytest.raises(TypeError, match="representations must have strings as names, got 0"):
        compare({0: cloud(1), 1: cloud(2)}, **OPTIONS)  # type: ignore[dict-item]
    with pytest.raises(TypeError, match=r"representations\['a'\] must have strings as names, got 3"):
        compare({"a": {3: cloud(1)}, "b": {3: cloud(2)}}, **OPTIONS)  # type: ignore[dict-item]


def test_a_representation_that_collapsed_is_a_failure_without_a_layer() -> None:
    with pytest.warns(LFMWarning, match="the first: flat: x must have rows that differ"):
        comparison = compare({"a": cloud(1), "flat": torch.ones(N, 6), "b": cloud(2)}, **OPTIONS)
    assert [(failure.checkpoint, failure.layer) for failure in comparison.failures] == [("flat", None)]


def test_interruption_goes_through() -> None:
    def stop(stage: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare({"a": cloud(1), "b": cloud(2)}, progress=stop, **OPTIONS)


def test_real_networks_match_layer_by_layer(real_data: Path) -> None:
    class CifarNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths, sizes, strides = (
                (3, 16, 16, 32, 32, 32, 64, 64, 64),
                (3, 3, 3, 3, 3, 3, 3, 1),
                (1, 1, 2, 1, 1, 2, 1, 1),
            )
            shapes = zip(widths[:-1], widths[1:], sizes, strides, strict=True)
            self.layers = nn.ModuleList(
                nn.Sequential(nn.Conv2d(i, o, k, stride=s), nn.BatchNorm2d(o), nn.ReLU()) for i, o, k, s in shapes
            )
            self.fc = nn.Linear(64, 10)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = layer(x)
            return self.fc(x.mean((2, 3)))

    images = (
        torch.from_numpy(np.load(real_data / "cifar10_probe.npz")["images"][:400]).permute(0, 3, 1, 2).float() / 255
    )
    mean, std = torch.tensor([[0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]]).view(2, 1, 3, 1, 1)
    files = [real_data / "cifar10_cnn" / f"model_seed_{seed}.pth" for seed in (0, 1)]
    checkpoints = Checkpoints(files, CifarNet, (images - mean) / std, layers=["layers.0", "layers.3", "layers.7"])
    comparison = compare(checkpoints, measures=["heat"], n_basis=20, n_neighbors=60)
    assert len(comparison.runs) == 2
    matching = comparison.layer_matching("heat")
    assert matching is not None
    assert matching.accuracy == 1.0


def test_measures_are_one_name_or_several() -> None:
    clouds = {"a": cloud(1), "b": cloud(2)}
    comparison = compare(clouds, measures=("cka", "heat", "heat", "linear_cka"), **OPTIONS)
    assert comparison.measures == ("linear_cka", "heat")
    assert comparison.matrix("cka") is comparison.matrix("linear_cka")
    assert torch.equal(compare(clouds, measures="heat", **OPTIONS).matrix("heat"), comparison.matrix("heat"))


def test_the_number_of_eigenvectors_goes_by_the_samples() -> None:
    clouds = {"a": cloud(1), "b": cloud(2)}
    found, wanted = compare(clouds), compare(clouds, n_basis=N // 4)
    assert found.settings["n_basis"] == N // 4
    assert all(torch.equal(found.matrix(name), wanted.matrix(name)) for name in found.measures)


@pytest.mark.parametrize("measures", [("heat",), ("mutual_knn",), ("heat", "mutual_knn")])
def test_what_is_to_be_said_of_a_representation_is_in_the_record(measures: Any, tmp_path: Path) -> None:
    """Once, with the name; and again where the work was in the store already."""
    x = torch.randn(100, 6)
    dead, far = x.clone(), x + 9
    dead[[3, 50]] = 0
    for _ in range(2):
        with pytest.warns(LFMWarning) as said:
            found = compare({"a": {"fc": x}, "b": {"fc": dead}, "c": {"fc": far}}, measures=measures, store=tmp_path)
        assert len(said) == 1
        count = 1 + ("heat" in measures)
        assert f"notes on {count} of 3 representations, the first: b, layer fc: 2 of 100 rows" in str(said[0].message)
        assert said[0].filename == __file__
        assert found.items[0].notes == ()
        assert found.items[1].notes[0].startswith("2 of 100 rows are zero")
        assert len(found.items[1].notes) == 1
        assert bool(found.items[2].notes) == ("heat" in measures)
    need("jinja2")
    found.report(tmp_path / "report")
    assert "2 of 100 rows are zero" in (tmp_path / "report" / "report.html").read_text("utf-8")


def with_holes() -> dict[str, Tensor]:
    """Four clouds; two have a row that is not finite, one is lost altogether."""
    clouds = {name: cloud(i) for i, name in enumerate("abcd")}
    clouds["a"][3, 1], clouds["b"][70, 0], clouds["d"][: N // 2 + 1] = math.nan, math.inf, math.nan
    return clouds


@pytest.mark.parametrize("stored", [False, True])
def test_samples_that_are_not_finite_are_left_out_everywhere(stored: bool, tmp_path: Path) -> None:
    clouds = with_holes()
    kept = [row for row in range(N) if row not in (3, 70)]
    with pytest.warns(LFMWarning) as caught:
        found = compare(clouds, measures=ALL, nonfinite="drop", store=tmp_path if stored else None)
    assert [str(warning.message) for warning in caught] == [
        "2 of 80 samples are left out everywhere, not finite in a (row 3), b (row 70)",
        "compare: 1 could not be compared and were left out, the first: d: the representation must be finite, got nan "
        f"in row 0 (column 0); {6 * (N // 2 + 1)} values are not finite",
    ]
    assert {warning.filename for warning in caught} == {__file__}
    wanted = compare({name: clouds[name][kept] for name in "abc"}, measures=ALL)
    assert found.settings["n_samples"] == N - 2
    assert found.settings["left_out"] == [3, 70]
    for name in ALL:
        assert torch.equal(found.matrix(name), wanted.matrix(name))
        assert torch.equal(found.chance[name], wanted.chance[name])


def test_layers_that_lost_samples_are_named() -> None:
    networks = {name: {"one": cloud(i), "two": cloud(i, 7)} for i, name in enumerate("ab")}
    networks["b"]["two"][[5, 6, 7, 8, 9]] = math.nan
    with pytest.warns(LFMWarning, match=r"5 of 80 samples .* in b, layer two \(row 5, 6, 7, 8 and 1 more\)$"):
        comparison = compare(networks, measures="cka", nonfinite="drop")
    assert not comparison.failures
    assert len(comparison.items) == 4


def test_what_is_left_out_is_part_of_every_name_in_the_store(tmp_path: Path) -> None:
    clouds = with_holes()
    del clouds["d"]
    options: dict[str, Any] = {"measures": ("heat", "linear_cka"), "nonfinite": "drop"}

    def files() -> dict[Path, int]:
        return {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}

    with pytest.warns(LFMWarning, match="2 of 80 samples"):
        first = compare(clouds, store=tmp_path, **options)
    before = files()
    with pytest.warns(LFMWarning, match="2 of 80 samples"):
        again = compare(clouds, store=tmp_path, **options)
    assert files() == before
    assert torch.equal(first.matrix("heat"), again.matrix("heat"))
    # a network more loses another sample: everything is another representation now
    clouds["e"] = cloud(9)
    clouds["e"][0, 0] = math.nan
    with pytest.warns(LFMWarning, match="3 of 80 samples"):
        more = compare(clouds, store=tmp_path, **options)
    kept = [row for row in range(N) if row not in (0, 3, 70)]
    wanted = compare({name: x[kept] for name, x in clouds.items()}, measures="heat")
    assert torch.equal(more.matrix("heat"), wanted.matrix("heat"))
    # nothing to leave out: the pieces are those of any comparison
    whole = {name: cloud(i) for i, name in enumerate("xy")}
    compare(whole, measures="heat", store=tmp_path)
    before = files()
    compare(whole, measures="heat", store=tmp_path, nonfinite="drop")
    assert {path for path in files() if path not in before} == {
        Store(tmp_path).path(piece.key)
        for piece in Store(tmp_path).ls()
        if piece.title in "xy" and piece.kind == "rows"
    }


def test_samples_left_out_of_checkpoints(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Linear(4, 6))
    for seed in range(2):
        torch.save(network.state_dict(), tmp_path / f"model_seed_{seed}.pt")
    data = cloud(0, 4)
    data[11] = math.nan
    with pytest.warns(LFMWarning, match=r"1 of 80 samples .* in model_seed_0, layer 0 \(row 11\), model_seed_1, layer"):
        comparison = compare(Checkpoints(tmp_path, network, data, layers="0"), nonfinite="drop", store=tmp_path / "s")
    assert comparison.settings["n_samples"] == N - 1


def test_too_few_samples_are_left() -> None:
    clouds = {name: cloud(i, n=8) for i, name in enumerate("ab")}
    clouds["a"][:4], clouds["b"][4:7] = math.nan, math.nan
    with pytest.raises(
        ValueError, match=r"nonfinite='drop' must leave at least 3 of 8 samples, got 1: not finite in a"
    ):
        compare(clouds, nonfinite="drop")
    with pytest.raises(ValueError, match="nonfinite must be one of 'raise', 'drop', got 'omit'"):
        compare(clouds, nonfinite="omit")  # type: ignore[arg-type]


def test_a_measure_below_chance_is_said() -> None:
    """Layers that are related score lower than shuffled rows under the paper's formula."""
    base = cloud(0, n=240)
    networks = {f"m{k}": base.tanh() + 0.3 * cloud(k, n=240) for k in range(1, 4)}
    with pytest.warns(LFMWarning, match="compare: lfm_paper is .* wrong side of chance.*read 'lfm'") as caught:
        comparison = compare(networks, measures=["lfm_paper", "lfm", "heat", "overlap"], n_neighbors=12, n_basis=10)
    assert len(caught) == 1
    assert list(comparison.below_chance()) == ["lfm_paper"]
    unrelated = {f"m{k}": cloud(k, n=240) for k in range(4)}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compare(unrelated, measures=["lfm_paper", "lfm", "heat", "overlap", "linear_cka"], n_neighbors=12, n_basis=10)


def test_what_is_to_be_known_of_many_stands_once(capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever the numbers in it: a line for every layer would bury the results."""
    need("rich")
    from lfm_torch.report.terminal import print_summary

    clouds = {name: torch.randn(60, 4) for name in "abcdef"}
    for count, name in enumerate("bcdef", start=1):
        clouds[name][:count] = 0
    with pytest.warns(LFMWarning, match="notes on 5 of 6"):
        found = compare(clouds, n_basis=5)
    (remark,) = found.remarks()
    assert [item.checkpoint for item in remark.items] == list("bcdef")
    layer = found.layers[0]
    print_summary(found)
    printed = capsys.readouterr().out
    assert printed.count("rows are zero") == 1
    assert "5 of 6 representations: 1 of 60 rows are zero" in printed
    assert f"(b, layer {layer}; c, layer {layer}; d, layer {layer}; 2 more)" in printed
