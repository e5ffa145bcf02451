"""Many representations against each other: every basis once, all pairs in blocks, one matrix per measure.

The comparison is planned, then done: read and reduce each network, measure chance, compare the pairs. Whatever is in
the store already is not done again; what is finished goes there at once. The work itself is in
:mod:`lfm_torch.comparison.jobs`.
"""

from __future__ import annotations

import dataclasses
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import warn
from lfm_torch.comparison.jobs import memory
from lfm_torch.comparison.jobs.blocks import all_pairs, chance_levels
from lfm_torch.comparison.jobs.engines import DistributedEngine, Engine, make_engine
from lfm_torch.comparison.jobs.index import Waiting
from lfm_torch.comparison.jobs.pieces import Job, quiet_workers
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import (
    MemoryPieces,
    Reduced,
    Reduction,
    Screened,
    Screening,
    Settings,
    identity_without,
    known_rows,
    left_out_of,
    rows_key,
)
from lfm_torch.comparison.result import Comparison, Failure, Item
from lfm_torch.graphs.graph import build_graph
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import DEFAULT_MEASURES, check_measures
from lfm_torch.representations.checkpoint_files import Checkpoint, in_order, parse_name
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.nonfinite import Nonfinite, check_nonfinite
from lfm_torch.representations.sources import Given, Source

Progress = Callable[[str, int, int], None]
# called by the public function, wherever this module stands: who reads the log chooses by that name
logger = logging.getLogger("lfm_torch.compare")
# without a handler of the program's own Python would write warnings to stderr
logger.addHandler(logging.NullHandler())


