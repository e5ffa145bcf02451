from __future__ import annotations

import errno
import os
import shutil
import sqlite3
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lfm_torch.comparison.jobs.pair_values import SIDE, Row
from lfm_torch.comparison.jobs.store import DamagedPieceError, Store, content_digest

INFO = {"kind": "basis", "title": "net, layer"}


def filled(directory: Path) -> Store:
    store = Store(directory)
    for k in range(3):
        store.write(f"{k}" * 8, {"evecs": torch.full((4, 5), float(k)), "evals": torch.arange(4)}, {**INFO, "k": k})
    store.keep((f"{k}" * 8, INFO) for k in range(2))
    store.draws.write([(b"t1", "heat", b"value"), (b"t2", "heat", b"other")])
    store.pairs.write([values_of(store, "heat", [b"x"], [b"x"], 1.0), values_of(store, "heat", [b"x"], [b"y"], 0.5)])
    return store


def values_of(store: Store, measure: str, x: list[bytes], y: list[bytes], value: float) -> Row:
    return measure, store.pairs.numbers(x), store.pairs.numbers(y), np.full(len(x), value, "float32")


def read(store: Store, measure: str, names: list[bytes]) -> list[list[float | None]]:
    values = store.pairs.read(measure, store.pairs.numbers(names), np.dtype("float32"))
    return [[None if np.isnan(value) else float(value) for value in row] for row in values]


def test_pieces_and_values_come_back(tmp_path: Path) -> None:
    store = filled(tmp_path)
    again = Store(tmp_path)
    tensors, info = again.read("1" * 8)
    assert tensors["evecs"].equal(torch.ones(4, 5))
    assert info == {**INFO, "k": 1}
    about = again.info("1" * 8)
    assert about == {**info, "content": content_digest(tensors)}
    assert again.draws.read([b"t1", b"t3", b"t2"], "heat") == {b"t1": b"value", b"t2": b"other"}
    assert again.draws.read([b"t1"], "lfm") == {}
    assert read(again, "heat", [b"y", b"z", b"x"]) == [[None, None, None], [None, None, None], [0.5, None, 1.0]]
    assert read(again, "lfm", [b"x"]) == [[None]]
    assert again.n_values() == 2
    assert again.info("unknown!") is None
    with pytest.raises(KeyError):
        again.read("unknown!")
    # what was written and not entered, as by a process killed in between, is there all the same
    assert {piece.key for piece in again.ls()} == {piece.key for piece in store.ls()} == {f"{k}" * 8 for k in range(3)}
    assert again.verify() == []


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_values_of_pairs_in_any_order_are_those_written_last(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as directory:
        store, written = Store(directory), dict[tuple[int, int], float]()
        numbers = store.pairs.numbers([f"{k}".encode() for k in range(3 * SIDE)])
        assert numbers.tolist() == list(range(1, 3 * SIDE + 1))
        member = st.integers(0, 3 * SIDE - 1)
        for flush in data.draw(st.lists(st.lists(st.tuples(member, member), min_size=1, unique=True), max_size=4)):
            x, y = (numbers[list(side)] for side in zip(*flush, strict=True))
            values = np.random.default_rng(len(written)).random(len(flush)).astype(data.draw(st.sampled_from("fd")))
            store.pairs.write([("heat", x, y, values)])
            written |= dict(zip(flush, values.tolist(), strict=True))
        asked = data.draw(st.lists(member, unique=True))
        found = store.pairs.read("heat", numbers[asked], np.dtype("float64"))
        wanted = [[written.get((i, j), np.nan) for j in asked] for i in asked]
        np.testing.assert_array_equal(found, np.array(wanted).reshape(found.shape))
        assert store.n_values() == len(written)
        store.close()


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
        index.execute("UPDATE draws SET value = ? WHERE name = ?", (b"valux", b"t1"))
        index.execute("UPDATE pairs SET vals = zeroblob(length(vals))")
    assert store.draws.read([b"t1", b"t2"], "heat") == {b"t2": b"other"}
    assert read(store, "heat", [b"x"]) == [[None]]
    assert len(store.verify()) == 4
    assert any("block 0, 0 of the values of heat is damaged" in line for line in store.verify())
    assert len(store.verify(remove=True)) == 4
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
        store.pairs.write(values_of(store, f"m{k}", [b"x"], [b"x"], 1.0) for k in range(200))
    assert store.n_values() == 2
    assert Store(tmp_path).verify() == []


def test_two_drivers_share_a_store(tmp_path: Path) -> None:
    def fill(start: int) -> None:
        store = Store(tmp_path)
        for k in range(start, start + 40):
            store.write(f"{k % 20:08d}", {"x": torch.full((10,), float(k % 20))}, INFO)
            store.pairs.write([values_of(store, "heat", [b"all"], [f"{k % 60}".encode()], float(k))])
        store.close()

    threads = [threading.Thread(target=fill, args=(start,)) for start in (0, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(tmp_path)
    # one row of blocks, written to by both
    assert read(store, "heat", [b"all", *(f"{k}".encode() for k in range(60))])[0] == [None, *map(float, range(60))]
    assert len(store.ls()) == 20
    assert store.verify() == []


def test_prune_takes_the_least_recently_used(tmp_path: Path) -> None:
    store = filled(tmp_path)
    store._index.execute("UPDATE pieces SET used = 100 WHERE key = ?", ("0" * 8,))
    store._index.execute("UPDATE draws SET used = 100 WHERE name = ?", (b"t1",))
    store.pairs.write([values_of(store, "lfm", [b"x"], [b"y"], 0.25)])
    store._index.execute("UPDATE pairs SET used = 100 WHERE measure = 'heat'")
    store._index.execute("UPDATE numbered SET used = 100 WHERE name = ?", (b"y",))
    abandoned = tmp_path / "pieces" / "00" / ".half"
    abandoned.write_bytes(b"half")
    os.utime(abandoned, (time.time() - 10_000,) * 2)
    store.prune()
    assert not abandoned.exists()
    assert len(store.ls()) == 3
    store.prune(unused_days=30)
    assert sorted(piece.key for piece in store.ls()) == ["1" * 8, "2" * 8]
    assert store.draws.read([b"t1", b"t2"], "heat") == {b"t2": b"other"}
    # y is forgotten, and its number is not given to anything else
    assert read(store, "heat", [b"x"]) == [[None]]
    assert store.pairs.numbers([b"new", b"y", b"x"]).tolist() == [3, 4, 1]
    assert read(store, "lfm", [b"x", b"new", b"y"])[0] == [None] * 3
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

    # by the clock of the files, which need not be that of this machine
    changed, seconds = file.stat().st_ctime, 1.0
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lfm_torch.comparison.jobs.store.time.time", lambda: changed + seconds)
        assert [store.digest_of(file, compute) for _ in range(2)] == ["one", "one"]
        assert len(calls) == 2  # too young to be trusted
        os.utime(file, (1000, 1000))
        # the time of the last change of a file's state cannot be set back: look as if it were later
        seconds = 1000.0
        assert [store.digest_of(file, compute) for _ in range(3)] == ["one"] * 3
        assert len(calls) == 3
        file.write_bytes(b"two")
        assert store.digest_of(file, compute) == "two"


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "index.sqlite").write_bytes(b"something else entirely, and long enough to be looked at" * 30)
    with pytest.raises(ValueError, match="must be the index of a store"):
        Store(tmp_path).n_values()
    filled(tmp_path / "newer")._index.execute("PRAGMA user_version = 99")
    with pytest.raises(ValueError, match="format 2, got format 99"):
        Store(tmp_path / "newer").n_values()
    shutil.rmtree(tmp_path)
