"""All pairs of a comparison: which are missing, in which blocks they are computed, and the matrices made of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lfm_torch.comparison.items import Failure
from lfm_torch.comparison.jobs.engines import Engine
from lfm_torch.comparison.jobs.index import Waiting
from lfm_torch.comparison.jobs.job import Job
from lfm_torch.comparison.jobs.pair_values import Array, Row
from lfm_torch.comparison.jobs.settings import value_name
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import Block, Group, Reduced
from lfm_torch.measures.table import MEASURES

# columns of bases a side of a block: large enough for a matrix product, small enough for the caches
_COLUMNS = {"cpu": 1024, "cuda": 8192}
# of points: what a measure needs of one may be a matrix of samples by samples
_STATES = 8
# groups a side of the squares of blocks that are done one after the other: each group is read once for a square
_SQUARE = 8


def all_pairs(
    job: Job,
    store: Store | None,
    engine: Engine,
    reduced: Sequence[Reduced],
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Tensor], list[Failure]]:
    """Every measure for every ordered pair, ``[N, N]`` on the CPU; pairs without room in memory are NaN and listed."""
    dtype = functools.reduce(torch.promote_types, [getattr(torch, entry.dtype) for entry in reduced], torch.float32)
    matrices: dict[str, Tensor] = {}
    n = len(reduced)
    total = len(job.settings.kinds) * n * (n + 1) // 2
    failures: list[Failure] = []
    done = 0
    for kind in job.settings.kinds:
        pairs = Pairs(kind, job.settings.measures_of(kind), reduced, str(dtype).removeprefix("torch."))
        done += pairs.take_stored(store)
        progress("pairs", done, total)
        for finished, failed in _computed(job, store, engine, pairs):
            done += finished
            failures += failed
            progress("pairs", done, total)
        matrices |= {name: pairs.matrix(name) for name in pairs.measures}
    return {name: matrices[name] for name in job.settings.measures}, list(dict.fromkeys(failures))


class Placed(NamedTuple):
    """A block, and which members of :class:`Pairs` its rows and columns are."""

    block: Block
    rows: Array
    columns: Array


class Pairs:
    """The pairs of everything different, of one kind: their values as far as they are known.

    Representations are in the order of their content, so that which of a pair comes first is the same in every
    comparison; copies of one another are one.

    Args:
        kind: of the pieces that are compared.
        measures: that are read from them.
        reduced: in the order of the matrices.
        dtype: of the matrices.
    """

    def __init__(self, kind: str, measures: Sequence[str], reduced: Sequence[Reduced], dtype: str) -> None:
        self.kind, self.measures = kind, tuple(measures)
        first = {(entry.dtype, entry.contents[kind]): entry for entry in reversed(reduced)}
        order = sorted(first)
        self.members = [first[content] for content in order]
        number = {content: i for i, content in enumerate(order)}
        self._places = np.array([number[entry.dtype, entry.contents[kind]] for entry in reduced])
        self._counts = np.bincount(self._places)
        self.n = reduced[0].n
        n = len(order)
        self._numbers = np.arange(n)
        self.values = {name: np.full((n, n), np.nan, dtype) for name in measures}
        self.missing = np.triu(np.ones((n, n), dtype=bool))

    def take_stored(self, store: Store | None) -> int:
        """Take the values that are in the store and return the number of pairs that have them all."""
        if store is None:
            return 0
        self._numbers = store.pairs.numbers(
            [value_name(self.kind, entry.contents[self.kind]) for entry in self.members]
        )
        known = self.missing.copy()
        for name, values in self.values.items():
            values[:] = store.pairs.read(name, self._numbers, values.dtype)
            known &= ~np.isnan(values)
            if not MEASURES[name].symmetric:
                known &= ~np.isnan(values.T)
        self.missing &= ~known
        return sum(self._pairs_in(np.full(1, i), np.flatnonzero(row)) for i, row in enumerate(known))

    def blocks(self, size: int) -> Iterator[Placed]:
        """Yield blocks of groups of ``size``, in an order that shares groups: each missing pair is in one of them."""
        groups = list(self._groups(size))
        upper = itertools.combinations_with_replacement(range(len(groups)), 2)
        for i, j in sorted(upper, key=lambda pair: (pair[0] // _SQUARE, pair[1] // _SQUARE)):
            (x, of_x), (y, of_y) = groups[i], groups[j]
            wanted = self.missing[np.ix_(of_x, of_y)]
            if i == j:  # each pair twice, but in one product
                wanted = wanted | wanted.T
            for rows, columns in _rectangles(wanted):
                block = Block(self.kind, self.measures, x, y, tuple(rows.tolist()), tuple(columns.tolist()))
                yield Placed(block, of_x[rows], of_y[columns])

    def place(self, placed: Placed, found: dict[str, Tensor]) -> tuple[int, list[Row]]:
        """Take the values of a block; return the number of pairs, and the rows to be stored of those without NaN."""
        wanted = self.missing[np.ix_(placed.rows, placed.columns)]
        rows, columns = np.nonzero(wanted)
        x, y = placed.rows[rows], placed.columns[columns]
        ways = {name: tensor.numpy()[:, wanted] for name, tensor in found.items()}
        whole = ~np.any([np.isnan(values).any(0) for values in ways.values()], axis=0)
        stored: list[Row] = []
        for name, values in ways.items():
            # there, and back where that is another value
            for value, (a, b) in zip(values, ((x, y), (y, x)), strict=False):
                self.values[name][a, b] = value
                stored.append((name, self._numbers[a[whole]], self._numbers[b[whole]], value[whole]))
        self.missing[x, y] = False
        return self._pairs_in(x, y), stored

    def matrix(self, name: str) -> Tensor:
        """Return the matrix of a measure over all representations, copies included, and forget its values."""
        values = self.values.pop(name)
        if MEASURES[name].symmetric:
            for i in range(len(values)):
                values[i, :i] = values[:i, i]
        return torch.from_numpy(values[np.ix_(self._places, self._places)])

    def _groups(self, size: int) -> Iterator[tuple[Group, Array]]:
        """Members of one precision that are read together, and which they are."""
        for _, same in itertools.groupby(range(len(self.members)), key=lambda i: self.members[i].dtype):
            numbers = np.array(list(same))
            for part in np.split(numbers, range(size, len(numbers), size)):
                entries = [self.members[i] for i in part]
                yield Group(tuple(e.checkpoint for e in entries), tuple(e.keys[self.kind] for e in entries)), part

    def _pairs_in(self, x: Array, y: Array) -> int:
        """Count pairs of representations; several may be copies of one member."""
        counts = self._counts[x], self._counts[y]
        return int(np.where(x == y, counts[0] * (counts[0] + 1) // 2, counts[0] * counts[1]).sum())


def _rectangles(wanted: Array) -> Iterator[tuple[Array, Array]]:
    """Cover what is True exactly: rows that want the same columns go together."""
    if wanted.all():
        yield np.arange(wanted.shape[0]), np.arange(wanted.shape[1])
    elif wanted.any():
        patterns, of_row = np.unique(wanted, axis=0, return_inverse=True)
        for k, pattern in enumerate(patterns):
            if pattern.any():
                yield np.flatnonzero(of_row.ravel() == k), np.flatnonzero(pattern)


def _computed(job: Job, store: Store | None, engine: Engine, pairs: Pairs) -> Iterator[tuple[int, list[Failure]]]:
    columns = _COLUMNS[torch.device(job.device).type]
    in_group = max(1, columns // job.settings.basis_of(pairs.n)) if pairs.kind == "basis" else _STATES
    blocks = list(pairs.blocks(in_group))
    with Waiting(None if store is None else store.pairs.write) as waiting:
        for index, (found, failed) in engine.run(job, [placed.block for placed in blocks]):
            done, stored = pairs.place(blocks[index], found)
            waiting.add(stored)
            yield done, failed
