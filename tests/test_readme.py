"""What the README shows works as it stands there: its Python runs, its images exist, its options are options."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from extras import REPORT, needs
from torch import nn

import lfm_torch as lfm
from lfm_torch.cli import main


@pytest.fixture(scope="module")
def readme() -> str:
    path = ROOT / "README.md"
    if not path.exists():
        pytest.skip("the README is not beside the tests")
    return path.read_text("utf-8")


def blocks(readme: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", readme, re.M | re.S)


def network() -> nn.Module:
    module = nn.Module()
    module.layers = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8))
    module.forward = module.layers.forward
    return module


def names_of_the_reader() -> dict[str, Any]:
    """What the README leaves to its reader to have."""
    points = torch.randn(300, 5)
    rotation = torch.linalg.qr(torch.randn(5, 5)).Q

    class Trainer:
        def __init__(self, callbacks: list[Any]) -> None:
            assert [type(callback).__name__ for callback in callbacks] == ["LFMCallback"]
            self.fit: Callable[..., None] = lambda module, loader: None

    def train(model: nn.Module) -> None:
        with torch.no_grad():
            model.layers[0].weight.mul_(1.1)

    student = torch.randn(200, 8, requires_grad=True)
    return {
        "torch": torch,
        "lfm": lfm,
        "x": points,
        "y": (points @ rotation)[torch.randperm(300)],
        "x_new": torch.randn(7, 5),
        "encoder_a": nn.Linear(3, 5),
        "decoder_b": nn.Linear(5, 3),
        "Trainer": Trainer,
        "module": network(),
        "loader": None,
        "model": network(),
        "train": train,
        "epochs": 2,
        "probe": torch.randn(200, 6),
        "task_loss": student.square().mean(),
        "student_features": student,
        "teacher_features": torch.randn(200, 4),
    }


@pytest.mark.parametrize(
    "index",
    [
        pytest.param(0, marks=needs(*REPORT)),
        1,
        pytest.param(2, marks=needs("pytorch_lightning", "matplotlib")),
    ],
)
def test_python_runs(readme: str, index: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = blocks(readme, "python")
    assert len(code) == 3
    names = names_of_the_reader()
    exec(compile(code[index], f"README.md, Python block {index}", "exec"), names)
    if index == 0:
        assert (tmp_path / "out" / "report.html").exists()
    if index == 1:
        assert names["alignment"].found
    if index == 2:
        assert len(names["monitor"].history) >= 2
        names["loss"].backward()
        assert names["student_features"].grad.isfinite().all()


def test_images_exist(readme: str) -> None:
    images = re.findall(r"!\[[^\]]{20,}\]\(([^)]+)\)", readme)
    assert len(images) == readme.count("![")
    assert [path for path in images if not (ROOT / path).exists()] == []


def test_options_exist(readme: str, capsys: pytest.CaptureFixture[str]) -> None:
    used = re.findall(r"(?:lfm-torch|lfm_torch\.cli) ([a-z]+)([^\n#]*)", "\n".join(blocks(readme, "sh")))
    assert {command for command, _ in used} >= {"compare", "similarity", "align", "info"}
    for command, rest in used:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        known = re.findall(r"--[a-z-]+", capsys.readouterr().out)
        assert set(re.findall(r"--[a-z-]+", rest)) <= set(known), command
