from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile_files import Bomb
from safetensors.torch import save_file
from torch import Tensor, nn

from lfm_torch.representations.checkpoint_files import Checkpoint, find_checkpoints, parse_name
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.state_dicts import load_weights


class Net(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width))
        self.head = nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x))


@pytest.mark.parametrize(
    ("name", "run", "step"),
    [
        ("seed0/epoch=04", "seed0", 4),
        ("seed0/epoch=04-step=75", "seed0", 4),
        ("step=100-epoch=2", "root", 2),
        ("epoch=3-val_loss=0.31", "root", 3),
        ("epoch=03-v1", "root", 3),
        ("resnet_epoch_12", "resnet", 12),
        ("a/b/ckpt-500", "a/b", 500),
        ("run1/checkpoint_100", "run1", 100),
        ("000100", "root", 100),
        ("net-epoch-4-seed1", "net-seed1", 4),
        ("model_seed_3", "model_seed_3", None),
        ("e5-large", "e5-large", None),
        ("last", "root", None),
        ("x/last", "x", None),
        ("best", "best", None),
        ("²", "²", None),
    ],
)
def test_names_tell_run_and_step(name: str, run: str, step: int | None) -> None:
    assert parse_name(name, root="root") == (run, step)


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def test_directories_globs_and_files_are_found_in_order_of_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["seed10/epoch=2.ckpt", "seed2/epoch=10.ckpt", "seed2/epoch=9.ckpt", "seed2/last.ckpt", "seed2/notes.txt"]
    touch(tmp_path, *names)
    found = find_checkpoints(tmp_path)
    assert [c.name for c in found] == ["seed2/epoch=9", "seed2/epoch=10", "seed2/last", "seed10/epoch=2"]
    assert [(c.run, c.step) for c in found] == [("seed2", 9), ("seed2", 10), ("seed2", None), ("seed10", 2)]
    assert find_checkpoints([tmp_path / "seed2", f"{tmp_path}/**/*.ckpt"]) == found
    monkeypatch.chdir(tmp_path)
    again = find_checkpoints(["seed2", tmp_path, "seed2/../seed10/epoch=2.ckpt", "./seed2"])
    assert [c.name for c in again] == [c.name for c in found]
    assert [c.run for c in find_checkpoints(tmp_path / "seed2")] == ["seed2"] * 3


def test_a_pattern_overrides_runs_and_steps(tmp_path: Path) -> None:
    touch(tmp_path, "w_a_i7.pt", "w_a_i12.pt", "w_b_i1.pt")
    found = find_checkpoints(tmp_path, pattern=r"w_(?P<run>\w)_i(?P<step>\d+)")
    assert [(c.run, c.step) for c in found] == [("a", 7), ("a", 12), ("b", 1)]
    for pattern, message in [("(", "regular expression"), ("w", "must have a group"), ("(?P<run>x)", "against .*w_")]:
        with pytest.raises(ValueError, match=message):
            find_checkpoints(tmp_path, pattern=pattern)


def test_nothing_found_says_where(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="directory with checkpoints"):
        find_checkpoints(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"glob that matches files, got '.*\*.ckpt'"):
        find_checkpoints(f"{tmp_path}/*.ckpt")
    with pytest.raises(ValueError, match="at least one file"):
        find_checkpoints([])


def test_equal_names_with_different_endings_stay_apart(tmp_path: Path) -> None:
    touch(tmp_path, "a.pt", "a.ckpt")
    assert sorted(c.name for c in find_checkpoints(tmp_path)) == ["a.ckpt", "a.pt"]


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
    touch(tmp_path, "a.pt", "²/1²2.pt")
    with pytest.raises(TypeError, match="data must be a tensor"):
        Checkpoints(tmp_path, Net, 3, layers="head")
    with pytest.raises(ValueError, match="batch_size must be a positive int, got 0"):
        Checkpoints(tmp_path, Net, torch.ones(2, 3), layers="head", batch_size=0)
    with pytest.raises(ValueError, match="pooling must be one of"):
        Checkpoints(tmp_path, Net, torch.ones(2, 3), layers="head", pooling="max")  # type: ignore[arg-type]


def test_checkpoints_refuse_what_is_no_model_or_list(tmp_path: Path) -> None:
    touch(tmp_path, "a.pt")
    with pytest.raises(TypeError, match=r"make a torch.nn.Module, got int"):
        Checkpoints(tmp_path, lambda: 3, torch.ones(2, 3), layers="head")  # type: ignore[arg-type, return-value]
    with pytest.raises(TypeError, match="a function that makes one, got str"):
        Checkpoints(tmp_path, "Net", torch.ones(2, 3), layers="head")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="mixture"):
        Checkpoints([tmp_path, Checkpoint("a", "a", None, tmp_path / "a.pt")], Net, torch.ones(2, 3), layers="head")
    with pytest.raises(ValueError, match="names that differ"):
        Checkpoints([Checkpoint("a", "a", None, tmp_path / "a.pt")] * 2, Net, torch.ones(2, 3), layers="head")
