from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from extras import REPORT, need, needs
from small_networks import OPTIONS, net, probe
from torch import nn

from lfm_torch.cli import main
from lfm_torch.comparison.run import compare
from lfm_torch.representations.models import Models, named_model


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
