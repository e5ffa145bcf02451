"""Many representations against each other: every basis once, all pairs in blocks, one matrix per measure."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import LFMWarning
from lfm_torch.baselines.points import Points, State
from lfm_torch.checkpoints import Checkpoint, Checkpoints, in_order, parse_name
from lfm_torch.comparison import Comparison, Failure, Item
from lfm_torch.graph import Weights, build_graph
from lfm_torch.measures import DEFAULT_MEASURES, MAP_MEASURES, POINT_MEASURES, check_measures
from lfm_torch.neighbors import Metric, default_n_neighbors
from lfm_torch.pairs import score_pairs, shuffled_maps, shuffled_scores, stored
from lfm_torch.pipeline import representation_basis
from lfm_torch.similarity import Maps

Progress = Callable[[str, int, int], None]
SINGLE_LAYER = "representation"
_BLOCK_BYTES = 256 * 2**20
_CHANCE_DRAWS = 100


def compare(
    representations: Mapping[str, Tensor | Mapping[str, Tensor]] | Checkpoints,
    *,
    measures: Sequence[str] = DEFAULT_MEASURES,
    n_neighbors: int | None = None,
    n_basis: int = 50,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    runs: Mapping[str, tuple[str, int | None]] | None = None,
    progress: Progress | None = None,
) -> Comparison:
    """Compare many representations of the same samples, every one with every other.

    Each representation is reduced once to its basis; the maps of all pairs are then products of bases, taken in blocks
    of bounded memory. The numbers are those of :func:`similarity`.

    Args:
        representations: ``{network: {layer: [n, d]}}`` or ``{network: [n, d]}``; row i is the same sample everywhere. A
            :class:`Checkpoints` reads them from files, one at a time.
        measures: Names of measures; :data:`lfm_torch.measures.MEASURES` describes them all.
        n_neighbors: Neighbours in the graphs; None takes 15% of the samples, at most 300.
        n_basis: Eigenvectors per space, less than n.
        metric: Metric of the graphs, see :func:`knn`.
        weights: Edge weights, see :func:`build_graph`.
        runs: ``{network: (run, step)}`` to say which networks are states of one training run; None reads it from the
            names ("seed0/epoch=04").
        progress: Called as ``progress(stage, done, total)`` with the stages "representations" and "pairs".

    Returns:
        Comparison. A network or layer that cannot be read or compared is listed in its ``failures``; the rest goes on.

    Raises:
        TypeError: no mapping, or one with names that are no strings.
        ValueError: settings that do not fit the samples, an unknown measure, a run of an unknown network, fewer than
            two representations left.

    Warns:
        LFMWarning: something could not be compared.

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
    check_measures(measures)
    settings = Settings(tuple(measures), n_neighbors, n_basis, metric, weights)
    _check_settings(representations, settings, runs)
    tell = progress or (lambda stage, done, total: None)
    reduced, failures = _reduce_all(representations, settings, tell)
    if len(reduced) < 2:
        failed = f"; {len(failures)} failed, the first: {failures[0]}" if failures else ""
        raise ValueError(f"representations must hold at least two that can be compared, got {len(reduced)}{failed}")
    if failures:
        warnings.warn(
            f"compare: {len(failures)} could not be compared and were left out, the first: {failures[0]}",
            LFMWarning,
            stacklevel=2,
        )
    checkpoints = _checkpoints_of(representations, {entry.item.checkpoint for entry in reduced}, runs)
    place = {checkpoint.name: i for i, checkpoint in enumerate(checkpoints)}
    reduced.sort(key=lambda entry: place[entry.item.checkpoint])
    matrices = _all_pairs(reduced, settings, tell)
    chance, spread = _chance(reduced, settings)
    n = reduced[0].n
    described = {
        "n_samples": n,
        "measures": list(measures),
        "n_neighbors": default_n_neighbors(n) if n_neighbors is None else n_neighbors,
        "n_basis": n_basis,
        "metric": metric,
        "weights": weights,
        **(representations.settings if isinstance(representations, Checkpoints) else {}),
        "seconds": round(time.perf_counter() - started, 2),
    }
    items = tuple(entry.item for entry in reduced)
    layers = tuple(dict.fromkeys(item.layer for item in items))
    return Comparison(items, tuple(checkpoints), layers, matrices, chance, described, tuple(failures), spread)


