"""All pairs of a comparison: which tiles are missing, and the matrices made of them."""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm_torch.comparison import Failure
from lfm_torch.jobs.engines import Engine
from lfm_torch.jobs.fingerprints import digest, library_digest
from lfm_torch.jobs.pieces import Job, groups_of, in_order, tile_of
from lfm_torch.jobs.store import Store
from lfm_torch.jobs.tasks import Chance, Group, Reduced, Tiles
from lfm_torch.measures import MEASURES

Array = np.ndarray[Any, Any]
_CHANCE_DRAWS = 100
_CHANCE_TASK = 8
# groups a side of the blocks in which missing tiles go to workers: each group is read once for this many tiles
_BLOCK = 8
# seconds between two transactions: what a killed run may lose of the finished pairs
_SAVE_EVERY = 0.5
# a stored value says its precision itself: a letter, then the numbers
_DTYPES: dict[bytes, np.dtype[Any]] = {b"f": np.dtype("<f4"), b"d": np.dtype("<f8")}


def all_pairs(
    job: Job,
    store: Store | None,
    engine: Engine,
    reduced: Sequence[Reduced],
    progress: Callable[[str, int, int], None],
) -> tuple[dict[str, Tensor], list[Failure]]:
    """Every measure for every ordered pair, ``[N, N]`` on the CPU; pairs without room in memory are NaN and listed."""
    dtype = functools.reduce(torch.promote_types, [getattr(torch, entry.dtype) for entry in reduced], torch.float32)
    n = len(reduced)
    matrices = {name: torch.empty(n, n, dtype=dtype) for name in job.settings.measures}
    total = len(job.settings.kinds) * n * (n + 1) // 2
    failures: list[Failure] = []
    done = 0
    for kind in job.settings.kinds:
        plan = plan_tiles(kind, reduced, job.settings.measures_of(kind), job.settings.n_basis, store)
        done += plan.place_stored(matrices)
        progress("pairs", done, total)
        for pairs, failed in _computed(job, store, engine, plan, matrices):
            done += pairs
            failures += failed
            progress("pairs", done, total)
    return matrices, failures


@dataclass(frozen=True)
class Placed:
    """A group of layers and its rows in the matrices."""

    group: Group
    rows: slice


