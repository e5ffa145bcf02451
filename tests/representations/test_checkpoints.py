from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile_files import Bomb
from torch import Tensor, nn

from lfm_torch.representations.checkpoint_files import Checkpoint
from lfm_torch.representations.checkpoints import Checkpoints


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def test_checkpoints_are_read_one_at_a_time_with_their_own_weights(tmp_path: Path) -> None:
    models = {name: Net().eval() for name in ("a", "b")}
    for name, model in models.items():
        torch.save(model.state_dict(), tmp_path / f"{name}.pt")
    torch.save({"state_dict": Bomb(tmp_path / "executed")}, tmp_path / "c.pt")
    data = torch.randn(7, 3)
    rng = torch.get_rng_state()
    found = Checkpoints(tmp_path, Net, data, layers=["head"])
    torch.testing.assert_close(torch.get_rng_state(), rng)
    assert list(found) == ["a", "b", "c"]
    for name, model in models.items():
        torch.testing.assert_close(found[name]["head"], model(data).detach())
    with pytest.raises(ValueError, match="refused"):
        found["c"]
    assert not (tmp_path / "executed").exists()


def test_what_is_wrong_for_every_checkpoint_is_said_at_once(tmp_path: Path) -> None:
    (tmp_path / "²").mkdir()
    for name in ("a.pt", "²/1²2.pt"):
        (tmp_path / name).touch()
    with pytest.raises(TypeError, match="data must be a tensor"):
        Checkpoints(tmp_path, Net, 3, layers="head")
    with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
        Checkpoints(tmp_path, Net, torch.ones(2, 3), layers="head", batch_size=0)
    with pytest.raises(ValueError, match="pooling must be one of"):
        Checkpoints(tmp_path, Net, torch.ones(2, 3), layers="head", pooling="max")  # type: ignore[arg-type]


def test_checkpoints_refuse_what_is_no_model_or_list(tmp_path: Path) -> None:
    (tmp_path / "a.pt").touch()
    with pytest.raises(TypeError, match=r"make a torch.nn.Module, got int"):
        Checkpoints(tmp_path, lambda: 3, torch.ones(2, 3), layers="head")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="a function that makes one, got str"):
        Checkpoints(tmp_path, "Net", torch.ones(2, 3), layers="head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mixture"):
        Checkpoints([tmp_path, Checkpoint("a", "a", None, tmp_path / "a.pt")], Net, torch.ones(2, 3), layers="head")
    with pytest.raises(ValueError, match="names that differ"):
        Checkpoints([Checkpoint("a", "a", None, tmp_path / "a.pt")] * 2, Net, torch.ones(2, 3), layers="head")
