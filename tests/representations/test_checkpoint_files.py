from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from small_networks import OPTIONS, net, probe

from lfm_torch.comparison.run import compare
from lfm_torch.representations.checkpoint_files import parse_name
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.checkpoints import Checkpoints


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
