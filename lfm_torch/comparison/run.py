"""Many representations against each other: every basis once, all pairs in blocks, one matrix per measure.

The comparison is planned, then done: read and reduce each network, measure chance, compare the pairs. Whatever is in
the store already is not done again; what is finished goes there at once. The work itself is in
:mod:`lfm_torch.comparison.jobs`.
"""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import warn
from lfm_torch.comparison.items import Item
from lfm_torch.comparison.jobs.blocks import all_pairs
from lfm_torch.comparison.jobs.chance import chance_levels
from lfm_torch.comparison.jobs.engines import DistributedEngine, Engine, make_engine
from lfm_torch.comparison.jobs.job import Job, MemoryPieces
from lfm_torch.comparison.jobs.pieces import quiet_workers
from lfm_torch.comparison.jobs.reductions import Progress, Reductions
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.result import Comparison
from lfm_torch.graphs.graph import build_graph
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import DEFAULT_MEASURES, check_measures
from lfm_torch.representations.checkpoint_files import Checkpoint, in_order, parse_name
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.nonfinite import Nonfinite, check_nonfinite
from lfm_torch.representations.sources import Given, Source

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
            run = Reductions(job, kept, chosen, progress or (lambda stage, done, total: None), memory_budget, nonfinite)
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


def _finished(run: Reductions, runs: Mapping[str, tuple[str, int | None]] | None, started: float) -> Comparison:
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