@outside_autocast
def compare(
    representations: Mapping[str, ArrayLike | Mapping[str, ArrayLike]] | Checkpoints,
    *,
    measures: str | Sequence[str] = DEFAULT_MEASURES,
    n_neighbors: int | None = None,
    n_basis: int | None = None,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    runs: Mapping[str, tuple[str, int | None]] | None = None,
    progress: Progress | None = None,
    store: Store | str | Path | None = None,
    engine: Engine | str = "local",
    memory_budget: int | None = None,
    nonfinite: Nonfinite = "raise",
) -> Comparison:
    """Compare many representations of the same samples, every one with every other.

    Each representation is reduced once to its basis; the maps of all pairs are then products of bases, taken in blocks.
    The numbers are those of :func:`similarity`, and the same to the last bit whatever the engine, the number of threads
    and what the store held before (on processors of one kind, with the compiled kernels). On a GPU products follow
    ``torch.set_float32_matmul_precision``: "high" multiplies in TF32, which moves values by about 1e-5. Networks
    of checkpoints run outside autocast, which does not reach other threads and processes.

    Args:
        representations: ``{network: {layer: [n, d]}}`` or ``{network: [n, d]}``; row i is the same sample everywhere. A
            :class:`Checkpoints` reads them from files, one at a time; so do the other classes of
            :mod:`lfm_torch.representations.sources`.
        measures: One name or several; :data:`lfm_torch.measures.MEASURES` describes them all.
        n_neighbors: Neighbours in the graphs; None takes 15% of the samples, at most 300.
        n_basis: Eigenvectors per space, less than n; None takes a quarter of the samples, at most 50.
        metric: Metric of the graphs, see :func:`knn`.
        weights: Edge weights, see :func:`build_graph`.
        runs: ``{network: (run, step)}`` to say which networks are states of one training run; None reads it from the
            names ("seed0/epoch=04").
        progress: Called as ``progress(stage, done, total)`` with the stages "representations" and "pairs" (before them
            "samples" where ``nonfinite="drop"``).
        store: Directory in which every finished piece is kept: an interrupted comparison goes on where it was, one with
            a network more computes the new pairs only. None keeps nothing.
        engine: "local" (threads), "torch" (the processes of ``torchrun``) or "ray"; the last two need a store.
        memory_budget: Bytes that this process may take in all; None for half of what is free.
        nonfinite: What a sample with a NaN or an infinity in some representation does: "raise" lists that
            representation as failed and compares the rest; "drop" leaves the sample out of all, says so once, and lists
            the rows in ``settings["left_out"]``. A representation that has lost more than half of its samples fails in
            any case, and the others keep them. Networks are read twice for it, the first time to find the rows.

    Returns:
        Comparison. A network or layer that cannot be read or compared is listed in its ``failures``; the rest goes on.

    Raises:
        TypeError: no mapping, or one with names that are no strings.
        ValueError: settings that do not fit the samples, an unknown measure, a run of an unknown network, fewer than
            two representations left, a budget that is too small.
        OSError: the store cannot be written (a full disk, say); what was finished is kept.

    Warns:
        LFMWarning: something could not be compared; samples were left out; something is to be said of a representation
            (rows of zeros, an offset), which its item holds as ``notes`` and the report lists; a measure lies on the
            wrong side of chance (:meth:`Comparison.below_chance`).

    Example:
        >>> import torch
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
        >>> comparison = compare({"a": x, "b": 2 * x, "c": x.exp()}, n_basis=10)
        >>> comparison
        Comparison(3 checkpoints in 3 runs x 1 layers, 3 representations of 100 samples, lfm, overlap, heat)
        >>> round(float(comparison.matrix("heat")[0, 1]), 4)
        1.0
    """
    started = time.perf_counter()
    settings = Settings(check_measures(measures), n_neighbors, n_basis, metric, weights)
    _check_settings(representations, settings, runs)
    check_nonfinite(nonfinite)
    if store is None and engine != "local":
        raise ValueError(f"store must be a directory that all workers see for engine={engine!r}, got None")
    source = representations if isinstance(representations, Source) else Given(representations)
    kept = None if store is None else store if isinstance(store, Store) else Store(store)
    job = Job(source, settings, MemoryPieces() if kept is None else kept, source.device)
    chosen = make_engine(engine)
    result: Comparison | None = None
    try:
        with warnings.catch_warnings():
            quiet_workers()
            if isinstance(chosen, DistributedEngine) and chosen.rank > 0:
                result = chosen.serve(job)
                return result
            if kept is not None:
                kept.open()
            run = _Run(job, kept, chosen, progress or (lambda stage, done, total: None), memory_budget, nonfinite)
            result = _finished(run, runs, started)
    finally:
        chosen.close(result)
    if result.failures:
        failed = f"{len(result.failures)} could not be compared and were left out, the first: {result.failures[0]}"
        warn(f"compare: {failed}")
    if noted := [item for item in result.items if item.notes]:
        first = f"{noted[0].checkpoint}, layer {noted[0].layer}: {'; '.join(noted[0].notes)}"
        warn(f"compare: notes on {len(noted)} of {len(result.items)} representations, the first: {first}")
    for sentence in result.below_chance().values():
        warn(f"compare: {sentence}")
    return result


def _finished(run: _Run, runs: Mapping[str, tuple[str, int | None]] | None, started: float) -> Comparison:
    source, settings = run.job.source, run.job.settings
    reduced, failures = run.reduce_all()
    if len(reduced) < 2:
        failed = f"; {len(failures)} failed, the first: {failures[0]}" if failures else ""
        raise ValueError(f"representations must hold at least two that can be compared, got {len(reduced)}{failed}")
    checkpoints = _checkpoints_of(source, {entry.checkpoint for entry in reduced}, runs)
    place = {checkpoint.name: i for i, checkpoint in enumerate(checkpoints)}
    reduced.sort(key=lambda entry: place[entry.checkpoint])
    logger.info("%d representations of %d checkpoints, %d failures", len(reduced), len(checkpoints), len(failures))
    run.plan_memory(reduced)
    chance, chance_std = chance_levels(run.job, run.store, run.engine, reduced)
    matrices, failed_pairs = all_pairs(run.job, run.store, run.engine, reduced, run.progress)
    logger.info("all pairs compared after %.1f s", time.perf_counter() - started)
    n = reduced[0].n
    described = {
        "n_samples": n,
        **({"left_out": list(run.left_out)} if run.left_out else {}),
        "measures": list(settings.measures),
        "n_neighbors": settings.neighbors_of(n),
        "n_basis": settings.basis_of(n),
        "metric": settings.metric,
        "weights": settings.weights,
        **source.settings,
        "seconds": round(time.perf_counter() - started, 2),
    }
    items = tuple(Item(e.checkpoint, e.layer, e.n_components, e.n_unconverged, e.note, e.notes) for e in reduced)
    layers = tuple(dict.fromkeys(item.layer for item in items))
    return Comparison(
        items, tuple(checkpoints), layers, matrices, chance, described, (*failures, *failed_pairs), chance_std
    )


