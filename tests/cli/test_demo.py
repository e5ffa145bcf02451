from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from extras import REPORT, needs
from processes import environment

from lfm_torch.cli import demo

pytestmark = needs("sklearn")


def test_the_probe_is_held_out() -> None:
    images, labels = demo.digits()
    assert images.shape == (1797, 1, 8, 8)
    assert (float(images.min()), float(images.max())) == (0.0, 1.0)
    assert len(labels) == 1797
    torch.testing.assert_close(demo.probe_images(), images[demo.N_TRAINING :])


@needs("pytorch_lightning")
def test_training_saves_checkpoints_that_load_safely(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "SEEDS", (0,))
    monkeypatch.setattr(demo, "SAVED_EPOCHS", (0, 1))
    state = torch.get_rng_state()
    accuracy = demo.train(tmp_path)
    torch.testing.assert_close(torch.get_rng_state(), state)
    assert accuracy["seed0"] > 0.3  # one epoch; guessing gives 0.1
    saved = torch.load(tmp_path / "seed0" / "epoch=01.ckpt", weights_only=True)["state_dict"]
    assert set(saved) == {f"model.{name}" for name in demo.DigitsCNN().state_dict()}
    assert (tmp_path / "seed0" / "epoch=00.ckpt").exists()


@needs("pytorch_lightning")
def test_ctrl_c_in_training_is_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:

    def stop(self: demo.DigitsCNN, x: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo.DigitsCNN, "forward", stop)
    with pytest.raises(KeyboardInterrupt):
        demo.train(tmp_path)


@pytest.mark.slow
@needs("pytorch_lightning", *REPORT)
def test_the_demo_shows_what_the_method_promises(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lfm_torch.cli", "demo", "--out", str(tmp_path), "--json"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""  # nothing of Lightning's
    content = json.loads(done.stdout)
    heat = content["measures"]["heat"]
    assert heat["layer_matching"]["accuracy"] >= 0.9
    assert content["measures"]["overlap"]["layer_matching"]["accuracy"] >= 0.9
    assert content["measures"]["lfm"]["layer_matching"]["accuracy"] >= 0.6  # guessing gives 0.25
    assert len(heat["trajectories"]) == 3
    for measure in content["measures"].values():
        means = [
            sum(sum(values) / len(values) for values in step) / 3
            for step in zip(*(run["values"] for run in measure["trajectories"]), strict=True)
        ]
        assert all(later > earlier for earlier, later in pairwise(means))
    assert (tmp_path / "report.html").exists()