@dataclass(frozen=True)
class Settings:
    """How representations are compared, as :func:`compare` takes it."""

    measures: tuple[str, ...]
    n_neighbors: int | None
    n_basis: int
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

    def check_against(self, n: int) -> None:
        """Raise ValueError where ``n`` samples are too few."""
        if n < 2:
            raise ValueError(f"representations must have at least 2 rows, got {n}")
        if self.map_measures:
            _checks.check_range("n_basis", self.n_basis, 1, n - 1, f"less than the {n} samples")
            if "lfm" in self.measures and self.n_basis < 2:
                raise ValueError("n_basis must be at least 2 for 'lfm', which leaves the constant function out, got 1")
            if self.n_neighbors is not None:
                _checks.check_range("n_neighbors", self.n_neighbors, 1, n - 1, f"there are {n} samples")


@dataclass(frozen=True)
class _Reduced:
    """What pairs need of a representation: its basis, ``evecs`` as ``[m, n]``, and a state per measure of points."""

    item: Item
    n: int
    evals: Tensor
    evecs: Tensor
    states: dict[str, State]


def _check_settings(representations: object, settings: Settings, runs: Mapping[str, Any] | None) -> None:
    if not isinstance(representations, Mapping):
        raise TypeError(
            "representations must be a mapping {network: {layer: tensor}} or Checkpoints, got "
            f"{type(representations).__name__}"
        )
    if not representations:
        raise ValueError("representations must hold at least two representations, got none")
    for name in representations:
        _check_name("representations", name)
    for name in runs or ():
        _checks.check_choice("runs", name, representations)
    # settings are the caller's, not a checkpoint's: what the graph refuses whatever the points is refused here, once
    build_graph(torch.eye(3), n_neighbors=1, metric=settings.metric, weights=settings.weights)


