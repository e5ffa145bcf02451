from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm_torch.representations.state_dicts import load_weights


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


def test_weights_are_found_under_the_keys_and_prefixes_of_training_loops(tmp_path: Path) -> None:
    trained = Net()
    state = trained.state_dict()
    torch.save(state, tmp_path / "plain.pt")
    save_file(state, tmp_path / "plain.safetensors")
    lightning = {f"model.{name}": value for name, value in state.items()} | {"loss.weight": torch.ones(2)}
    torch.save({"state_dict": lightning, "epoch": 3, "hyper_parameters": {"lr": 0.1}}, tmp_path / "lightning.ckpt")
    torch.save({f"module._orig_mod.{name}": value for name, value in state.items()}, tmp_path / "compiled.pt")
    torch.save({"model_state_dict": state, "optimizer": {"lr": 1}}, tmp_path / "loop.pth")
    old = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "old.pt")
    for file in tmp_path.iterdir():
        model = Net()
        load_weights(model, file)
        torch.testing.assert_close(dict(model.named_parameters()), dict(trained.named_parameters()), rtol=0, atol=0)


def test_a_whole_module_loads_only_when_pickles_are_allowed(tmp_path: Path) -> None:
    torch.save(Net(), tmp_path / "module.pt")
    with pytest.raises(ValueError, match=r"names the code '.*Net'.*--unsafe-pickle"):
        load_weights(Net(), tmp_path / "module.pt")
    load_weights(Net(), tmp_path / "module.pt", unsafe_pickle=True)


def test_a_misfit_lists_what_does_not_fit_and_leaves_the_model_alone(tmp_path: Path) -> None:
    model = Net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = {name.replace("head", "heads"): value for name, value in Net().state_dict().items()}
    torch.save(state, tmp_path / "renamed.pt")
    wanted = (
        r"fit the model Net, got 2 missing \(head.bias, head.weight\); 2 unexpected .* 'heads.bias' is near the missing"
    )
    with pytest.raises(ValueError, match=wanted):
        load_weights(model, tmp_path / "renamed.pt")
    torch.save(Net(width=5).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(
        ValueError, match=r"of another shape \(layers.0.weight: \[4, 3\] in the model, \[5, 3\] in the file"
    ):
        load_weights(model, tmp_path / "wide.pt")
    torch.save({"epoch": 3}, tmp_path / "empty.pt")
    with pytest.raises(ValueError, match=r"must hold a state dict.*got the keys 'epoch'"):
        load_weights(model, tmp_path / "empty.pt")
    two = {f"{side}.{name}": value for side in ("student", "teacher") for name, value in before.items()}
    torch.save(two, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"several, under 'student.', 'teacher.'"):
        load_weights(model, tmp_path / "two.pt")
    torch.testing.assert_close(dict(model.state_dict()), before, rtol=0, atol=0)