def _check_settings(representations: object, settings: Settings, runs: Mapping[str, Any] | None) -> None:
    if not isinstance(representations, Mapping):
        raise TypeError(
            "representations must be a mapping {network: {layer: tensor}} or Checkpoints, got "
            f"{type(representations).__name__}"
        )
    if not representations:
        raise ValueError("representations must hold at least two representations, got none")
    for name in representations:
        if not isinstance(name, str):
            raise TypeError(f"representations must have strings as names, got {name!r}")
    for name in runs or ():
        _checks.check_choice("runs", name, representations)
    # settings are the caller's, not a checkpoint's: what the graph refuses whatever the points is refused here, once
    build_graph(
        torch.eye(3, dtype=torch.float32, device="cpu"), n_neighbors=1, metric=settings.metric, weights=settings.weights
    )


def _checkpoints_of(
    source: Source, present: set[str], runs: Mapping[str, tuple[str, int | None]] | None
) -> list[Checkpoint]:
    if runs is not None:
        return in_order([Checkpoint(name, *runs.get(name, (name, None))) for name in source if name in present])
    if source.checkpoints:
        return [checkpoint for checkpoint in source.checkpoints if checkpoint.name in present]
    found = [Checkpoint(name, *parse_name(name, root="run")) for name in source if name in present]
    # names without a step are networks, in the order in which they were given
    return in_order(found) if any(checkpoint.step is not None for checkpoint in found) else found


def _pieces_of(reduced: Sequence[Reduced]) -> list[tuple[str, dict[str, Any]]]:
    return [(key, {"kind": kind, **entry.info}) for entry in reduced for kind, key in entry.keys.items()]