def _check_name(argument: str, name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{argument} must have strings as names, got {name!r}")


def _reduce_all(
    representations: Mapping[str, Tensor | Mapping[str, Tensor]], settings: Settings, progress: Progress
) -> tuple[list[_Reduced], list[Failure]]:
    """Read every network once and reduce its layers; what fails is listed with its reason."""
    reduced: list[_Reduced] = []
    failures: list[Failure] = []
    progress("representations", 0, len(representations))
    for done, name in enumerate(representations, start=1):
        try:
            found = representations[name]
        # isolation: whatever is wrong with one checkpoint is said in the report, and the others are compared
        except Exception as error:
            failures.append(Failure(name, None, _checks.one_line(error)))
            found = {}
        layers = found if isinstance(found, Mapping) else {SINGLE_LAYER: found}
        for layer, x in layers.items():
            _check_name(f"representations[{name!r}]", layer)
            failing = layer if layers is found else None
            try:
                x = _checked(x, reduced[0] if reduced else None)
            except (TypeError, ValueError) as error:
                failures.append(Failure(name, failing, _checks.one_line(error)))
                continue
            if not reduced:
                settings.check_against(len(x))
            try:
                reduced.append(_reduce(name, layer, x, settings))
            except (TypeError, ValueError, RuntimeError) as error:
                failures.append(Failure(name, failing, _checks.one_line(error)))
        progress("representations", done, len(representations))
    return reduced, failures


def _checked(x: object, first: _Reduced | None) -> Tensor:
    x = _checks.check_points("the representation", x).detach()
    if x.dim() != 2:
        raise ValueError(f"the representation must have shape [n, d], got {list(x.shape)}")
    if first is not None and len(x) != first.n:
        raise ValueError(f"the representation must have the {first.n} rows of the others, got {len(x)}")
    if first is not None and x.device != (device := _device([first])):
        raise ValueError(f"the representation must be on the device of the others, {device}, got {x.device}")
    return x


def _reduce(name: str, layer: str, x: Tensor, settings: Settings) -> _Reduced:
    points = Points(x)
    states = {measure: stored(POINT_MEASURES[measure].prepare(points), x.dtype) for measure in settings.point_measures}
    if not settings.map_measures:
        none = x.new_empty(0)
        return _Reduced(Item(name, layer), len(x), none, none, states)
    basis = representation_basis(
        x,
        n_neighbors=settings.n_neighbors,
        n_basis=settings.n_basis,
        metric=settings.metric,
        weights=settings.weights,
    )
    item = Item(name, layer, int(basis.n_components), int((~basis.converged).sum()))
    return _Reduced(item, len(x), basis.evals, basis.evecs.mT.contiguous(), states)


def _checkpoints_of(
    representations: Mapping[str, Any], present: set[str], runs: Mapping[str, tuple[str, int | None]] | None
) -> list[Checkpoint]:
    if runs is not None:
        return in_order(
            [Checkpoint(name, *runs.get(name, (name, None))) for name in representations if name in present]
        )
    if isinstance(representations, Checkpoints):
        return [checkpoint for checkpoint in representations.checkpoints if checkpoint.name in present]
    found = [Checkpoint(name, *parse_name(name, root="run")) for name in representations if name in present]
    # names without a step are networks, in the order in which they were given
    return in_order(found) if any(checkpoint.step is not None for checkpoint in found) else found


def _all_pairs(reduced: Sequence[_Reduced], settings: Settings, progress: Progress) -> dict[str, Tensor]:
    """Every measure for every ordered pair, ``[N, N]`` on the CPU."""
    n_items = len(reduced)
    kinds = bool(settings.map_measures) + bool(settings.point_measures)
    total = kinds * n_items * (n_items + 1) // 2
    matrices = {name: torch.empty(n_items, n_items, dtype=_dtype(reduced)) for name in settings.measures}
    done = 0
    progress("pairs", done, total)
    for rows, columns in _blocks(reduced, settings):
        # each block of maps is computed once: the map back is the transpose, C_yx = Phi_x^T Phi_y
        maps = _block_maps(reduced[rows], reduced[columns])
        for name in settings.map_measures:
            measure = MAP_MEASURES[name]
            values = measure.read(maps)
            matrices[name][rows, columns] = values.mT.cpu()
            if rows != columns:
                matrices[name][columns, rows] = (values if measure.symmetric else measure.read(maps.swapped)).cpu()
        height, width = rows.stop - rows.start, columns.stop - columns.start
        done += height * width if rows != columns else height * (height + 1) // 2
        progress("pairs", done, total)
    for k, name in enumerate(settings.point_measures, start=1):
        values = score_pairs(POINT_MEASURES[name], [entry.states[name] for entry in reduced])
        matrices[name] = values.to(matrices[name])
        progress("pairs", done + (total - done) * k // len(settings.point_measures), total)
    return matrices


def _device(reduced: Sequence[_Reduced]) -> torch.device:
    states = [state[0] for entry in reduced[:1] for state in entry.states.values()]
    return (states or [reduced[0].evecs])[0].device


def _dtype(reduced: Sequence[_Reduced]) -> torch.dtype:
    return functools.reduce(torch.promote_types, {entry.evals.dtype for entry in reduced}, torch.float32)


def _blocks(reduced: Sequence[_Reduced], settings: Settings) -> Iterator[tuple[slice, slice]]:
    """Blocks of the upper triangle of pairs, each within the memory of ``_BLOCK_BYTES``."""
    if not settings.map_measures:
        return
    per_pair = settings.n_basis**2 * reduced[0].evals.element_size()
    size = max(1, math.isqrt(_BLOCK_BYTES // per_pair))
    parts = [slice(start, min(start + size, len(reduced))) for start in range(0, len(reduced), size)]
    for i, rows in enumerate(parts):
        for columns in parts[i:]:
            yield rows, columns


def _block_maps(x: Sequence[_Reduced], y: Sequence[_Reduced]) -> Maps:
    """Maps from every item of ``x`` to every item of ``y`` by one matrix product; readings are ``[len(y), len(x)]``."""
    dtype = _dtype([*x, *y])
    evecs_x, evecs_y = (torch.stack([entry.evecs.to(dtype) for entry in side]) for side in (x, y))
    evals_x, evals_y = (torch.stack([entry.evals.to(dtype) for entry in side]) for side in (x, y))
    return Maps.between(evecs_x, evals_x, evecs_y, evals_y)


def _chance(reduced: Sequence[_Reduced], settings: Settings) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Similarity of each item to itself with shuffled rows: the same spectrum and shape, no correspondence.

    Returns:
        Per measure the means ``[N]``, and the standard deviation over all draws of all items.
    """
    generator = torch.Generator().manual_seed(0)
    count = math.ceil(_CHANCE_DRAWS / len(reduced))
    draws = {name: torch.empty(len(reduced), count, dtype=torch.float64) for name in settings.measures}
    for i, entry in enumerate(reduced):
        orders = torch.stack([torch.randperm(entry.n, generator=generator) for _ in range(count)])
        orders = orders.to(_device(reduced))
        if settings.map_measures:
            maps = shuffled_maps(entry.evecs, entry.evals, entry.evecs, entry.evals, orders)
        for name in settings.map_measures:
            draws[name][i] = MAP_MEASURES[name].read(maps).flatten()
        for name in settings.point_measures:
            draws[name][i] = shuffled_scores(POINT_MEASURES[name], entry.states[name], entry.states[name], orders)
    means = {name: values.mean(1).to(_dtype(reduced)) for name, values in draws.items()}
    return means, {name: float(values.std()) for name, values in draws.items()}
