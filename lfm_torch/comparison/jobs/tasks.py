"""The tasks of a comparison, as they travel to who does them, and what comes back of representations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lfm_torch.comparison.jobs.settings import rows_key
from lfm_torch.comparison.jobs.store import DamagedPieceError, Store
from lfm_torch.representations.nonfinite import is_lost, rows_to_leave_out


class Reduced(NamedTuple):
    """A representation whose pieces are stored: its place among the layers, keys and contents of its pieces."""

    checkpoint: str
    layer: str
    place: int
    n: int
    dtype: str
    keys: dict[str, str]
    contents: dict[str, str]
    n_components: int = 1
    n_unconverged: int = 0
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def info(self) -> dict[str, Any]:
        """What is stored beside the tensors, enough to plan without reading them."""
        return {
            "title": f"{self.checkpoint}, {self.layer}",
            "n": self.n,
            "dtype": self.dtype,
            "n_components": self.n_components,
            "n_unconverged": self.n_unconverged,
            "note": self.note,
            "notes": self.notes,
        }


class Reduction(NamedTuple):
    """Task: read a checkpoint once and reduce its layers.

    Attributes:
        checkpoint: its name in the source.
        identities: ``{layer: identity}`` of the layers that are wanted, without the rows that are left out; None for
            all, in a process that stores nothing.
        n: rows that the others have, these included; None for the first.
        left_out: rows that are not to be compared.
    """

    checkpoint: str
    identities: Mapping[str, str] | None
    n: int | None = None
    left_out: tuple[int, ...] = ()


class Screening(NamedTuple):
    """Task: read a checkpoint and find the rows of its layers that are not finite.

    Attributes:
        checkpoint: its name in the source.
        identities: ``{layer: identity}`` of the layers that are wanted; None for all, in a process that stores nothing.
    """

    checkpoint: str
    identities: Mapping[str, str] | None


class Screened(NamedTuple):
    """Which rows of a representation of ``n`` samples are not finite."""

    title: str
    n: int
    rows: tuple[int, ...]

    @property
    def info(self) -> dict[str, Any]:
        """What is stored beside the rows."""
        return {"kind": "rows", "title": self.title, "n": self.n}


def known_rows(store: Store, identities: Mapping[str, str]) -> dict[str, Screened]:
    """What a store knows of the rows of a checkpoint's layers."""
    known = {}
    for layer, identity in identities.items():
        try:
            tensors, info = store.read(rows_key(identity))
        except (KeyError, DamagedPieceError):
            continue
        known[layer] = Screened(info["title"], info["n"], tuple(tensors["rows"].tolist()))
    return known


def left_out_of(every: Sequence[Screened]) -> tuple[int | None, tuple[int, ...]]:
    """Return how many samples there are, which the first representation of use says, and which are to be left out."""
    n = next((one.n for one in every if not is_lost(one.n, one.rows)), None)
    if n is None:
        return None, ()
    return n, rows_to_leave_out(n, {one.title: one.rows for one in every if one.n == n})


class Group(NamedTuple):
    """Representations that are read together: the checkpoints they are of, and the keys of their pieces."""

    checkpoints: tuple[str, ...]
    keys: tuple[str, ...]

    def part(self, places: Sequence[int]) -> Group:
        """Some of them."""
        return Group(tuple(self.checkpoints[i] for i in places), tuple(self.keys[i] for i in places))


class Block(NamedTuple):
    """Task: measures of every pair of some members of two groups.

    Attributes:
        kind: of the pieces.
        measures: that are read from them.
        x: group of the first of each pair.
        y: group of the second.
        rows: members of x that are wanted.
        columns: members of y that are wanted.
    """

    kind: str
    measures: tuple[str, ...]
    x: Group
    y: Group
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @classmethod
    def of(cls, kind: str, measures: tuple[str, ...], x: Group, y: Group) -> Block:
        """All members of both groups."""
        return cls(kind, measures, x, y, tuple(range(len(x.keys))), tuple(range(len(y.keys))))

    def halves(self) -> tuple[int, list[Block]]:
        """Split the longer side, 0 (rows) or 1, in two; the groups are cut to what is wanted."""
        sides = [self.x.part(self.rows), self.y.part(self.columns)]
        longer = int(len(self.columns) > len(self.rows))
        n = len(sides[longer].keys)
        halves = []
        for part in (range(n // 2), range(n // 2, n)):
            x, y = (side.part(part) if i == longer else side for i, side in enumerate(sides))
            halves.append(Block.of(self.kind, self.measures, x, y))
        return longer, halves


class Chance(NamedTuple):
    """Task: what measures give for representations against themselves with shuffled rows."""

    kind: str
    measures: tuple[str, ...]
    keys: tuple[str, ...]
    n: int
    draws: int
