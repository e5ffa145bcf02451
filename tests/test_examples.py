"""The examples run, and on the real networks they show what the README says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
from checkout import ROOT
from extras import need

EXAMPLES = ROOT / "examples"
# what each imports, beside the library itself
PACKAGES = {
    "callback_lightning": ("pytorch_lightning", "tensorboard", "sklearn", "matplotlib"),
    "distill": ("sklearn",),
    "robustness": ("sklearn", "matplotlib"),
}


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Examples import what they share, as scripts do."""
    monkeypatch.syspath_prepend(EXAMPLES)


def load(name: str) -> ModuleType:
    path = EXAMPLES / f"{name}.py"
    if not path.exists():
        pytest.skip("the examples are not beside the tests")
    for package in PACKAGES.get(name, ("matplotlib",)):
        need(package)
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_layer_matching(real_data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(real_data), "--models", "3", "--measures", "lfm", "overlap", "heat", "linear_cka"]
    found = load("layer_matching").main([*arguments, "--out", str(tmp_path)])["mean"]
    # 48 decisions of the 336 that the README's table counts
    assert found["lfm"]["accuracy"] >= 0.90
    assert found["overlap"]["accuracy"] >= 0.95
    assert found["heat"]["accuracy"] >= 0.95
    assert 0 < found["heat"]["stderr"] < 0.05 or found["heat"]["accuracy"] == 1
    assert {path.name for path in tmp_path.iterdir()} >= {"mean", "layer_matching.png", "layer_matching.json"}


@pytest.mark.slow
def test_word_retrieval(real_data: Path, tmp_path: Path) -> None:
    data = ["--data", str(real_data / "word_embeddings.npz")]
    options = ["--seeds", "1", "--anchors", "0", "5", "--no-controls", "--out", str(tmp_path)]
    table = load("word_retrieval").main([*data, *options])["table"]
    assert [row["found"] for row in table] == [1, 1]
    assert min(row["share of ceiling"] for row in table) > 0.99
    assert table[1]["LFM + orthogonal"] > 10 * max(table[1][name] for name in ("anchors, orthogonal", "relative"))
    assert {path.name for path in tmp_path.iterdir()} == {"word_retrieval.png", "word_retrieval.json"}


@pytest.mark.slow
def test_robustness(real_data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(real_data), "--images", "800", "--steps", "2", "--out", str(tmp_path)]
    rows = load("robustness").main(arguments)["rows"]
    for name in ("lfm", "heat"):
        assert rows["80"][name] > 0.85 > 0.5 > rows["80"]["linear_cka"]
        assert rows["3.3"][name] > 0.94 > rows["3.3"]["published"]
    assert rows["10"]["auc"] > 0.9
    assert {path.name for path in tmp_path.iterdir()} >= {"robustness.png", "distortion.png", "robustness.json"}


@pytest.mark.slow
def test_stitching(real_data: Path, tmp_path: Path) -> None:
    options = ["--anchors", "5", "--seeds", "1", "--epochs", "6", "--train-images", "1000", "--latent", "16"]
    options += ["--graph-images", "500", "--out", str(tmp_path)]
    result = load("stitching").main(["--data", str(real_data), *options])
    # hardly trained, for the time it takes: the decoder does little yet, the classifiers tell the digits apart
    (few,) = result["classifier"]["rows"]
    assert few["LFM"] > 0.95 * result["classifier"]["all pairs"]
    assert few["LFM"] > few["anchors"] + 0.1
    assert few["LFM"] > few["relative"]
    assert {path.name for path in tmp_path.iterdir()} == {"stitching.png", "stitching.json"}


@pytest.mark.slow
def test_label_transfer(real_data: Path, tmp_path: Path) -> None:
    options = ["--models", "2", "--anchors", "5", "50", "--images", "800", "--out", str(tmp_path)]
    result = load("label_transfer").main(["--data", str(real_data), *options])
    few, many = result["rows"]
    assert many["LFM + orthogonal"] > 0.9 * result["within one network"]
    assert many["LFM, functions"] > 0.8 * result["within one network"]
    assert few["LFM + orthogonal"] > few["anchors, orthogonal"]
    assert {path.name for path in tmp_path.iterdir()} == {"label_transfer.png", "label_transfer.json"}


@pytest.mark.parametrize("name", ["layer_matching", "robustness", "label_transfer"])
def test_an_example_without_its_data_says_what_it_wants(name: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="name a folder with --data"):
        load(name).main(["--data", str(tmp_path)])
    with pytest.raises(SystemExit, match="no folder"):
        load(name).main(["--data", str(tmp_path / "absent")])


def test_callback_lightning(tmp_path: Path) -> None:
    found = load("callback_lightning").main(["--out", str(tmp_path), "--epochs", "2"])
    assert [epoch for epoch, _ in found["initial"]] == [0, 1, 2]
    # the second epoch moves every layer less than the first, which begins at random weights
    assert all(found["previous"][2][1][layer] > found["previous"][1][1][layer] for layer in found["previous"][1][1])
    assert (tmp_path / "lfm-initial" / "curves.png").exists()
    assert list(tmp_path.rglob("events.out.tfevents*"))


# features of a student without training lie far from the origin
@pytest.mark.filterwarnings("ignore:.*the mean of the rows:lfm_torch.LFMWarning")
def test_distill(tmp_path: Path) -> None:
    table = load("distill").main(["--seeds", "1", "--epochs", "2", "--out", str(tmp_path / "table.json")])
    assert list(table) == ["none", "linear CKA", "LFM, exact (heat)", "Dirichlet energy"]
    # two epochs are no comparison; what must hold from the start is that the gradients point the right way
    assert all(row["overlap"] > table["none"]["overlap"] for name, row in table.items() if name != "none")
