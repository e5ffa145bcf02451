"""The work of a comparison in pieces, each of which depends on its inputs alone.

Not on who computes it, on how many threads, in which order, or on what is stored already: that is what makes an
interrupted comparison, one on two machines and one in a single process agree to the last bit. So a piece runs on one
CPU thread (several run side by side), and pairs are computed in tiles of fixed content: the layers of one checkpoint
against those of another, the two in the order of their digests.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import threading
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import LFMWarning
from lfm_torch.baselines.points import Points, State
from lfm_torch.comparison import Failure
from lfm_torch.jobs.bases import Found, bases_of, is_out_of_memory
from lfm_torch.jobs.fingerprints import digest, library_digest
from lfm_torch.jobs.store import DamagedPieceError
from lfm_torch.jobs.tasks import Chance, Group, Pieces, Reduced, Reduction, Settings, Tiles
from lfm_torch.measures import MAP_MEASURES, MEASURES, POINT_MEASURES, PointMeasure
from lfm_torch.pairs import score_sides, shuffled_maps, shuffled_scores, stored
from lfm_torch.similarity import Maps
from lfm_torch.sources import SINGLE_LAYER, Source

# columns of bases that one tile multiplies: large enough for a matrix product, small enough for the caches
_TILE_COLUMNS = 1024


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

    def sides(self, kind: str, group: Group) -> _Side:
        """Return a group's tensors, from memory where it was used lately."""
        if self._cache is None:
            self._cache = _Cache(self.cache_bytes)
        return self._cache.get((kind, group), lambda: _read_side(self, kind, group))


@dataclass(frozen=True)
class _Side:
    """One side of a tile: ``evecs [L, m, n]`` and ``evals [L, m]``, or the ``states`` of each layer for a measure."""

    evals: Tensor
    evecs: Tensor
    states: tuple[State, ...]

    @property
    def bytes(self) -> int:
        parts = (part for state in self.states for part in state)
        return sum(t.numel() * t.element_size() for t in (self.evals, self.evecs, *parts))


class _Cache:
    """The groups used last, within a number of bytes (a single one may be larger)."""

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes, self._bytes = max_bytes, 0
        self._sides: OrderedDict[Any, _Side] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: Any, read: Callable[[], _Side]) -> _Side:
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


def _read_side(job: Job, kind: str, group: Group) -> _Side:
    none = torch.empty(0)
    try:
        found = [job.pieces.read(key)[0] for key in group.keys]
    except (DamagedPieceError, KeyError) as error:
        advice = "`lfm-torch cache verify --remove` takes it out, and the next run computes it again"
        raise DamagedPieceError(f"{_checks.one_line(error)}; {advice}") from error
    if kind != "basis":
        states = (tuple(tensors[str(i)].to(job.device) for i in range(len(tensors))) for tensors in found)
        return _Side(none, none, tuple(states))
    dtype = functools.reduce(torch.promote_types, [tensors["evals"].dtype for tensors in found])
    evals = torch.stack([tensors["evals"].to(job.device, dtype) for tensors in found])
    evecs = torch.stack([tensors["evecs"].to(job.device, dtype) for tensors in found])
    return _Side(evals, evecs, ())


def run_task(job: Job, task: Any) -> Any:
    """Do one task of any kind: what an engine sends to its workers."""
    work: dict[type, Callable[[Job, Any], Any]] = {Reduction: reduce_checkpoint, Tiles: compare_tiles, Chance: chance}
    with torch.no_grad():
        return work[type(task)](job, task)


