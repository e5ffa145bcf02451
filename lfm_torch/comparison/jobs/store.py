"""What a comparison has finished, on disk: bases as safetensors files, values of pairs in SQLite, by content.

A piece is named by a digest of everything it depends on (see :mod:`lfm_torch.representations.fingerprints`), so it is
never wrong, only absent: a changed setting asks for another name. Files are written beside their place, synchronised
and renamed, and the index is a transaction, so that a process may be killed, or the disk fill up, at any moment.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lfm_torch import _files
from lfm_torch._files import STORE_INDEX, STORE_PIECES
from lfm_torch.comparison.jobs.draws import Draws
from lfm_torch.comparison.jobs.index import DAY, FORMAT, Index, days
from lfm_torch.comparison.jobs.pair_values import PairValues

# a temporary file this old belongs to no process that still writes it
_ABANDONED = 3600


class DamagedPieceError(Exception):
    """A piece that is there and does not read, or is not what was written."""


@dataclass(frozen=True)
class Piece:
    """One line of ``lfm-torch cache ls``: a stored representation, its size in bytes and the day of its last use."""

    key: str
    kind: str
    title: str
    bytes: int
    used: int


class Store:
    """A directory of finished pieces, safe for several processes at once.

    Files may be written by any process that sees the directory; the index is written by the one that drives a
    comparison (SQLite's locks are not to be trusted on every network file system, and workers never need them).

    Args:
        directory: Where; made if missing.

    Raises:
        OSError: the directory cannot be made or written to.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = Store(folder)
        ...     _ = store.write("ab12", {"evals": torch.zeros(3)}, {"kind": "basis", "title": "net, layer 1"})
        ...     store.read("ab12")[0]["evals"]
        tensor([0., 0., 0.])
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        (self.directory / STORE_PIECES).mkdir(parents=True, exist_ok=True)
        self._index = Index(self.directory / STORE_INDEX)

    def __repr__(self) -> str:
        return f"Store({str(self.directory)!r})"

    def open(self) -> Store:
        """Open the index now rather than when it is first needed, so that what is wrong with it is said once.

        Raises:
            ValueError: the directory holds another format, or something that is no store.
            OSError: the index cannot be written.
        """
        _ = self._index.connection
        return self

    def path(self, key: str) -> Path:
        """Return the file of a piece."""
        return self.directory / STORE_PIECES / key[:2] / f"{key}.safetensors"

    def write(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
        """Write a piece; the same key twice is the same content, so the last writer does no harm.

        Returns:
            The digest of its content.

        Raises:
            OSError: no space, no permission: nothing is left behind.
        """
        from safetensors.torch import save

        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = content_digest(plain)
        metadata = {"format": str(FORMAT), "info": json.dumps(info, sort_keys=True), "sha256": content}
        path = self.path(key)
        path.parent.mkdir(exist_ok=True)
        _files.write_atomically(path, save(plain, metadata), durable=True)
        return content

    def read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Read a piece back: its tensors and its info.

        Raises:
            KeyError: absent.
            DamagedPieceError: its content is not what was written.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except FileNotFoundError:
            raise KeyError(key) from None
        except (SafetensorError, OSError) as error:
            raise DamagedPieceError(f"{path} does not read: {error}") from error
        if metadata.get("sha256") != content_digest(tensors):
            raise DamagedPieceError(f"{path} does not have the checksum it was written with")
        return tensors, json.loads(metadata["info"])

    def info(self, key: str) -> dict[str, Any] | None:
        """Return the info of a piece, and the digest of its ``content``, without reading its tensors.

        Returns:
            None where the piece is absent or does not open.
        """
        from safetensors import SafetensorError, safe_open

        path = self.path(key)
        if not path.exists():
            return None
        try:
            # opening checks that the file is as long as its header says
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                info: dict[str, Any] = {**json.loads(metadata["info"]), "content": metadata["sha256"]}
        except (SafetensorError, OSError, KeyError, ValueError):
            return None
        return info

    def remove(self, key: str) -> None:
        """Remove a piece; one that is absent is no error."""
        self.path(key).unlink(missing_ok=True)
        with self._index.transaction() as index:
            index.execute("DELETE FROM pieces WHERE key = ?", (key,))

    def keep(self, pieces: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
        """Enter pieces (key and info) in the index as used today, those that are not."""
        today = days()
        known = {row[0] for row in self._index.execute("SELECT key FROM pieces WHERE used = ?", (today,))}
        rows = []
        for key, info in pieces:
            path = self.path(key)
            if key not in known and path.exists():
                rows.append((key, info["kind"], info["title"], path.stat().st_size, today))
        if rows:
            with self._index.transaction() as index:
                index.executemany("INSERT OR REPLACE INTO pieces VALUES (?, ?, ?, ?, ?)", rows)

    @property
    def pairs(self) -> PairValues:
        """The values of pairs."""
        return PairValues(self._index)

    @property
    def draws(self) -> Draws:
        """What measures gave for shuffled rows."""
        return Draws(self._index)

    def digest_of(self, path: Path, compute: Callable[[Path], str]) -> str:
        """Return ``compute(path)``, remembered for as long as the file keeps its size, times and inode."""
        status = path.stat()
        state = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        name = str(path.resolve())
        row = self._index.execute("SELECT digest FROM files WHERE path = ? AND state = ?", (name, state)).fetchone()
        if row is not None:
            return str(row[0])
        digest = compute(path)
        # a file that changed a moment ago may change again within the resolution of its times
        if time.time() - max(status.st_mtime, status.st_ctime) > 2:
            with self._index.transaction() as index:
                index.execute("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", (name, state, digest))
        return digest

    def ls(self) -> list[Piece]:
        """List the pieces, largest first. What a killed process wrote and did not enter is found on disk."""
        known = {row[0]: Piece(*row) for row in self._index.execute("SELECT key, kind, title, bytes, used FROM pieces")}
        listed = []
        for path in self._files():
            status = path.stat()
            piece = known.get(path.stem)
            if piece is None:
                info = self.info(path.stem) or {"kind": "damaged", "title": path.name}
                piece = Piece(path.stem, info["kind"], info["title"], 0, int(status.st_mtime // DAY))
            listed.append(Piece(piece.key, piece.kind, piece.title, status.st_size, piece.used))
        return sorted(listed, key=lambda piece: (-piece.bytes, piece.title, piece.key))

    def n_values(self) -> int:
        """Count the stored values of pairs."""
        return len(self.pairs)

    def size(self) -> int:
        """Bytes on disk."""
        files = (path for path in self.directory.rglob("*") if path.is_file())
        return sum(path.stat().st_size for path in files)

    def verify(self, *, remove: bool = False) -> list[str]:
        """Read everything and return what is damaged, a line each; ``remove`` deletes it, to be computed again."""
        problems = []
        for path in self._files():
            damage = self._damage(path.stem)
            if damage:
                problems.append(damage)
                if remove:
                    self.remove(path.stem)
        checks = self._index.execute("PRAGMA integrity_check").fetchall()
        problems += [f"{STORE_INDEX}: {row[0]}" for row in checks if row[0] != "ok"]
        problems += [f"{STORE_INDEX}: {line}" for line in self.pairs.damaged(remove=remove)]
        problems += [f"{STORE_INDEX}: {line}" for line in self.draws.damaged(remove=remove)]
        return problems

    def _damage(self, key: str) -> str:
        try:
            self.read(key)
        except (DamagedPieceError, KeyError, ValueError) as error:
            return str(error)
        return ""

    def prune(self, *, unused_days: float | None = None, max_bytes: int | None = None) -> int:
        """Delete what has not been used for a number of days, then the least recently used until it fits.

        Temporary files of processes that were killed go in any case.

        Args:
            unused_days: Delete pieces and values last used this many days ago or longer; None keeps them.
            max_bytes: Delete the pieces least recently used until the files take at most this; None for no limit.

        Returns:
            Bytes freed.
        """
        before = self.size()
        for path in (self.directory / STORE_PIECES).rglob(".*"):
            if path.is_file() and time.time() - path.stat().st_mtime > _ABANDONED:
                path.unlink(missing_ok=True)
        pieces = sorted(self.ls(), key=lambda piece: (piece.used, -piece.bytes))
        last = None if unused_days is None else days() - unused_days
        total = sum(piece.bytes for piece in pieces)
        for piece in pieces:
            old = last is not None and piece.used <= last
            if old or (max_bytes is not None and total > max_bytes):
                self.remove(piece.key)
                total -= piece.bytes
        if last is not None:
            self.pairs.prune(last)
            self.draws.prune(last)
            with self._index.transaction() as index:
                index.execute("DELETE FROM files")
        self._index.execute("VACUUM")
        return before - self.size()

    def close(self) -> None:
        """Close the index."""
        self._index.close()

    def _files(self) -> Iterator[Path]:
        return iter(sorted((self.directory / STORE_PIECES).glob("??/*.safetensors")))


def content_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of tensors with their names, dtypes and shapes."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(_files.raw_bytes(tensor))
    return digest.hexdigest()
