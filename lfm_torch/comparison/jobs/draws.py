"""What measures gave for shuffled rows, in the index of a store: the values that chance levels are the means of."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence

from lfm_torch.comparison.jobs.index import Index, days, parts_of


class Draws:
    """The draws in the index of a :class:`Store`, the bytes of the values of a representation under its name.

    Args:
        index: Where they are.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def write(self, rows: Iterable[tuple[bytes, str, bytes]]) -> None:
        """Store what a measure gave for shuffled rows, ``(name, measure, value)``, in one transaction."""
        today = days()
        with self._index.transaction() as index:
            index.executemany(
                "INSERT OR REPLACE INTO draws VALUES (?, ?, ?, ?, ?)",
                ((name, measure, value, zlib.crc32(value), today) for name, measure, value in rows),
            )

    def read(self, names: Sequence[bytes], measure: str) -> dict[bytes, bytes]:
        """Return what :meth:`write` stored of a measure for those of ``names`` that have it."""
        found: dict[bytes, bytes] = {}
        stale = []
        today = days()
        for part in parts_of(names):
            places = ", ".join("?" * len(part))
            question = f"SELECT name, value, crc, used FROM draws WHERE measure = ? AND name IN ({places})"
            for name, value, crc, used in self._index.execute(question, (measure, *part)):
                # a value that is not what was written is as good as absent: it is computed again
                if zlib.crc32(value) == crc:
                    found[name] = value
                    if used != today:
                        stale.append((today, name, measure))
        if stale:
            with self._index.transaction() as index:
                index.executemany("UPDATE draws SET used = ? WHERE name = ? AND measure = ?", stale)
        return found

    def damaged(self, *, remove: bool) -> list[str]:
        """Name the draws that are not what was written, a line each; ``remove`` deletes them."""
        damaged = [
            (name, measure)
            for name, measure, value, crc in self._index.execute("SELECT name, measure, value, crc FROM draws")
            if zlib.crc32(value) != crc
        ]
        if remove and damaged:
            with self._index.transaction() as index:
                index.executemany("DELETE FROM draws WHERE name = ? AND measure = ?", damaged)
        return [f"the {measure} of shuffled rows {name.hex()} is damaged" for name, measure in damaged]

    def prune(self, last: float) -> None:
        """Delete what was last used on day ``last`` or before."""
        with self._index.transaction() as index:
            index.execute("DELETE FROM draws WHERE used <= ?", (last,))