def quiet_workers() -> None:
    """Filter warnings that tasks record themselves, in the thread that starts the workers (filters are global)."""
    # eigenpairs that did not converge are counted in the item, and the report shows them
    warnings.filterwarnings("ignore", message="spectral_basis", category=LFMWarning)
    # "detected pickle protocol 4": what matters of it is in the failure
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def reduce_checkpoint(job: Job, task: Reduction) -> tuple[list[Reduced], list[Failure]]:
    """Read one checkpoint and store basis and points of its layers; what fails is listed with its reason."""
    name = task.checkpoint
    try:
        found = job.source[name]
    # isolation: whatever is wrong with one checkpoint is said in the report, and the others are compared
    except Exception as error:
        return [], [Failure(name, None, _checks.one_line(error))]
    layers = found if isinstance(found, Mapping) else {SINGLE_LAYER: found}
    wanted: list[_Wanted] = []
    failed: list[Failure] = []
    n = task.n
    for place, (layer, x) in enumerate(layers.items()):
        if not isinstance(layer, str):
            raise TypeError(f"representations[{name!r}] must have strings as names, got {layer!r}")
        if task.identities is not None and layer not in task.identities:
            continue
        failing = layer if layers is found else None
        try:
            points = _checked(x, n, job.device)
        except (TypeError, ValueError) as error:
            failed.append(Failure(name, failing, _checks.one_line(error)))
            continue
        if n is None:
            n = len(points)
            # settings that do not fit the samples are the caller's mistake, not this checkpoint's
            job.settings.check_against(n)
        identity = f"{name}\0{layer}" if task.identities is None else task.identities[layer]
        wanted.append(_Wanted(points, identity, layer, failing, place))
    reduced: list[Reduced] = []
    bases = bases_of([one.points for one in wanted], job.settings) if "basis" in job.settings.kinds else None
    for one in wanted:
        started = time.perf_counter()
        basis = None if bases is None else next(bases)
        try:
            reduced.append(_reduce(job, name, one, basis, time.perf_counter() - started))
        except (TypeError, ValueError, RuntimeError, MemoryError) as error:
            failed.append(Failure(name, one.failing, _checks.one_line(error)))
    return reduced, failed


@dataclass(frozen=True)
class _Wanted:
    """A representation to reduce, and what a failure of it is called."""

    points: Tensor
    identity: str
    layer: str
    failing: str | None
    place: int


def _checked(x: object, n: int | None, device: str) -> Tensor:
    x = _checks.check_points("the representation", x).detach()
    if x.dim() != 2:
        raise ValueError(f"the representation must have shape [n, d], got {list(x.shape)}")
    if n is not None and len(x) != n:
        raise ValueError(f"the representation must have the {n} rows of the others, got {len(x)}")
    if str(x.device) != device:
        raise ValueError(f"the representation must be on the device of the others, {device}, got {x.device}")
    return x


def _reduce(job: Job, name: str, wanted: _Wanted, basis: Found | None, seconds: float) -> Reduced:
    settings, x = job.settings, wanted.points
    keys = {kind: settings.key(kind, wanted.identity) for kind in settings.kinds}
    reduced = Reduced(name, wanted.layer, wanted.place, len(x), _dtype_name(x), keys, {})
    if isinstance(basis, Exception):
        raise basis
    if basis is not None:
        found, note = basis
        unconverged = int((~found.converged).sum())
        stats: dict[str, Any] = {"n_components": int(found.n_components), "n_unconverged": unconverged, "note": note}
        reduced = dataclasses.replace(reduced, dtype=_dtype_name(found.evals), **stats)
        info = {"kind": "basis", **reduced.info, "seconds": round(seconds, 4)}
        # transposed, [m, n]: the layout that the products of pairs read
        tensors = {"evals": found.evals, "evecs": found.evecs.mT.contiguous()}
        reduced.contents["basis"] = job.pieces.write(keys["basis"], tensors, info)
    points = Points(x)
    for name in settings.point_measures:
        state = stored(POINT_MEASURES[name].prepare(points), x.dtype)
        tensors = {str(i): part for i, part in enumerate(state)}
        reduced.contents[name] = job.pieces.write(keys[name], tensors, {"kind": name, **reduced.info})
    return reduced


def _dtype_name(x: Tensor) -> str:
    return str(torch.promote_types(x.dtype, torch.float32)).removeprefix("torch.")


