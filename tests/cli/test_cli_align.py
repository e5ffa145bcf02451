"""``lfm-torch align``: what it prints and writes, and that it fails where there is nothing to find."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lfm_torch.alignment.translator import Translator
from lfm_torch.cli import main
from lfm_torch.maps.fmap import FunctionalMap


@pytest.fixture
def arrays(tmp_path: Path) -> tuple[str, str, torch.Tensor]:
    x, order = torch.randn(120, 5), torch.randperm(120)
    y = (x @ torch.linalg.qr(torch.randn(5, 5)).Q)[order]
    np.savez(tmp_path / "two.npz", x=x.numpy(), y=y.numpy(), noise=torch.randn(120, 5).numpy())
    np.save(tmp_path / "anchors.npy", torch.stack([order[:4], torch.arange(4)], 1).numpy())
    return f"{tmp_path / 'two.npz'}:x", f"{tmp_path / 'two.npz'}:y", order


def test_it_writes_what_it_found(
    arrays: tuple[str, str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    x, y, order = arrays
    out = tmp_path / "out"
    assert main(["align", x, y, "--anchors", str(tmp_path / "anchors.npy"), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "Alignment(120 x 120 rows by descriptors" in printed
    assert "120 pairs of rows; Translator(orthogonal, 5 -> 5" in printed
    assert torch.equal(load_file(out / "correspondence.safetensors")["idx_yx"], order)
    assert Translator.load(out / "translator.safetensors").kind == "orthogonal"
    assert FunctionalMap.load(out / "map.safetensors").C.dim() == 2


def test_without_anchors_as_json(arrays: tuple[str, str, torch.Tensor], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["align", *arrays[:2], "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["found"] is True
    assert values["pairs"] == 120
    assert values["confidence"] > 0.9 > values["chance"]


def test_nothing_to_find_is_a_failure(
    arrays: tuple[str, str, torch.Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    noise = arrays[0].replace(":x", ":noise")
    assert main(["align", arrays[0], noise, "--out", str(tmp_path / "out")]) == 1
    assert "no alignment found" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["align", arrays[0], noise, "--anchors", "absent.npy"]) == 1
    assert "absent.npy" in capsys.readouterr().err
