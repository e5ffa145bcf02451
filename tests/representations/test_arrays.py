from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile_files import Bomb
from safetensors.torch import save_file

from lfm_torch.representations.arrays import load_array, read_tensors

A = np.arange(6, dtype=np.float32).reshape(3, 2)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    np.save(tmp_path / "a.npy", A)
    np.save(tmp_path / "big_endian.npy", A.astype(">f4"))
    np.save(tmp_path / "text.npy", np.array(["a", "b"]))
    np.save(tmp_path / "objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "one.npz", a=A)
    np.savez(tmp_path / "two.npz", images=A, labels=np.ones(3))
    np.savez(tmp_path / "beside.npz", images=A, notes=np.array([{"a": 1}], dtype=object), allow_pickle=True)
    torch.save(torch.from_numpy(A), tmp_path / "a.pt")
    torch.save({"images": torch.from_numpy(A), "note": "text"}, tmp_path / "dict.pt")
    save_file({"a": torch.from_numpy(A)}, tmp_path / "a.safetensors")
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "garbage.npz").write_bytes(b"no archive")
    (tmp_path / "garbage.safetensors").write_bytes(b"no tensors at all")
    (tmp_path / "garbage.pt").write_bytes(b"hello, this is no checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "half.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:300])
    return tmp_path


@pytest.mark.parametrize(
    "name",
    [
        "a.npy",
        "big_endian.npy",
        "one.npz",
        "two.npz:images",
        "a.pt",
        "dict.pt:images",
        "a.safetensors",
        "one.npz:a",
        "beside.npz:images",
    ],
)
def test_reads_every_format(files: Path, name: str) -> None:
    found = load_array(f"{files}/{name}")
    torch.testing.assert_close(found, torch.from_numpy(A))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("two.npz", r"one array, got 2 \(images, labels\); choose with '.*two.npz:images'"),
        ("two.npz:image", "must name one of images, labels, got 'image'; did you mean 'images'"),
        ("a.npy:x", "the file alone, which holds a single array"),
        ("text.npy", "an array of numbers, got dtype <U1"),
        ("beside.npz:notes", "Python objects, which are never loaded"),
        ("objects.npy", "Python objects, which are never loaded"),
        ("dict.pt:note", "must hold a tensor, got str"),
        ("empty.npy", "readable array of numbers"),
        ("garbage.npz", "readable array of numbers"),
        ("garbage.safetensors", "readable safetensors file"),
        ("garbage.pt", "28 bytes that do not read"),
        ("empty.pt", "0 bytes that do not read"),
        ("half.pt", "300 bytes that do not read"),
        (".", "must be a file, got a directory"),
    ],
)
def test_files_that_are_no_array(files: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_array(f"{files}/{name}")
    assert name.split(":")[0].strip(".") in str(caught.value)


def test_a_missing_file_lists_near_matches(files: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"one.npy must be an existing file, got none; did you mean 'one.npz'"):
        load_array(files / "one.npy")
    (files / "a.txt").touch()
    with pytest.raises(ValueError, match=r"ending on .npy, .npz.*got '.txt'"):
        load_array(files / "a.txt")


@pytest.mark.parametrize("protocol", ["torch", 2, 4])
def test_a_pickle_that_would_execute_is_refused_and_says_the_way_out(tmp_path: Path, protocol: Any) -> None:
    mark, file = tmp_path / "executed", tmp_path / "evil.pt"
    if protocol == "torch":
        torch.save({"state_dict": Bomb(mark)}, file)
    else:
        file.write_bytes(pickle.dumps({"state_dict": Bomb(mark)}, protocol=protocol))
    with pytest.raises(ValueError, match=r"refused, because loading it can execute anything.*--unsafe-pickle"):
        read_tensors(file)
    assert not mark.exists()


def test_the_bomb_of_these_tests_is_live(tmp_path: Path) -> None:
    # without this the test above could pass because the pickle is harmless
    torch.save(Bomb(tmp_path / "executed"), tmp_path / "evil.pt")
    read_tensors(tmp_path / "evil.pt", unsafe_pickle=True)
    assert (tmp_path / "executed").exists()
