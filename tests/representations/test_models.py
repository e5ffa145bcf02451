from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import REPORT, need, needs
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm_torch.cli import main
from lfm_torch.comparison.jobs.plan import plan
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import Settings
from lfm_torch.comparison.run import compare
from lfm_torch.representations.checkpoint_files import find_checkpoints
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.models import Activations, Models, named_model

OPTIONS = {"n_basis": 6, "n_neighbors": 8}


def net(width: int = 6) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 5))


def probe() -> Tensor:
    return torch.randn(60, 4, generator=torch.Generator().manual_seed(0))


def folder(path: Path, *, shards: bool = False) -> None:
    """A checkpoint as a Trainer of transformers writes it."""
    path.mkdir(parents=True)
    state = net().state_dict()
    if shards:
        names = {key: f"model-0000{1 + k % 2}-of-00002.safetensors" for k, key in enumerate(state)}
        for file in set(names.values()):
            save_file({key: state[key] for key in names if names[key] == file}, path / file)
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    else:
        save_file(state, path / "model.safetensors")
    for other in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        torch.save({"state": 1}, path / other)


def test_folders_of_hugging_face_are_one_checkpoint_each(tmp_path: Path) -> None:
    folder(tmp_path / "run/checkpoint-500")
    folder(tmp_path / "run/checkpoint-1500", shards=True)
    found = find_checkpoints(tmp_path / "run")
    assert [(c.name, c.run, c.step) for c in found] == [
        ("checkpoint-500", "run", 500),
        ("checkpoint-1500", "run", 1500),
    ]
    source = Checkpoints(found, net(), probe(), layers=["0", "2"])
    comparison = compare(source, store=tmp_path / "store", **OPTIONS)
    assert comparison.failures == ()
    assert [t.steps for t in comparison.trajectories("heat")] == [(500, 1500)]
    # a shard that changes is another checkpoint, also where the index stays as it is
    before = source.identities("checkpoint-1500", lambda path, compute: compute(path))
    shard = tmp_path / "run/checkpoint-1500/model-00001-of-00002.safetensors"
    save_file({key: x + 1 for key, x in __import__("safetensors.torch").torch.load_file(shard).items()}, shard)
    assert source.identities("checkpoint-1500", lambda path, compute: compute(path)) != before


def test_an_index_names_files_beside_it_only(tmp_path: Path) -> None:
    folder(tmp_path / "checkpoint-1", shards=True)
    index = tmp_path / "checkpoint-1/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"0.weight": "/etc/passwd"}}))
    source = Checkpoints([index], net(), probe(), layers="0")
    with pytest.raises(FileNotFoundError, match="checkpoint-1/passwd must be an existing file"):
        source["checkpoint-1"]
    index.write_text("no json")
    with pytest.raises(ValueError, match="an index of shards"):
        source["checkpoint-1"]


def test_models_of_different_widths_are_compared_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # stands for the package, which needs a torchvision of its own
    timm = types.ModuleType("timm")

    def create_model(name: str, *, pretrained: bool) -> nn.Module:
        if not name.startswith("net"):
            raise RuntimeError(f"Unknown model ({name})")
        torch.manual_seed(int(pretrained))
        return net(int(name[3:]))

    timm.create_model = create_model  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "timm", timm)
    source = Models(["timm:net6", "timm:net9"], probe(), layers="*")
    comparison = compare(source, store=tmp_path, **OPTIONS)
    assert comparison.layers == ("0", "1", "2")
    assert compare(source, store=tmp_path, **OPTIONS).matrix("heat").equal(comparison.matrix("heat"))
    with pytest.raises(ValueError, match=r"'timm:other' must name a model of timm, got RuntimeError: Unknown model"):
        named_model("timm:other")

    def offline(name: str, pretrained: bool) -> nn.Module:
        raise OSError("Name or service not known")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(ValueError, match=r"'timm:net6' could not be loaded by timm: .*Name or service not known"):
        named_model("timm:net6")
    with pytest.raises(ValueError, match="got 'tim'; did you mean 'timm'"):
        named_model("tim:net6")
    with pytest.raises(ValueError, match="origin:name"):
        named_model("resnet18")
    monkeypatch.setitem(sys.modules, "torchvision.models", None)
    with pytest.raises(ImportError, match="'torchvision:resnet18' needs torchvision, which does not import"):
        named_model("torchvision:resnet18")


