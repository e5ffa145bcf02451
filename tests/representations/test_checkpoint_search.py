from __future__ import annotations

from pathlib import Path

import pytest

from lfm_torch.representations.checkpoint_search import find_checkpoints


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