def groups_of(reduced: Sequence[Reduced], kind: str, n_basis: int) -> list[Group]:
    """Split the layers of one checkpoint into the groups that tiles are made of, by their content alone."""
    size = max(1, _TILE_COLUMNS // n_basis) if kind == "basis" else 16
    parts = [reduced[start : start + size] for start in range(0, len(reduced), size)]
    return [
        Group(part[0].checkpoint, tuple(e.keys[kind] for e in part), digest([e.contents[kind] for e in part]))
        for part in parts
    ]


def tile_of(kind: str, a: Group, b: Group) -> bytes:
    """Name the tile of two groups, in either order."""
    return bytes.fromhex(digest("tile", kind, *sorted((a.content, b.content)), library_digest()))[:20]


def in_order(a: Group, b: Group) -> tuple[Group, Group]:
    """Return two groups as a tile takes them."""
    return (a, b) if a.content <= b.content else (b, a)


def compare_tiles(job: Job, task: Tiles) -> tuple[list[dict[str, Tensor]], list[Failure]]:
    """Compute the measures of each tile: ``[2, L_a, L_b]`` for a to b and b to a, ``[1, L_a, L_b]`` where symmetric.

    A tile without room is computed in smaller blocks, then on the CPU; where even that fails its values are NaN and the
    failure says why.
    """
    failed: list[Failure] = []
    return [_tile(job, task, a, b, failed) for a, b in task.pairs], failed


def _tile(job: Job, task: Tiles, a: Group, b: Group, failed: list[Failure]) -> dict[str, Tensor]:
    try:
        return _with_room(job, task, a, b)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        failed.append(Failure(a.checkpoint, None, _checks.one_line(error), b.checkpoint))
    nothing = torch.full((2, len(a.keys), len(b.keys)), math.nan)
    return {name: nothing[: 1 if MEASURES[name].symmetric else 2] for name in task.measures}


def _with_room(job: Job, task: Tiles, a: Group, b: Group) -> dict[str, Tensor]:
    x, y = job.sides(task.kind, a), job.sides(task.kind, b)
    if task.kind != "basis":
        return {task.kind: _state_values(x, y, POINT_MEASURES[task.kind])}
    try:
        return _map_values(x, y, task.measures)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    parts = [_rows_of(x, i) for i in range(len(x.evals))]
    try:
        rows = [_map_values(part, y, task.measures) for part in parts]
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error) or not x.evals.is_cuda:
            raise
        rows = [_map_values(_on_cpu(part), _on_cpu(y), task.measures) for part in parts]
    return {name: torch.cat([row[name] for row in rows], dim=1) for name in task.measures}


def _rows_of(side: _Side, layer: int) -> _Side:
    return _Side(side.evals[layer : layer + 1], side.evecs[layer : layer + 1], ())


def _on_cpu(side: _Side) -> _Side:
    return _Side(side.evals.cpu(), side.evecs.cpu(), ())


def _map_values(x: _Side, y: _Side, measures: Sequence[str]) -> dict[str, Tensor]:
    dtype = torch.promote_types(x.evals.dtype, y.evals.dtype)
    # the map back is the transpose, C_yx = Phi_x^T Phi_y: one product serves both directions
    maps = Maps.between(*(part.to(dtype) for part in (x.evecs, x.evals, y.evecs, y.evals)))
    values = {}
    for name in measures:
        measure = MAP_MEASURES[name]
        ways = [maps] if measure.symmetric else [maps, maps.swapped]
        values[name] = torch.stack([measure.read(way).mT for way in ways]).cpu()
    return values


def _state_values(x: _Side, y: _Side, measure: PointMeasure) -> Tensor:
    """A measure of points for every pair of layers: each of x against those of y that have the same shapes."""
    values = score_sides(measure, x.states, y.states)
    if measure.symmetric:
        return values.unsqueeze(0)
    return torch.stack([values, score_sides(measure, y.states, x.states).mT])


def chance(job: Job, task: Chance) -> list[dict[str, list[float]]]:
    """Similarity of each representation to itself with shuffled rows, draw by draw: the same spectrum and shape."""
    values = []
    for key in task.keys:
        side = job.sides(task.kind, Group("", (key,), key))
        n = side.evecs.shape[2] if task.kind == "basis" else task.n
        # by the number of the draw: the same orders of rows for every representation, whenever it is compared
        generators = (torch.Generator().manual_seed(draw) for draw in range(task.draws))
        orders = torch.stack([torch.randperm(n, generator=generator) for generator in generators]).to(job.device)
        values.append(_shuffled(side, task, orders))
    return values


def _shuffled(side: _Side, task: Chance, orders: Tensor) -> dict[str, list[float]]:
    if task.kind == "basis":
        evecs, evals = side.evecs[0], side.evals[0]
        maps = shuffled_maps(evecs, evals, evecs, evals, orders)
        return {name: MAP_MEASURES[name].read(maps).flatten().tolist() for name in task.measures}
    state = side.states[0]
    return {task.kind: shuffled_scores(POINT_MEASURES[task.kind], state, state, orders).tolist()}
