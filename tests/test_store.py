from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import threading
import time
from pathlib import Path

import pytest
import torch

from lfm_torch.jobs.store import DamagedPieceError, Store, content_digest, parse_size, shown_size

INFO = {"kind": "basis", "title": "net, layer"}


def filled(directory: Path) -> Store:
    store = Store(directory)
    for k in range(3):
        store.write(f"{k}" * 8, {"evecs": torch.full((4, 5), float(k)), "evals": torch.arange(4)}, {**INFO, "k": k})
    store.keep((f"{k}" * 8, INFO) for k in range(2))
    store.put_values([(b"t1", "heat", b"fvalue"), (b"t2", "heat", b"fother")])
    return store


def test_pieces_and_values_come_back(tmp_path: Path) -> None:
    store = filled(tmp_path)
    again = Store(tmp_path)
    tensors, info = again.read("1" * 8)
    assert tensors["evecs"].equal(torch.ones(4, 5))
    assert info == {**INFO, "k": 1}
    about = again.info("1" * 8)
    assert about == {**info, "content": content_digest(tensors)}
    assert again.values([b"t1", b"t3", b"t2"], "heat") == {b"t1": b"fvalue", b"t2": b"fother"}
    assert again.values([b"t1"], "lfm") == {}
    assert again.info("unknown!") is None
    with pytest.raises(KeyError):
        again.read("unknown!")
    # what was written and not entered, as by a process killed in between, is there all the same
    assert {piece.key for piece in again.ls()} == {piece.key for piece in store.ls()} == {f"{k}" * 8 for k in range(3)}
    assert again.verify() == []


def test_damage_is_found_and_taken_out(tmp_path: Path) -> None:
    store = filled(tmp_path)
    path = store.path("0" * 8)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    store.path("1" * 8).write_bytes(path.read_bytes()[:50])
    with pytest.raises(DamagedPieceError, match="checksum"):
        store.read("0" * 8)
    assert store.info("1" * 8) is None  # cut short: as good as absent
    with sqlite3.connect(tmp_path / "index.sqlite") as index:
        index.execute("UPDATE pairs SET value = ? WHERE tile = ?", (b"fvalux", b"t1"))
    assert store.values([b"t1", b"t2"], "heat") == {b"t2": b"fother"}
    assert len(store.verify()) == 3
    assert len(store.verify(remove=True)) == 3
    assert store.verify() == []
    assert [piece.key for piece in store.ls()] == ["2" * 8]


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled(tmp_path)
    before = sorted(path for path in tmp_path.rglob("*"))

    def full(_handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=r"No space left on device: .*0{8}\.safetensors'"):
            store.write("0" * 8, {"evecs": torch.zeros(2)}, INFO)
    assert sorted(path for path in tmp_path.rglob("*")) == before
    assert store.read("0" * 8)[0]["evecs"].shape == (4, 5)
    # SQLite's own limit on pages is what a full disk is to it
    pages = store._index.execute("PRAGMA page_count").fetchone()[0]
    store._index.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(OSError, match="could not be written: database or disk is full"):
        store.put_values((os.urandom(20), "heat", bytes(4000)) for _ in range(200))
    assert store.n_values() == 2
    assert Store(tmp_path).verify() == []


def test_two_drivers_share_a_store(tmp_path: Path) -> None:
    def fill(start: int) -> None:
        store = Store(tmp_path)
        for k in range(start, start + 40):
            store.write(f"{k % 20:08d}", {"x": torch.full((10,), float(k % 20))}, INFO)
            store.put_values([(f"{k}".encode(), "heat", b"f" + bytes(8))])
        store.close()

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(tmp_path)
    assert store.n_values() == 60
    assert len(store.ls()) == 20
    assert store.verify() == []


def test_prune_takes_the_least_recently_used(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store._index.execute("UPDATE pieces SET used = 100 WHERE key = ?", ("0" * 8,))
    store._index.execute("UPDATE pairs SET used = 100 WHERE tile = ?", (b"t1",))
    abandoned = tmp_path / "pieces" / "00" / ".half"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 10_000,) * 2)
    store.prune()
    assert not abandoned.exists()
    assert len(store.ls()) == 3
    store.prune(unused_days=30)
    assert sorted(piece.key for piece in store.ls()) == ["1" * 8, "2" * 8]
    assert store.values([b"t1", b"t2"], "heat") == {b"t2": b"fother"}
    one = store.path("1" * 8).stat().st_size
    store.prune(max_bytes=one)
    assert len(store.ls()) == 1


def test_digests_of_files_are_remembered_until_they_change(tmp_path: Path) -> None:
    store, file = Store(tmp_path / "store"), tmp_path / "weights.pt"
    file.write_bytes(b"one")
    calls: list[Path] = []

    def compute(path: Path) -> str:
        calls.append(path)
        return path.read_text()

    assert [store.digest_of(file, compute) for _ in range(2)] == ["one", "one"]
    assert len(calls) == 2  # too young to be trusted
    os.utime(file, (1000, 1000))
    # the time of the last change of a file's state cannot be set back: look as if it were later
    later = time.time() + 10
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lfm_torch.jobs.store.time.time", lambda: later)
        assert [store.digest_of(file, compute) for _ in range(3)] == ["one"] * 3
        assert len(calls) == 3
        file.write_bytes(b"two")
        assert store.digest_of(file, compute) == "two"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"something else entirely, and long enough to be looked at" * 30)
    with pytest.raises(ValueError, match="must be the index of a store"):
        Store(tmp_path).n_values()
    filled(tmp_path / "newer")._index.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="format 1, got format 99"):
        Store(tmp_path / "newer").n_values()
    shutil.rmtree(tmp_path)


def test_sizes_are_read_and_shown() -> None:
    assert [parse_size(text) for text in ("2GiB", "1.5 MB", "7", "3k")] == [2 * 2**30, 1572864, 7, 3072]
    for text in ("", "GiB", "-1M", "0", "2 XB"):
        with pytest.raises(ValueError, match="2GiB or 500M"):
            parse_size(text)
    assert [shown_size(size) for size in (12, 2048, 3 * 2**30)] == ["12 B", "2.0 KiB", "3.0 GiB"]
