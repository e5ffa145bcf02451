"""Values of pairs in an index: dense blocks of a matrix whose rows and columns are everything that was ever compared.

What is compared is numbered once, in the order in which it comes; the value of a pair stands where its numbers meet.
A million pairs are then a thousand rows of the index, and no pair has a name of its own.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lfm_torch.comparison.jobs.index import Index, days, parts_of

if TYPE_CHECKING:
    import sqlite3

Array = np.ndarray[Any, Any]
# values of one measure: its name, the numbers of x, those of y, and the values, [k] each
Row = tuple[str, Array, Array, Array]
# numbers a side of a block: a page of the index in single precision
SIDE = 32
# a block says its precision itself: a letter, then the numbers
_DTYPES: dict[bytes, np.dtype[Any]] = {b"f": np.dtype("<f4"), b"d": np.dtype("<f8")}


class PairValues:
    """The values of pairs in the index of a :class:`Store`.

    Args:
        index: Where they are.
    """

    def __init__(self, index: Index) -> None:
        self._index = index

    def __len__(self) -> int:
        """Count the stored values."""
        return int(self._index.execute("SELECT COALESCE(SUM(filled), 0) FROM pairs").fetchone()[0])

    def numbers(self, names: Sequence[bytes]) -> Array:
        """Return the number of each name, giving numbers to the new ones in the order in which they come."""
        known = self._known(names)
        today = days()
        new = [(name, today) for name in names if name not in known]
        stale = [(today, name) for name, (_, used) in known.items() if used != today]
        if new or stale:
            with self._index.transaction() as index:
                index.executemany("UPDATE numbered SET used = ? WHERE name = ?", stale)
                index.executemany("INSERT OR IGNORE INTO numbered (name, used) VALUES (?, ?)", new)
            # another driver may have been first
            known = self._known(names)
        return np.array([known[name][0] for name in names], dtype=np.int64)

    def _known(self, names: Sequence[bytes]) -> dict[bytes, tuple[int, int]]:
        found: dict[bytes, tuple[int, int]] = {}
        for part in parts_of(names):
            places = ", ".join("?" * len(part))
            question = f"SELECT name, number, used FROM numbered WHERE name IN ({places})"
            found.update((name, (number, used)) for name, number, used in self._index.execute(question, part))
        return found

    def read(self, measure: str, numbers: Array, dtype: np.dtype[Any]) -> Array:
        """Return the values of a measure for every ordered pair of ``numbers [U]``, ``[U, U]``, NaN where absent."""
        values = np.full((len(numbers), len(numbers)), np.nan, dtype=dtype)
        # for each block of numbers: where its numbers are among those asked for, and where in the block
        sides: dict[int, tuple[Array, Array]] = {}
        for block in np.unique(numbers // SIDE).tolist():
            places = np.flatnonzero(numbers // SIDE == block)
            sides[block] = places, numbers[places] % SIDE
        stale, today = [], days()
        for row, column, content, crc, used in self._blocks(measure, list(sides)):
            # a block that is not what was written is as good as absent: it is computed again
            if column not in sides or zlib.crc32(content) != crc:
                continue
            (rows, of_row), (columns, of_column) = sides[row], sides[column]
            values[np.ix_(rows, columns)] = _unpacked(content)[np.ix_(of_row, of_column)]
            if used != today:
                stale.append((today, measure, row, column))
        if stale:
            with self._index.transaction() as index:
                index.executemany("UPDATE pairs SET used = ? WHERE measure = ? AND row = ? AND col = ?", stale)
        return values

    def write(self, values: Iterable[Row]) -> None:
        """Store values in one transaction."""
        by_measure: dict[str, list[tuple[Array, Array, Array]]] = {}
        for measure, *parts in values:
            by_measure.setdefault(measure, []).append((parts[0], parts[1], parts[2]))
        with self._index.transaction() as index:
            for measure, of_measure in by_measure.items():
                rows, columns, found = map(np.concatenate, zip(*of_measure, strict=True))
                blocks = np.stack([rows // SIDE, columns // SIDE])
                order = np.lexsort(blocks[::-1])
                starts = np.flatnonzero(np.diff(blocks[:, order], axis=1, prepend=-1).any(0))
                for part in np.split(order, starts[1:]) if len(order) else ():
                    row, column = blocks[:, part[0]].tolist()
                    places = rows[part] % SIDE, columns[part] % SIDE
                    _merge(index, (measure, row, column), places, found[part])

    def damaged(self, *, remove: bool) -> list[str]:
        """Name the blocks that are not what was written, a line each; ``remove`` deletes them."""
        question = "SELECT measure, row, col, vals, crc FROM pairs"
        keys = [key for *key, content, crc in self._index.execute(question) if zlib.crc32(content) != crc]
        if remove and keys:
            with self._index.transaction() as index:
                index.executemany("DELETE FROM pairs WHERE measure = ? AND row = ? AND col = ?", keys)
        return [f"block {row}, {column} of the values of {measure} is damaged" for measure, row, column in keys]

    def prune(self, last: float) -> None:
        """Delete what was last used on day ``last`` or before. Numbers are never given twice."""
        with self._index.transaction() as index:
            index.execute("DELETE FROM pairs WHERE used <= ?", (last,))
            index.execute("DELETE FROM numbered WHERE used <= ?", (last,))

    def _blocks(self, measure: str, rows: Sequence[int]) -> Iterator[tuple[int, int, bytes, int, int]]:
        for part in parts_of(rows):
            places = ", ".join("?" * len(part))
            question = f"SELECT row, col, vals, crc, used FROM pairs WHERE measure = ? AND row IN ({places})"
            yield from self._index.execute(question, (measure, *part))


def _merge(index: sqlite3.Connection, key: tuple[str, int, int], places: tuple[Array, Array], values: Array) -> None:
    """Write values into a block, beside those that are there."""
    found = index.execute("SELECT vals, crc FROM pairs WHERE measure = ? AND row = ? AND col = ?", key).fetchone()
    if found is not None and zlib.crc32(found[0]) == found[1]:
        block = _unpacked(found[0])
        block = block.astype(np.promote_types(block.dtype, values.dtype))
    else:
        block = np.full((SIDE, SIDE), np.nan, dtype=values.dtype)
    block[places] = values
    code = b"d" if block.dtype == np.float64 else b"f"
    content = code + block.astype(_DTYPES[code]).tobytes()
    filled = block.size - int(np.isnan(block).sum())
    row = (*key, content, filled, zlib.crc32(content), days())
    index.execute("INSERT OR REPLACE INTO pairs VALUES (?, ?, ?, ?, ?, ?, ?)", row)


def _unpacked(content: bytes) -> Array:
    return np.frombuffer(content, _DTYPES[content[:1]], offset=1).reshape(SIDE, SIDE)
