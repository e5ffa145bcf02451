"""The index of a store, one SQLite file: which pieces there are, values of pairs, draws of chance, digests of files.

All of it can be computed again, so that a table says beside each entry when it was last used, and a checksum where a
wrong value would not show. SQLite is imported where it is used: most programs that import the library have no store.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import sqlite3

FORMAT = 2
# rows asked for in one query: SQLite takes at least 999 parameters
ASKED = 900
DAY = 86400
# seconds between two transactions: what a killed run may lose of what is finished
_SAVE_EVERY = 0.5
_SCHEMA = """
CREATE TABLE IF NOT EXISTS pieces (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, title TEXT NOT NULL, bytes INTEGER NOT NULL, used INTEGER NOT NULL
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS draws (
  name BLOB NOT NULL, measure TEXT NOT NULL, value BLOB NOT NULL, crc INTEGER NOT NULL, used INTEGER NOT NULL,
  PRIMARY KEY (name, measure)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, state TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS numbered (
  number INTEGER PRIMARY KEY AUTOINCREMENT, name BLOB NOT NULL UNIQUE, used INTEGER NOT NULL
);
CREATE TABLE IF NOT EXISTS pairs (
  measure TEXT NOT NULL, row INTEGER NOT NULL, col INTEGER NOT NULL, vals BLOB NOT NULL, filled INTEGER NOT NULL,
  crc INTEGER NOT NULL, used INTEGER NOT NULL, PRIMARY KEY (measure, row, col)
) WITHOUT ROWID;
"""


class Index:
    """The connection to an index, opened when it is first needed, and by one process alone.

    Args:
        path: The file; made if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connection: sqlite3.Connection | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a worker elsewhere opens the same directory; the connection is the driver's
        return {"path": self.path, "_connection": None}

    @property
    def connection(self) -> sqlite3.Connection:
        """The connection.

        Raises:
            ValueError: the file holds another format, or is no index.
            OSError: it cannot be written.
        """
        if self._connection is None:
            self._connection = _opened(self.path)
        return self._connection

    def execute(self, statement: str, values: Sequence[Any] = ()) -> sqlite3.Cursor:
        """Execute one statement by itself."""
        return self.connection.execute(statement, values)

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Write all that is written inside, or nothing.

        Raises:
            OSError: no space, no permission.
        """
        import sqlite3

        connection = self.connection
        try:
            connection.execute("BEGIN IMMEDIATE")
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.OperationalError):
                raise OSError(f"{self.path} could not be written: {error}") from error
            raise

    def close(self) -> None:
        """Close the connection."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def _opened(path: Path) -> sqlite3.Connection:
    import sqlite3

    # several drivers may share a store: each waits for the other's transaction, which is short
    connection = sqlite3.connect(path, timeout=60, isolation_level=None, check_same_thread=False)
    try:
        connection.execute("PRAGMA synchronous = FULL")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT):
            raise ValueError(f"{path} must be a store of format {FORMAT}, got format {version}; take another directory")
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE;{_SCHEMA}PRAGMA user_version = {FORMAT};COMMIT;")
    except sqlite3.DatabaseError as error:
        connection.close()
        if isinstance(error, sqlite3.OperationalError):
            raise OSError(f"{path} could not be opened: {error}") from error
        raise ValueError(f"{path} must be the index of a store, got a file that is none: {error}") from error
    except ValueError:
        connection.close()
        raise
    return connection


def parts_of(asked: Sequence[Any]) -> Iterator[Sequence[Any]]:
    """Split what is asked for into parts that fit one query."""
    return (asked[start : start + ASKED] for start in range(0, len(asked), ASKED))


def days() -> int:
    """The day, as the index notes when something was last used."""
    return int(time.time() // DAY)


class Waiting:
    """Rows on their way to a store, written together twice a second: a transaction takes as long as a thousand rows.

    A context: what waits is written at its end, also where that is an interruption.

    Args:
        write: Writes a list of rows; None where there is no store.
    """

    def __init__(self, write: Callable[[list[Any]], None] | None) -> None:
        self._write = write
        self._rows: list[Any] = []
        self._written = time.monotonic()

    def add(self, rows: Iterable[Any]) -> None:
        """Let rows wait, or write them with those that waited long enough."""
        if self._write is None:
            return
        self._rows += rows
        if time.monotonic() - self._written > _SAVE_EVERY:
            self._flush(self._write)

    def __enter__(self) -> Waiting:
        return self

    def __exit__(self, *error: object) -> None:
        if self._write is not None:
            self._flush(self._write)

    def _flush(self, write: Callable[[list[Any]], None]) -> None:
        rows, self._rows = self._rows, []
        if rows:
            write(rows)
        self._written = time.monotonic()
