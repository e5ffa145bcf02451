"""What a comparison is made of: its settings, the pieces it stores, and the tasks that make them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lfm_torch import _checks
from lfm_torch.comparison.jobs.library import library_digest
from lfm_torch.comparison.jobs.store import DamagedPieceError, Store, content_digest
from lfm_torch.graphs.neighbors import default_n_neighbors
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import MAP_MEASURES, POINT_MEASURES
from lfm_torch.representations.fingerprints import digest
from lfm_torch.representations.nonfinite import is_lost, rows_to_leave_out
from lfm_torch.spectral.sizes import default_n_basis


@dataclass(frozen=True)
class Settings:
    """How representations are compared, as :func:`compare` takes it."""

    measures: tuple[str, ...]
    n_neighbors: int | None
    n_basis: int | None
    metric: Metric
    weights: Weights

    @property
    def map_measures(self) -> list[str]:
        """The measures that read a functional map."""
        return [name for name in self.measures if name in MAP_MEASURES]

    @property
    def point_measures(self) -> list[str]:
        """The measures that read the points themselves."""
        return [name for name in self.measures if name in POINT_MEASURES]

    @property
    def kinds(self) -> list[str]:
        """What is stored of a representation: its basis, and what each measure of points needs of it."""
        return ["basis"] * bool(self.map_measures) + self.point_measures

    def measures_of(self, kind: str) -> list[str]:
        """The measures that read pieces of a kind."""
        return self.map_measures if kind == "basis" else [kind]

    def neighbors_of(self, n: int) -> int:
        """Neighbours in the graphs of ``n`` samples."""
        return default_n_neighbors(n) if self.n_neighbors is None else self.n_neighbors

    def basis_of(self, n: int) -> int:
        """Eigenvectors of the spaces of ``n`` samples."""
        return default_n_basis(n) if self.n_basis is None else self.n_basis

    def check_against(self, n: int) -> None:
        """Raise ValueError where ``n`` samples are too few."""
        if n < 2:
            raise ValueError(f"representations must have at least 2 rows, got {n}")
        if self.map_measures:
            _checks.check_enough("representations", n)
            n_basis = self.basis_of(n)
            _checks.check_range("n_basis", n_basis, 1, n - 1, f"less than the {n} samples")
            centered = [name for name in self.map_measures if MAP_MEASURES[name].centered]
            if centered and n_basis < 2:
                left_out = f"{centered[0]!r}, which leaves the constant function out"
                raise ValueError(f"n_basis must be at least 2 for {left_out}, got {n_basis}")
            if self.n_neighbors is not None:
                _checks.check_range("n_neighbors", self.n_neighbors, 1, n - 1, f"there are {n} samples")

    def key(self, kind: str, identity: str) -> str:
        """Name the piece of a representation with this identity, which stands for its values."""
        if kind != "basis":
            return digest("state", kind, identity, library_digest())
        # a number that is None follows from the samples, which the identity stands for
        graph = (self.n_neighbors, self.n_basis, self.metric, self.weights)
        return digest("basis", identity, *graph, library_digest())


def rows_key(identity: str) -> str:
    """Name the piece that holds which rows of a representation are not finite."""
    return digest("rows", identity, library_digest())


def identity_without(identity: str, left_out: Sequence[int]) -> str:
    """Name what a representation is without some of its rows."""
    return digest("without", identity, list(left_out)) if left_out else identity


class Pieces(Protocol):
    """Where workers put what they finish: a :class:`Store`, or the memory of one process."""

    def write(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
        """Store a piece under its key and return the digest of its content."""

    def read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return a piece's tensors and info."""


class MemoryPieces:
    """Pieces in the memory of this process, for comparisons that keep nothing."""

    def __init__(self) -> None:
        self._pieces: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def write(self, key: str, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> str:
        """Keep the tensors, on their device, laid out as a file would give them back: BLAS may round by the layout."""
        self._pieces[key] = ({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, dict(info))
        return content_digest(tensors)

    def read(self, key: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return what :meth:`write` kept."""
        return self._pieces[key]


@dataclass(frozen=True)
class Reduced:
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


@dataclass(frozen=True)
class Reduction:
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


@dataclass(frozen=True)
class Screening:
    """Task: read a checkpoint and find the rows of its layers that are not finite.

    Attributes:
        checkpoint: its name in the source.
        identities: ``{layer: identity}`` of the layers that are wanted; None for all, in a process that stores nothing.
    """

    checkpoint: str
    identities: Mapping[str, str] | None


@dataclass(frozen=True)
class Screened:
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


@dataclass(frozen=True)
class Group:
    """Representations that are read together: the checkpoints they are of, and the keys of their pieces."""

    checkpoints: tuple[str, ...]
    keys: tuple[str, ...]

    def part(self, places: Sequence[int]) -> Group:
        """Some of them."""
        return Group(tuple(self.checkpoints[i] for i in places), tuple(self.keys[i] for i in places))


@dataclass(frozen=True)
class Block:
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


@dataclass(frozen=True)
class Chance:
    """Task: what measures give for representations against themselves with shuffled rows."""

    kind: str
    measures: tuple[str, ...]
    keys: tuple[str, ...]
    n: int
    draws: int