@dataclass(frozen=True)
class TilePlan:
    """The tiles of one kind: where each goes, what is stored of them, and which are missing, block by block."""

    kind: str
    measures: tuple[str, ...]
    placed: tuple[Placed, ...]
    stored: dict[str, dict[bytes, bytes]]

    @functools.cached_property
    def tiles(self) -> dict[bytes, list[tuple[Placed, Placed]]]:
        """Where the values of each tile go; more than one place where checkpoints are copies of each other."""
        tiles: dict[bytes, list[tuple[Placed, Placed]]] = {}
        for i, x in enumerate(self.placed):
            for y in self.placed[i:]:
                tiles.setdefault(tile_of(self.kind, x.group, y.group), []).append((x, y))
        return tiles

    def is_stored(self, tile: bytes) -> bool:
        """Tell whether every measure of a tile is stored."""
        return all(tile in self.stored[name] for name in self.measures)

    @property
    def missing(self) -> int:
        """Number of tiles that must be computed."""
        return sum(not self.is_stored(tile) for tile in self.tiles)

    def blocks(self) -> Iterator[tuple[list[bytes], Tiles]]:
        """Missing tiles, in blocks that share their groups."""
        order = {id(placed): i // _BLOCK for i, placed in enumerate(self.placed)}
        blocks: dict[tuple[int, int], list[bytes]] = {}
        for tile, places in self.tiles.items():
            if not self.is_stored(tile):
                x, y = places[0]
                blocks.setdefault((order[id(x)], order[id(y)]), []).append(tile)
        for names in blocks.values():
            pairs = tuple(in_order(*(side.group for side in self.tiles[tile][0])) for tile in names)
            yield names, Tiles(self.kind, self.measures, pairs)

    def place_stored(self, matrices: dict[str, Tensor]) -> int:
        """Write the stored values into the matrices and return the number of pairs."""
        done = 0
        for tile in self.tiles:
            if self.is_stored(tile):
                done += self.place(matrices, tile, {name: self.stored[name][tile] for name in self.measures})
        return done

    def place(self, matrices: dict[str, Tensor], tile: bytes, values: dict[str, bytes]) -> int:
        """Write a tile's values wherever they belong and return the number of pairs."""
        done = 0
        for x, y in self.tiles[tile]:
            a, b = in_order(x.group, y.group)
            swapped = a is not x.group
            shape = (-1, len(a.keys), len(b.keys))
            for name, value in values.items():
                ways = np.frombuffer(value, _DTYPES[value[:1]], offset=1).reshape(shape)
                _place(matrices[name].numpy(), ways, x.rows, y.rows, swapped=swapped)
            height, width = len(x.group.keys), len(y.group.keys)
            done += height * (height + 1) // 2 if x is y else height * width
        return done


def _place(matrix: Array, ways: Array, rows: slice, columns: slice, *, swapped: bool) -> None:
    there, back = ways[0], ways[-1]
    if swapped:
        there, back = back.T, there.T
    if rows == columns:
        # of a group against itself each pair is there twice: the same number for both where it is symmetric
        matrix[rows, columns] = np.triu(there) + np.triu(there, 1).T if len(ways) == 1 else there
        return
    matrix[rows, columns] = there
    matrix[columns, rows] = back.T


def plan_tiles(
    kind: str, reduced: Sequence[Reduced], measures: Sequence[str], n_basis: int, store: Store | None
) -> TilePlan:
    """Lay out the tiles of all pairs and look up which are stored; ``reduced`` is in the order of the matrices."""
    placed = []
    row = 0
    for _, entries in itertools.groupby(reduced, key=lambda entry: entry.checkpoint):
        for group in groups_of(list(entries), kind, n_basis):
            placed.append(Placed(group, slice(row, row + len(group.keys))))
            row += len(group.keys)
    plan = TilePlan(kind, tuple(measures), tuple(placed), {})
    for name in measures:
        plan.stored[name] = {} if store is None else store.values(list(plan.tiles), name)
    return plan


def _computed(
    job: Job, store: Store | None, engine: Engine, plan: TilePlan, matrices: dict[str, Tensor]
) -> Iterator[tuple[int, list[Failure]]]:
    blocks = list(plan.blocks())
    rows: list[tuple[bytes, str, bytes]] = []
    saved = time.monotonic()
    try:
        for index, (found, failed) in engine.run(job, [tiles for _, tiles in blocks]):
            done = 0
            for tile, tensors in zip(blocks[index][0], found, strict=True):
                values = {name: _packed(tensor) for name, tensor in tensors.items()}
                done += plan.place(matrices, tile, values)
                if not any(bool(tensor.isnan().any()) for tensor in tensors.values()):
                    rows += [(tile, name, value) for name, value in values.items()]
            if store is not None and time.monotonic() - saved > _SAVE_EVERY:
                store.put_values(rows)
                rows, saved = [], time.monotonic()
            yield done, failed
    finally:
        if store is not None and rows:
            store.put_values(rows)


def _packed(values: Tensor) -> bytes:
    code = b"d" if values.dtype == torch.float64 else b"f"
    return code + bytes(values.numpy().astype(_DTYPES[code]).tobytes())


def chance_levels(
    job: Job, store: Store | None, engine: Engine, reduced: Sequence[Reduced]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Similarity of each item to itself with shuffled rows.

    Returns:
        Per measure the means ``[N]``, and the standard deviation over all draws of all items.
    """
    settings = job.settings
    draws = math.ceil(_CHANCE_DRAWS / len(reduced))
    values = {name: torch.full((len(reduced), draws), math.nan, dtype=torch.float64) for name in settings.measures}
    for kind in settings.kinds:
        measures = settings.measures_of(kind)
        names = [_chance_name(kind, entry.contents[kind], draws) for entry in reduced]
        present = set() if store is None else _stored_chance(store, names, measures, values)
        missing = [i for i in range(len(reduced)) if i not in present]
        parts = [missing[start : start + _CHANCE_TASK] for start in range(0, len(missing), _CHANCE_TASK)]
        keys = [tuple(reduced[i].keys[kind] for i in part) for part in parts]
        tasks = [Chance(kind, tuple(measures), of_part, reduced[0].n, draws) for of_part in keys]
        for index, found in engine.run(job, tasks):
            rows = []
            for i, drawn in zip(parts[index], found, strict=True):
                for measure, numbers in drawn.items():
                    values[measure][i] = torch.tensor(numbers, dtype=torch.float64)
                    rows.append((names[i], measure, np.array(numbers).tobytes()))
            if store is not None:
                store.put_values(rows)
    for name in settings.measures:
        if not MEASURES[name].paired:  # the order of rows is nothing to it: there is no chance level
            values[name].fill_(math.nan)
    return {name: v.mean(1) for name, v in values.items()}, {name: float(v.std()) for name, v in values.items()}


def _stored_chance(
    store: Store, names: Sequence[bytes], measures: Sequence[str], values: dict[str, Tensor]
) -> set[int]:
    """Write stored draws into ``values`` and return the items that have them for every measure."""
    present = set(range(len(names)))
    for measure in measures:
        found = store.values(names, measure)
        present &= {i for i, name in enumerate(names) if name in found}
        for i in present:
            values[measure][i] = torch.from_numpy(np.frombuffer(found[names[i]]).copy())
    return present


def _chance_name(kind: str, content: str, draws: int) -> bytes:
    return bytes.fromhex(digest("chance", kind, content, draws, library_digest()))[:20]