@dataclass
class _Run:
    """One comparison on its way: what is done, and where to."""

    job: Job
    store: Store | None
    engine: Engine
    progress: Progress
    memory_budget: int | None
    nonfinite: Nonfinite
    left_out: tuple[int, ...] = ()

    def screen_all(self) -> int | None:
        """Find the samples to leave out and return how many there are in all; None where nothing can be read."""
        names = list(self.job.source)
        screened: dict[str, dict[str, Screened]] = {}
        tasks = []
        for name in names:
            identities, screened[name] = self._screened(name)
            if identities is None or identities:
                tasks.append(Screening(name, identities))
        done = len(names) - len(tasks)
        self.progress("samples", done, len(names))
        with Waiting(None if self.store is None else self.store.keep) as waiting:
            for index, found in self.engine.run(self.job, tasks, limit=self._readers(None)):
                task = tasks[index]
                screened[task.checkpoint] |= found
                done += 1
                self.progress("samples", done, len(names))
                if task.identities is not None:
                    waiting.add([(rows_key(task.identities[layer]), one.info) for layer, one in found.items()])
        every = [one for name in names for one in screened[name].values()]
        n, self.left_out = left_out_of(every)
        if n is not None:
            self.job.settings.check_against(n - len(self.left_out))
        return n

    def _screened(self, name: str) -> tuple[dict[str, str] | None, dict[str, Screened]]:
        """Return the identities of the layers to be looked at (None for all) and what the store knows of the others."""
        if self.store is None:
            return None, {}
        try:
            identities = self.job.source.identities(name, self.store.digest_of)
        # said where it is reduced
        except Exception:
            return {}, {}
        known = known_rows(self.store, identities)
        return {layer: identity for layer, identity in identities.items() if layer not in known}, known

    def reduce_all(self) -> tuple[list[Reduced], list[Failure]]:
        """Reduce what is not in the store; what fails is listed with its reason, in the order of the source."""
        names = list(self.job.source)
        n = self.screen_all() if self.nonfinite == "drop" else None
        reduced: dict[str, list[Reduced]] = {}
        failures: dict[str, list[Failure]] = {name: [] for name in names}
        tasks = []
        for name in names:
            identities, reduced[name] = self._present(name, failures[name])
            if identities is None or identities:
                tasks.append(Reduction(name, identities, n, self.left_out))
        if self.store is not None:
            self.store.keep(_pieces_of([entry for entries in reduced.values() for entry in entries]))
        done = len(names) - len(tasks)
        self.progress("representations", done, len(names))
        if done:
            logger.info("%d of %d checkpoints are in the store", done, len(names))
        first = next((entries[0] for entries in reduced.values() if entries), None)
        n = n if first is None else first.n + len(self.left_out)
        while tasks and n is None:
            # the first one says how many samples there are, which all the others must have
            n = next(self._reduce(tasks[:1], reduced, failures))
            done += 1
            self.progress("representations", done, len(names))
            tasks = tasks[1:]
        rest = [dataclasses.replace(task, n=n) for task in tasks]
        for _ in self._reduce(rest, reduced, failures, limit=self._readers(n)):
            done += 1
            self.progress("representations", done, len(names))
        for name in names:
            for entry in [entry for entry in reduced[name] if entry.n + len(self.left_out) != n]:
                reduced[name].remove(entry)
                reason = f"the representation must have the {n} rows of the others, got {entry.n}"
                failures[name].append(Failure(name, entry.layer, reason))
        return [e for name in names for e in reduced[name]], [f for name in names for f in failures[name]]

    def _present(self, name: str, failures: list[Failure]) -> tuple[dict[str, str] | None, list[Reduced]]:
        """Return the identities of the layers to be reduced (None for all) and the layers that are in the store."""
        if self.store is None:
            return None, []
        try:
            identities = self.job.source.identities(name, self.store.digest_of)
        # isolation, as where it is read: a missing file fails alone
        except Exception as error:
            failures.append(Failure(name, None, _checks.one_line(error)))
            return {}, []
        settings = self.job.settings
        identities = {layer: identity_without(identity, self.left_out) for layer, identity in identities.items()}
        found = []
        for place, (layer, identity) in enumerate(identities.items()):
            keys = {kind: settings.key(kind, identity) for kind in settings.kinds}
            infos = [self.store.info(key) for key in keys.values()]
            if all(info is not None for info in infos):
                info = infos[0] or {}
                stats = {field: info[field] for field in ("n_components", "n_unconverged", "note")}
                stats["notes"] = tuple(dict.fromkeys(text for about in infos for text in (about or {})["notes"]))
                contents = {kind: (about or {})["content"] for kind, about in zip(keys, infos, strict=True)}
                found.append(Reduced(name, layer, place, info["n"], info["dtype"], keys, contents, **stats))
        present = {entry.layer for entry in found}
        return {layer: identity for layer, identity in identities.items() if layer not in present}, found

    def _reduce(
        self,
        tasks: Sequence[Reduction],
        reduced: dict[str, list[Reduced]],
        failures: dict[str, list[Failure]],
        limit: int | None = 1,
    ) -> Iterator[int | None]:
        with Waiting(None if self.store is None else self.store.keep) as waiting:
            for index, (found, failed) in self.engine.run(self.job, tasks, limit=limit):
                name = tasks[index].checkpoint
                failures[name] += failed
                reduced[name] = sorted((*reduced[name], *found), key=lambda entry: entry.place)
                waiting.add(_pieces_of(found))
                for failure in failed:
                    logger.warning("not compared: %s", failure)
                yield found[0].n + len(self.left_out) if found else None

    def _readers(self, n: int | None) -> int | None:
        """How many checkpoints may be reduced side by side: as many as source and memory allow."""
        settings = self.job.settings
        # edges of the graph while it is made symmetric, and the vectors of the eigensolver
        of_sample = 48 * settings.neighbors_of(n or 2) + 64 * settings.basis_of(n or 2)
        each = (n or 0) * of_sample if settings.map_measures else 0
        by_memory = memory.workers(self.memory_budget, each)
        return min(by_memory, self.job.source.threads or by_memory)

    def plan_memory(self, reduced: Sequence[Reduced]) -> None:
        """Say how much of the bases may be held in memory at a time."""
        matrices = len(reduced) ** 2 * 4 * len(self.job.settings.measures)
        self.job.cache_bytes = memory.cache_bytes(self.memory_budget, reserved=2 * matrices)
