"""What every worker of a comparison holds: the source, the settings, where pieces go, and those that were used last."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch.baselines.points import State
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.comparison.jobs.store import DamagedPieceError, content_digest
from lfm_torch.comparison.jobs.tasks import Group
from lfm_torch.representations.sources import Source


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


@dataclass
class Job:
    """What every worker holds.

    Attributes:
        source: names and how to read their representations.
        settings: how they are compared.
        pieces: where finished pieces go.
        device: where representations are and pairs are computed.
        cache_bytes: how much of the stored pieces a process may hold in memory.
    """

    source: Source
    settings: Settings
    pieces: Pieces
    device: str = "cpu"
    cache_bytes: int = 2**30
    _cache: _Cache | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_cache": None}

    def sides(self, kind: str, group: Group) -> Side:
        """Return a group's tensors, from memory where it was used lately."""
        if self._cache is None:
            self._cache = _Cache(self.cache_bytes)
        return self._cache.get((kind, group), lambda: _read_side(self, kind, group))


class Side(NamedTuple):
    """One side of a block: ``evecs [L, m, n]`` and ``evals [L, m]``, or the ``states`` of each layer for a measure."""

    evals: Tensor
    evecs: Tensor
    states: tuple[State, ...]

    def part(self, places: Sequence[int]) -> Side:
        """Some of the representations; nothing is copied where they are all."""
        if len(places) == max(len(self.evals), len(self.states)):
            return self
        chosen = list(places)
        if self.states:
            return Side(self.evals, self.evecs, tuple(self.states[i] for i in chosen))
        return Side(self.evals[chosen], self.evecs[chosen], ())

    @property
    def bytes(self) -> int:
        """The memory that its tensors take."""
        parts = (part for state in self.states for part in state)
        return sum(t.numel() * t.element_size() for t in (self.evals, self.evecs, *parts))


class _Cache:
    """The groups used last, within a number of bytes (a single one may be larger)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._sides: OrderedDict[Any, Side] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, read: Callable[[], Side]) -> Side:
        with self._lock:
            if key in self._sides:
                self._sides.move_to_end(key)
                return self._sides[key]
            side = read()
            self._sides[key] = side
            self._bytes += side.bytes
            while self._bytes > self._max_bytes and len(self._sides) > 1:
                self._bytes -= self._sides.popitem(last=False)[1].bytes
            return side


def _read_side(job: Job, kind: str, group: Group) -> Side:
    none = torch.empty(0, dtype=torch.float32, device="cpu")
    try:
        found = [job.pieces.read(key)[0] for key in group.keys]
    except (DamagedPieceError, KeyError) as error:
        advice = "`lfm-torch cache verify --remove` takes it out, and the next run computes it again"
        raise DamagedPieceError(f"{_checks.one_line(error)}; {advice}") from error
    if kind != "basis":
        # copied to where torch allocates: BLAS may round by the alignment, which a file does not keep
        states = (tuple(tensors[str(i)].to(job.device, copy=True) for i in range(len(tensors))) for tensors in found)
        return Side(none, none, tuple(states))
    # a group is of one precision
    evals = torch.stack([tensors["evals"].to(job.device) for tensors in found])
    evecs = torch.stack([tensors["evecs"].to(job.device) for tensors in found])
    return Side(evals, evecs, ())
