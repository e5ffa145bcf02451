"""The work of a comparison in pieces, each of which depends on its inputs alone.

Not on who computes it, on how many threads, in which order, or on what is stored already: that is what makes an
interrupted comparison, one on two machines and one in a single process agree to the last bit. So a piece runs on one
CPU thread (several run side by side), and the value of a pair depends on its two representations alone, whichever block
of pairs it is computed in; which of the two comes first is decided by their content.
"""

from __future__ import annotations

import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import LFMWarning, collecting
from lfm_torch.baselines.points import Points
from lfm_torch.comparison.items import Failure
from lfm_torch.comparison.jobs.bases import Found, bases_of, is_out_of_memory
from lfm_torch.comparison.jobs.job import Job, Side
from lfm_torch.comparison.jobs.settings import rows_key
from lfm_torch.comparison.jobs.tasks import Block, Chance, Group, Reduced, Reduction, Screened, Screening
from lfm_torch.measures.pairs import score_sides, shuffled_maps, shuffled_scores, stored
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import MAP_MEASURES, MEASURES, POINT_MEASURES, PointMeasure
from lfm_torch.representations.nonfinite import rows_not_finite, without_rows
from lfm_torch.representations.sources import SINGLE_LAYER


def run_task(job: Job, task: Any) -> Any:
    """Do one task of any kind: what an engine sends to its workers."""
    work: dict[type, Callable[[Job, Any], Any]] = {
        Screening: screen_checkpoint,
        Reduction: reduce_checkpoint,
        Block: compare_block,
        Chance: chance,
    }
    with torch.no_grad():
        return work[type(task)](job, task)


def quiet_workers() -> None:
    """Filter warnings that tasks record themselves, in the thread that starts the workers (filters are global)."""
    # eigenpairs that did not converge are counted in the item, and the report shows them
    warnings.filterwarnings("ignore", message="spectral_basis", category=LFMWarning)
    # "detected pickle protocol 4": what matters of it is in the failure
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")


def screen_checkpoint(job: Job, task: Screening) -> dict[str, Screened]:
    """Find the rows of a checkpoint's layers that are not finite; what cannot be read is for the reduction to say."""
    try:
        found = job.source[task.checkpoint]
    # isolation, as in the reduction
    except Exception:
        return {}
    layers = found if isinstance(found, Mapping) else {SINGLE_LAYER: found}
    screened: dict[str, Screened] = {}
    for layer, x in layers.items():
        if task.identities is not None and layer not in task.identities:
            continue
        try:
            points = _space(x)
        except (TypeError, ValueError):
            continue
        title = f"{task.checkpoint}, layer {layer}" if layers is found else task.checkpoint
        one = screened[layer] = Screened(title, len(points), tuple(rows_not_finite(points)))
        if task.identities is not None:
            tensors = {"rows": torch.tensor(one.rows, dtype=torch.int64, device="cpu")}
            job.pieces.write(rows_key(task.identities[layer]), tensors, one.info)
    return screened


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
            points = _checked(x, n, job.device, task.left_out)
        except (TypeError, ValueError) as error:
            failed.append(Failure(name, failing, _checks.one_line(error)))
            continue
        if n is None:
            n = len(points) + len(task.left_out)
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


class _Wanted(NamedTuple):
    """A representation to reduce, and what a failure of it is called."""

    points: Tensor
    identity: str
    layer: str
    failing: str | None
    place: int


def _checked(x: object, n: int | None, device: str, left_out: Sequence[int]) -> Tensor:
    points = _space(x).detach()
    if n is not None and len(points) != n:
        raise ValueError(f"the representation must have the {n} rows of the others, got {len(points)}")
    if str(points.device) != device:
        raise ValueError(f"the representation must be on the device of the others, {device}, got {points.device}")
    kept = without_rows(points, left_out)
    if not left_out or not bool(kept.isfinite().all()):
        # of the whole, for the numbers of its rows
        _checks.check_finite("the representation", points)
    return kept


def _space(x: object) -> Tensor:
    _checks.check_dims("the representation", x, batched=None)
    return _checks.check_floating("the representation", x)


