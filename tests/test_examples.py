"""The examples run, and on the real networks they show what the README says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    if not path.exists():
        pytest.skip("the examples are not beside the tests")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_cifar10_layers(real_data: Path, tmp_path: Path) -> None:
    accuracy = load("cifar10_layers").main(["--data", str(real_data), "--models", "3", "--out", str(tmp_path)])
    # 48 decisions of the 336 that the README's table counts
    assert accuracy["lfm"] >= 0.90
    assert accuracy["overlap"] >= 0.95
    assert accuracy["heat"] >= 0.95
    assert {path.name for path in tmp_path.iterdir()} >= {"report.html", "similarity.csv", "cifar10_layers.json"}


@pytest.mark.slow
def test_word_retrieval(real_data: Path, tmp_path: Path) -> None:
    data = ["--data", str(real_data / "word_embeddings.npz")]
    options = ["--seeds", "1", "--anchors", "0", "5", "--no-controls", "--out", str(tmp_path)]
    table = load("word_retrieval").main([*data, *options])["table"]
    assert [row["found"] for row in table] == [1, 1]
    assert min(row["share of ceiling"] for row in table) > 0.99
    assert table[1]["LFM + orthogonal"] > 10 * max(table[1][name] for name in ("anchors, orthogonal", "relative"))
    assert {path.name for path in tmp_path.iterdir()} == {"word_retrieval.png", "word_retrieval.json"}


def test_an_example_without_its_data_says_what_it_wants(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a folder with --data"):
        load("cifar10_layers").main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="no folder"):
        load("cifar10_layers").main(["--data", str(tmp_path / "absent")])