@pytest.mark.parametrize("kind", ["npy", "npz", "pt", "safetensors"])
def test_saved_activations_are_read_as_they_are(tmp_path: Path, kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    layers = {name: torch.randn(40, 5, generator=generator) for name in ("a", "b")}
    for seed in range(2):
        path, saved = tmp_path / f"model_seed_{seed}.{kind}", {name: x + seed for name, x in layers.items()}
        if kind == "npy":
            np.save(path, saved["a"].numpy().astype(">f4"))
        elif kind == "npz":
            np.savez(path, **{name: x.numpy() for name, x in saved.items()})
        elif kind == "pt":
            torch.save(saved, path)
        else:
            save_file(saved, path)
    source = Activations(tmp_path)
    found = source["model_seed_1"]
    assert next(iter(found.values())).equal(layers["a"] + 1)
    comparison = compare(source, store=tmp_path / "store", measures=["heat"], **OPTIONS)
    assert comparison.layers == (("representation",) if kind == "npy" else ("a", "b"))
    assert (
        compare(source, store=tmp_path / "store", measures=["heat"], **OPTIONS)
        .matrix("heat")
        .equal(comparison.matrix("heat"))
    )


def test_activations_that_are_none_fail_alone(tmp_path: Path) -> None:
    for seed in range(2):
        np.save(tmp_path / f"good{seed}.npy", np.random.default_rng(seed).normal(size=(30, 4)))
    np.save(tmp_path / "object.npy", np.array([{}], dtype=object), allow_pickle=True)
    (tmp_path / "short.npz").write_bytes(b"PK\x03\x04")
    with pytest.warns(UserWarning, match="2 could not be compared"):
        comparison = compare(Activations(tmp_path), store=tmp_path / "store", **OPTIONS)
    assert {failure.checkpoint for failure in comparison.failures} == {"object", "short"}


def test_a_plan_counts_what_is_to_do(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(net().state_dict(), tmp_path / f"model_seed_{seed}.pt")
    settings = Settings(("heat", "linear_cka"), 8, 6, "angular", "gaussian")
    first = Checkpoints(sorted(tmp_path.glob("*.pt"))[:2], net(), probe(), layers=["0", "2"])
    found = plan(first, settings, None)
    assert (found.checkpoints, found.representations, found.stored, found.pairs) == (2, 4, 0, 10)
    assert found.samples == 60
    assert found.seconds is not None
    assert 0 < found.seconds < 60
    store = Store(tmp_path / "store")
    compare(first, measures=["heat", "linear_cka"], store=store, **OPTIONS)
    assert plan(first, settings, store).pairs == 0
    more = Checkpoints([tmp_path, tmp_path / "missing.pt"], net(), probe(), layers=["0", "2"])
    found = plan(more, settings, store)
    assert (found.representations, found.stored, found.pairs) == (6, 4, 2 * 4 + 3)
    assert "missing" in found.problems[0]
    with pytest.raises(ValueError, match="n_basis must be between"):
        plan(first, Settings(("heat",), None, 60, "angular", "gaussian"), None)
    assert not math.isnan(found.seconds or 0)


@needs("transformers", *REPORT)
def test_folders_of_transformers_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two models of different width, saved as the package saves them, and token ids as the probe."""
    transformers = need("transformers")
    for width in (16, 24):
        torch.manual_seed(width)
        config = transformers.BertConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, vocab_size=20
        )
        transformers.BertModel(config).save_pretrained(tmp_path / f"bert{width}")
    ids = torch.randint(1, 20, (60, 8), generator=torch.Generator().manual_seed(0))
    torch.save({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, tmp_path / "probe.pt")
    names = [f"transformers:{tmp_path / name}" for name in ("bert16", "bert24")]
    data = torch.load(tmp_path / "probe.pt")
    comparison = compare(Models(names, data, layers="encoder.layer.*.output"), store=tmp_path / "store", **OPTIONS)
    assert comparison.failures == ()
    assert comparison.layers == ("encoder.layer.0.output", "encoder.layer.1.output")
    options = ["--layers", "encoder.layer.?", "--data", "saved_probe:tokens", "--n-basis", "6", "--n-neighbors", "8"]
    (tmp_path / "saved_probe.py").write_text(f"import torch\ntokens = torch.load({str(tmp_path / 'probe.pt')!r})\n")
    sys.path.insert(0, str(tmp_path))
    try:
        status = main(["compare", *names, *options, "--out", str(tmp_path / "report"), "--json"])
    finally:
        sys.path.remove(str(tmp_path))
    assert status == 0
    assert json.loads(capsys.readouterr().out)["layers"] == ["encoder.layer.0", "encoder.layer.1"]
    # weights that are pickles are refused, with the reason
    (tmp_path / "bert16/model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"bert16' could not be loaded by transformers: .*safetensors"):
        named_model(names[0])


@pytest.mark.parametrize(("package", "name"), [("timm", "timm:resnet10t"), ("torchvision", "torchvision:resnet18")])
def test_a_real_package_makes_the_model(package: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With random weights: what is asked of the package is right, only the download is left out."""
    try:
        module = __import__(package)
    except (ImportError, RuntimeError) as error:  # RuntimeError: a torchvision built for another torch
        pytest.skip(f"{package} does not import: {error}")
    if package == "timm":
        create_model = module.create_model
        monkeypatch.setattr(module, "create_model", lambda name, pretrained: create_model(name))
    else:
        get_model = module.models.get_model
        monkeypatch.setattr(module.models, "get_model", lambda name, weights: get_model(name))
    images = torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    comparison = compare(
        Models([name, name.replace("18", "34").replace("10t", "14t")], images, layers="layer?"), **OPTIONS
    )
    assert comparison.failures == ()
    assert comparison.layers == ("layer1", "layer2", "layer3", "layer4")