def _reduce(job: Job, name: str, wanted: _Wanted, basis: Found | None, seconds: float) -> Reduced:
    settings, x = job.settings, wanted.points
    keys = {kind: settings.key(kind, wanted.identity) for kind in settings.kinds}
    reduced = Reduced(name, wanted.layer, wanted.place, len(x), _dtype_name(x), keys, {})
    if isinstance(basis, Exception):
        raise basis
    if basis is not None:
        found, note, notes = basis
        unconverged = int((~found.converged).sum())
        stats: dict[str, Any] = {"n_components": int(found.n_components), "n_unconverged": unconverged}
        stats |= {"note": note, "notes": tuple(notes)}
        reduced = reduced._replace(dtype=_dtype_name(found.evals), **stats)
        info = {"kind": "basis", **reduced.info, "seconds": round(seconds, 4)}
        # transposed, [m, n]: the layout that the products of pairs read
        tensors = {"evals": found.evals, "evecs": found.evecs.mT.contiguous()}
        reduced.contents["basis"] = job.pieces.write(keys["basis"], tensors, info)
    points = Points(x)
    for name in settings.point_measures:
        with collecting() as notes:
            state = stored(POINT_MEASURES[name].prepare(points), points.dtype)
        tensors = {str(i): part for i, part in enumerate(state)}
        reduced = reduced._replace(notes=tuple(dict.fromkeys((*reduced.notes, *notes))))
        reduced.contents[name] = job.pieces.write(keys[name], tensors, {"kind": name, **reduced.info})
    return reduced


def _dtype_name(x: Tensor) -> str:
    return str(torch.promote_types(x.dtype, torch.float32)).removeprefix("torch.")


def compare_block(job: Job, task: Block) -> tuple[dict[str, Tensor], list[Failure]]:
    """Compute measures ``[2, rows, columns]``, x to y and y to x, or ``[1, rows, columns]`` where symmetric.

    A block without room is computed in halves, and a single pair without room on the CPU; where even that fails its
    values are NaN and the failure says why.
    """
    try:
        return _block_values(job, task), []
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        reason = _checks.one_line(error)
    if len(task.rows) * len(task.columns) > 1:
        side, halves = task.halves()
        found = [compare_block(job, half) for half in halves]
        values = {name: torch.cat([of_half[name] for of_half, _ in found], 1 + side) for name in task.measures}
        return values, [failure for _, failed in found for failure in failed]
    if job.device != "cpu":
        return compare_block(dataclasses.replace(job, device="cpu", _cache=None), task)
    nothing = torch.full((2, 1, 1), math.nan, dtype=torch.float32, device="cpu")
    failure = Failure(task.x.checkpoints[task.rows[0]], None, reason, task.y.checkpoints[task.columns[0]])
    return {name: nothing[: 1 if MEASURES[name].symmetric else 2] for name in task.measures}, [failure]


def _block_values(job: Job, task: Block) -> dict[str, Tensor]:
    x, y = job.sides(task.kind, task.x).part(task.rows), job.sides(task.kind, task.y).part(task.columns)
    if task.kind == "basis":
        return _map_values(x, y, task.measures)
    return {task.kind: _state_values(x, y, POINT_MEASURES[task.kind])}


def _map_values(x: Side, y: Side, measures: Sequence[str]) -> dict[str, Tensor]:
    dtype = torch.promote_types(x.evals.dtype, y.evals.dtype)
    # the map back is the transpose, C_yx = Phi_x^T Phi_y: one product serves both directions
    maps = Maps.between(*(part.to(dtype) for part in (x.evecs, x.evals, y.evecs, y.evals)))
    values = {}
    for name in measures:
        measure = MAP_MEASURES[name]
        ways = [maps] if measure.symmetric else [maps, maps.swapped]
        values[name] = torch.stack([measure.read(way).mT for way in ways]).cpu()
    return values


def _state_values(x: Side, y: Side, measure: PointMeasure) -> Tensor:
    """A measure of points for every pair of layers: each of x against those of y that have the same shapes."""
    values = score_sides(measure, x.states, y.states)
    if measure.symmetric:
        return values.unsqueeze(0)
    return torch.stack([values, score_sides(measure, y.states, x.states).mT])


def chance(job: Job, task: Chance) -> list[dict[str, list[float]]]:
    """Similarity of each representation to itself with shuffled rows, draw by draw: the same spectrum and shape."""
    values = []
    for key in task.keys:
        side = job.sides(task.kind, Group(("",), (key,)))
        n = side.evecs.shape[2] if task.kind == "basis" else task.n
        # by the number of the draw: the same orders of rows for every representation, whenever it is compared
        generators = (torch.Generator().manual_seed(draw) for draw in range(task.draws))
        orders = torch.stack([torch.randperm(n, generator=g, device="cpu") for g in generators]).to(job.device)
        values.append(_shuffled(side, task, orders))
    return values


def _shuffled(side: Side, task: Chance, orders: Tensor) -> dict[str, list[float]]:
    if task.kind == "basis":
        evecs, evals = side.evecs[0], side.evals[0]
        maps = shuffled_maps(evecs, evals, evecs, evals, orders)
        return {name: MAP_MEASURES[name].read(maps).flatten().tolist() for name in task.measures}
    state = side.states[0]
    return {task.kind: shuffled_scores(POINT_MEASURES[task.kind], state, state, orders).tolist()}
