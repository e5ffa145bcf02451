from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from clouds import cloud, rotated
from extras import need, needs
from torch import Tensor

from lfm_torch import similarity
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare

OPTIONS: dict[str, Any] = {"n_basis": 8, "n_neighbors": 12}
ALL = ("lfm", "lfm_paper", "overlap", "heat", "linear_cka")


@pytest.fixture(scope="module")
def planted() -> Comparison:
    """Three networks whose layers are the same clouds up to rotation and scale: only equal layers are alike."""
    layers = {"a": cloud(1), "b": cloud(2, 7), "c": cloud(3)}
    networks = {
        f"net{k}": {name: rotated(x, 10 * k + i, 0.5 + k) for i, (name, x) in enumerate(layers.items())}
        for k in range(3)
    }
    return compare(networks, measures=ALL, **OPTIONS)


def test_equal_layers_of_different_networks_are_found(planted: Comparison) -> None:
    for measure in ALL:
        values = planted.between_layers(measure)
        torch.testing.assert_close(values.diagonal(), torch.ones(3), atol=2e-3, rtol=0)
        assert float(values.masked_fill(torch.eye(3, dtype=torch.bool), 0).max()) < 0.95
        matching = planted.layer_matching(measure)
        assert matching is not None
        assert (matching.accuracy, matching.n_decisions, matching.chance) == (1.0, 18, 1 / 3)


def training(seed: int) -> dict[str, dict[str, Tensor]]:
    start, end = cloud(seed), cloud(100)
    mixed = {step: (1 - t) * start + t * end for step, t in [(0, 0.0), (1, 0.5), (10, 0.9)]}
    return {f"seed{seed}/epoch={step}": {"one": x, "two": rotated(x, 5).exp()} for step, x in mixed.items()}


@pytest.fixture(scope="module")
def runs() -> Comparison:
    # given out of order: steps put them right
    given = dict(reversed(list((training(1) | training(2)).items())))
    return compare(given, measures=["heat", "lfm"], **OPTIONS)


def test_runs_and_steps_come_from_the_names(runs: Comparison) -> None:
    assert [(c.run, c.step) for c in runs.checkpoints] == [(f"seed{s}", e) for s in (1, 2) for e in (0, 1, 10)]
    assert runs.finals == ["seed1/epoch=10", "seed2/epoch=10"]
    assert [item.checkpoint for item in runs.items[:2]] == ["seed1/epoch=0"] * 2


def test_trajectories_rise_to_the_final_checkpoint(runs: Comparison) -> None:
    # "lfm" is left out here: between unrelated clouds it can be near 1 (see chance)
    for trajectory in runs.trajectories("heat"):
        assert trajectory.steps == (0, 1, 10)
        assert bool((trajectory.values.diff(dim=0) > 0).all())
        torch.testing.assert_close(trajectory.values[-1], torch.ones(2), atol=1e-4, rtol=0)
    points = training(1)
    first = similarity(points["seed1/epoch=0"]["two"], points["seed1/epoch=10"]["two"], measures=["lfm"], **OPTIONS)[
        "lfm"
    ]
    torch.testing.assert_close(runs.trajectories("lfm")[0].values[0, 1], first, atol=1e-5, rtol=0)


def test_views_are_means_of_the_full_matrix(runs: Comparison) -> None:
    names = [checkpoint.name for checkpoint in runs.checkpoints]
    full = runs.matrix("lfm")
    index = {(item.checkpoint, item.layer): i for i, item in enumerate(runs.items)}

    def value(a: str, la: str, b: str, lb: str) -> float:
        return float(full[index[a, la], index[b, lb]])

    one = runs.between_checkpoints("lfm", "one")
    assert float(one[1, 4]) == value(names[1], "one", names[4], "one")
    wanted = sum(value(names[1], layer, names[4], layer) for layer in runs.layers) / 2
    assert float(runs.between_checkpoints("lfm")[1, 4]) == pytest.approx(wanted)
    a, b = runs.finals
    wanted = (value(a, "one", b, "two") + value(b, "one", a, "two")) / 2
    assert float(runs.between_layers("lfm")[0, 1]) == pytest.approx(wanted)
    pair = runs.between_layers("lfm", checkpoints=names[:2])
    assert float(pair[1, 0]) == pytest.approx(
        (value(names[0], "two", names[1], "one") + value(names[1], "two", names[0], "one")) / 2
    )
    with pytest.raises(ValueError, match=r"layer must be one of 'one', 'two', got 'ones'; did you mean 'one'"):
        runs.between_checkpoints("lfm", "ones")
    with pytest.raises(ValueError, match="measure must be one of"):
        runs.matrix("cka")


@needs("pandas", "pyarrow")
def test_tables_hold_every_ordered_pair(runs: Comparison, tmp_path: Path) -> None:
    frame = runs.to_pandas()
    assert len(frame) == 12**2
    row = frame.iloc[12 * 3 + 8]
    assert (row.x_checkpoint, row.x_layer, row.x_run, row.x_step) == ("seed1/epoch=1", "two", "seed1", 1)
    assert row.lfm == pytest.approx(float(runs.matrix("lfm")[3, 8]), abs=1e-8)
    pandas = need("pandas")
    parquet = pandas.read_parquet(runs.save(tmp_path / "all.parquet"))
    pandas.testing.assert_frame_equal(parquet, frame)
    assert torch.tensor(frame["heat"].tolist()).view(12, 12).equal(runs.matrix("heat"))


def test_a_table_of_text_holds_every_bit(runs: Comparison, tmp_path: Path) -> None:
    with runs.save(tmp_path).open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert torch.tensor([float(row["heat"]) for row in rows]).view(12, 12).equal(runs.matrix("heat"))
    assert [row["y_checkpoint"] for row in rows[:12]] == [item.checkpoint for item in runs.items]
    with pytest.raises(ValueError, match=r"end on .csv or .parquet, got 'a.xlsx'"):
        runs.save(tmp_path / "a.xlsx")
