"""Watch how the representations of a probe set move while a model trains, without touching the training.

:class:`Monitor` is the core; the callbacks for Lightning and transformers are thin shells around it.
"""

from __future__ import annotations

import csv
import functools
import io
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor, nn

from lfm_torch import _checks, _files
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import kind_of, warn
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import check_measures, full_name
from lfm_torch.representations.batches import as_batches
from lfm_torch.representations.extraction import activations
from lfm_torch.representations.layers import Layers, resolve_layers, unwrapped
from lfm_torch.representations.pooling import POOLINGS, Pooling
from lfm_torch.representations.probe import is_sharded
from lfm_torch.representations.state_dicts import fitting_weights
from lfm_torch.training.alerts import Alert, Event
from lfm_torch.training.distributed import from_rank_zero, is_rank_zero
from lfm_torch.training.spaces import SpaceSettings
from lfm_torch.training.tracker import Chance, Extracted, Moment, Point, Reference, Tracker

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

__all__ = ["Alert", "Event", "Monitor", "Point"]

OnEvent = Callable[[Event], bool | None]
_SPACE_OPTIONS = ("n_neighbors", "n_basis", "metric", "weights")


class ProbeOptions(TypedDict, total=False):
    """How the probe is run and reduced: the options of :func:`extract`, :func:`build_graph` and the basis.

    Numbers of neighbours and eigenvectors that the probe has no samples for are cut to what it has, with a warning.
    ``mode`` says which score is "best" ("min" or "max"); ``background`` whether graphs and bases are made in a thread
    of their own (see :class:`Monitor`).
    """

    pooling: Pooling
    batch_size: int
    n_neighbors: int | None
    n_basis: int | None
    metric: Metric
    weights: Weights
    mode: Literal["min", "max"]
    background: bool | None


class MonitorOptions(ProbeOptions, total=False):
    """What a callback hands on to its :class:`Monitor`."""

    measures: str | Sequence[str]
    alerts: Sequence[Alert]
    on_event: OnEvent | None
    on_error: Literal["warn", "raise"]


class Monitor:
    """Measures how similar chosen layers are to a reference, again and again, on a fixed probe set.

    At each measurement the layers are extracted in eval mode, reduced to graph and basis (started from the last basis,
    to a tolerance that leaves scores exact to about 1e-4), and compared to the reference. The training is left as it
    is, bit for bit: weights, train/eval flags, buffers, random number generators, hooks, autocast. Compiled, DDP- and
    FSDP-wrapped models are taken as they are.

    Under torch.distributed every rank must call the same methods. Rank zero measures its model and hands the result to
    all, so that they agree to the bit; an error there is raised on all. With FSDP every rank takes part in the forward
    pass; one that fails alone inside it leaves the others waiting, as it does in training.

    On a GPU only the forward pass keeps the training waiting: graphs and bases are made by a thread on a CUDA stream of
    its own, and the point (and its alerts) is there at the next measurement or :meth:`flush`. ``background=False``
    waits, ``True`` does the same on a CPU.

    Args:
        model: The model in training.
        probe: Inputs as in :func:`extract`, the same at every measurement; 500 to 2,000 samples are a good choice.
        layers: Layers as in :func:`extract`.
        reference: What to compare to: "previous" (the last measurement), "initial" (the first), "best" (the one with
            the best ``score`` so far, see ``mode``), a checkpoint file of the model, a module with the same layers, or
            representations ``{layer: [n, d]}``.
        measures: One name or several, as in :func:`similarity`.
        every: :meth:`step` measures at every so many calls.
        alerts: Thresholds, see :class:`Alert`.
        on_event: Called on rank zero with every :class:`Event`; True ends the training (``should_stop``).
        on_error: What a measurement that fails does, the first excepted, which always raises (it is a matter of
            settings): "warn" records the reason in the history and lets the training go on, "raise" raises.
        directory: Where ``history.json`` is written at every measurement, and tables and figures by :meth:`save`.
        **options: See :class:`ProbeOptions`.

    Attributes:
        history: The points so far.
        chance: ``{layer: {measure: value}}`` between a layer and itself with shuffled rows: what no similarity looks
            like.
        should_stop: An alert with ``stop`` or ``on_event`` has asked for the end.

    Raises:
        TypeError: a model or probe of the wrong kind.
        ValueError: unknown layers, measures, reference or options.

    Example:
        >>> import torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.Tanh(), torch.nn.Linear(16, 2))
        >>> probe = torch.randn(100, 4)
        >>> with Monitor(network, probe, layers="1", reference="initial", n_basis=10) as monitor:
        ...     for epoch in range(2):
        ...         with torch.no_grad():  # a training epoch
        ...             network[0].weight *= 1.5
        ...         point = monitor.step()
        >>> len(monitor.history), sorted(point.scores["1"])
        (3, ['components', 'dimension', 'heat', 'lfm', 'overlap'])
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        *,
        layers: Layers,
        reference: Reference = "previous",
        measures: str | Sequence[str] = ("heat", "overlap", "lfm"),
        every: int = 1,
        alerts: Sequence[Alert] = (),
        on_event: OnEvent | None = None,
        on_error: Literal["warn", "raise"] = "warn",
        directory: str | Path | None = None,
        **options: Unpack[ProbeOptions],
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        for name in options:
            _checks.check_choice("an option", name, ProbeOptions.__annotations__)
        names = check_measures(measures)
        _checks.check_choice("on_error", on_error, ("warn", "raise"))
        _checks.check_range("every", every, 1, 2**62, "a number of calls")
        mode, self._pooling = options.get("mode", "min"), options.get("pooling", "mean")
        _checks.check_choice("mode", mode, ("min", "max"))
        _checks.check_choice("pooling", self._pooling, POOLINGS)
        self._batch_size, self._background = options.get("batch_size", 256), options.get("background")
        as_batches(probe, self._batch_size)
        given = {name: options[name] for name in _SPACE_OPTIONS if name in options}  # type: ignore[literal-required]
        settings = SpaceSettings(names, **given)
        self.model, self.probe, self.every = model, probe, every
        self.layers = resolve_layers(model, layers)
        self.on_event, self.on_error = on_event, on_error
        self.directory = None if directory is None else Path(directory)
        self.history: list[Point] = []
        self.chance: Chance = {}
        self.should_stop = False
        self._tracker = Tracker(settings, reference, self.layers, mode, alerts)
        self._steps = 0
        self._last_step: int | None = None
        self._said: set[tuple[str, str]] = set()
        self._pending: Callable[[], tuple[Point, Chance]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"Monitor({len(self.layers)} layers, {len(self.history)} points, reference {self.reference_name!r})"

    @property
    def settings(self) -> SpaceSettings:
        """How layers become spaces, and which measures are taken."""
        return self._tracker.settings

    @property
    def reference_name(self) -> str:
        """What the layers are compared to, in a word."""
        reference = self._tracker.reference
        return str(reference) if isinstance(reference, (str, Path)) else type(reference).__name__

    @property
    def last_step(self) -> int | None:
        """Step of the last measurement, also where it is still in the background."""
        return self._last_step

    def __enter__(self) -> Self:
        """Measure the state before training, unless a history was loaded."""
        if not self.history:
            self.measure(step=self._steps)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()

    def step(self, *, epoch: float | None = None, score: float | None = None) -> Point | None:
        """Count a step or an epoch, and measure at every ``every``-th."""
        self._steps += 1
        return self.measure(step=self._steps, epoch=epoch, score=score) if self._steps % self.every == 0 else None

    def measure(self, *, step: int, epoch: float | None = None, score: float | None = None) -> Point | None:
        """Measure now.

        Args:
            step: Where in the training, for the history.
            epoch: The same in epochs.
            score: For ``reference="best"``: the validation score of the model as it is.

        Returns:
            The point; None where it is still being made in the background.

        Raises:
            ValueError: no ``score`` where one is needed; and at the first measurement, or with ``on_error="raise"``,
                whatever went wrong.
        """
        self.flush()
        if self._tracker.reference == "best" and (score is None or not math.isfinite(score)):
            raise ValueError(f"score must be a finite number for reference='best', got {score}")
        self._last_step = step
        strict = self.on_error == "raise" or not self.history
        found = self._extract()

        def work() -> tuple[Point, Chance]:
            assert found is not None
            return self._tracker.measure(Moment(step, epoch, score), found, strict=strict)

        if not self._in_background():
            self._pending = work
            return self.flush()
        if is_rank_zero():
            self._pool = self._pool or ThreadPoolExecutor(1, thread_name_prefix="lfm-monitor")
            self._pending = self._pool.submit(work).result
        else:
            self._pending = work
        return None

    def flush(self) -> Point | None:
        """Wait for a measurement in the background and take it into the history; None where there is none."""
        if self._pending is None:
            return None
        pending, self._pending = self._pending, None
        point, chance = from_rank_zero(pending)
        self.chance = chance
        self.history.append(point)
        self._write_history()
        for layer, reason in point.failures.items():
            if is_rank_zero():
                warn(f"Monitor: layer {layer!r} not measured at step {point.step}: {reason}")
        self._say(point)
        asked = bool(point.events and self.on_event and from_rank_zero(functools.partial(self._tell, point.events)))
        self.should_stop |= asked or any(event.stop for event in point.events)
        return point

    def _say(self, point: Point) -> None:
        """Warn of what there is to be said of layers when it first is, whatever the numbers in it are later."""
        kinds = {layer: (layer, kind_of(text)) for layer, text in point.notes.items()}
        new = [layer for layer, kind in kinds.items() if kind not in self._said]
        self._said.update(kinds.values())
        if new and is_rank_zero():
            where = f"{len(new)} of {len(self.layers)} layers at step {point.step}, the first: {new[0]!r}"
            warn(f"Monitor: notes on {where}: {point.notes[new[0]]} (said once; the history has it)")

    def close(self) -> None:
        """Take what is in the background, write the history; figures are written by :meth:`save`."""
        self.flush()
        self._write_history()
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None

    def abandon(self) -> None:
        """End without the other ranks, after an error: rank zero keeps the history it has."""
        pending, self._pending = self._pending, None
        if pending is not None and self._pool is not None and is_rank_zero():
            try:
                self.history.append(pending()[0])
            except Exception as error:
                warn(f"Monitor: the last measurement failed: {_checks.one_line(error)}")
        self._write_history()

    def rows(self) -> list[dict[str, Any]]:
        """The history as a table: step, epoch, layer, measure, value."""
        return [
            {"step": point.step, "epoch": point.epoch, "layer": layer, "measure": measure, "value": value}
            for point in self.history
            for layer, measured in point.scores.items()
            for measure, value in measured.items()
        ]

    @outside_autocast
    def layer_matrix(self, measure: str) -> Tensor | None:
        """Layers against layers at the last measurement; None on ranks that hold no bases, and before the first."""
        measure = full_name(measure)
        last, compare = self._tracker.last, self.settings.compare
        spaces = [last[layer] for layer in self.layers if layer in last]
        if not spaces:
            return None
        values = [[compare(x, y)[measure] for y in spaces] for x in spaces]
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    def save(self, directory: str | Path | None = None, *, figures: bool = True) -> list[Path]:
        """Write ``history.json``, ``history.csv`` and, with ``figures``, ``curves.png``, ``layers.png`` (rank zero).

        Raises:
            ImportError: figures without matplotlib, once the history is written.
            ValueError: no directory given, here or to the monitor.
        """
        self.flush()
        directory = Path(directory) if directory is not None else self.directory
        if directory is None:
            raise ValueError("directory must be given, here or to the Monitor, got None")
        if not is_rank_zero():
            return []
        directory.mkdir(parents=True, exist_ok=True)
        written = _write(directory, {"history.json": self._json(), "history.csv": _csv(self.rows())})
        return written + _write(directory, self._figures()) if figures else written

    def _figures(self) -> dict[str, bytes]:
        try:
            from lfm_torch.report.history import history_figures
        except ImportError as error:
            raise ImportError('figures need matplotlib: pip install "lfm-torch[cli]", or pass figures=False') from error
        measures = self.settings.measures
        matrices = {name: matrix for name in measures if (matrix := self.layer_matrix(name)) is not None}
        points = [(point.step, point.scores) for point in self.history]
        return history_figures(
            self.layers, measures, points, chance=self.chance, reference=self.reference_name, matrices=matrices
        )

    def state_dict(self) -> dict[str, Any]:
        """History, bases and counts in plain values and CPU tensors.

        Raises:
            RuntimeError: a measurement is in the background; :meth:`flush` first, on all ranks.
        """
        if self._pending is not None:
            raise RuntimeError("a measurement is still in the background: call flush() on all ranks, then state_dict()")
        return {
            "steps": self._steps,
            "layers": list(self.layers),
            "history": [asdict(point) for point in self.history],
            "chance": {layer: dict(values) for layer, values in self.chance.items()},
            "tracker": self._tracker.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the curve continues, also with its reference.

        Raises:
            ValueError: the state of a monitor of other layers.
        """
        if list(state["layers"]) != self.layers:
            raise ValueError(f"state must be of the layers {self.layers}, got {list(state['layers'])}")
        self._steps = state["steps"]
        self.history = [
            Point(**{**point, "events": tuple(Event(**event) for event in point["events"])})
            for point in state["history"]
        ]
        self._last_step = self.history[-1].step if self.history else None
        self.chance = {layer: dict(values) for layer, values in state["chance"].items()}
        self._tracker.chance = {layer: dict(values) for layer, values in state["chance"].items()}
        self._tracker.load_state(state["tracker"])

    def _extract(self) -> Extracted | Exception | None:
        """Extract on the ranks that must; None elsewhere. An error is a value: all ranks must come to the next step."""
        start = time.perf_counter()
        try:
            if not is_rank_zero() and not is_sharded(self.model):
                return None
            layers = self._activations(self.model)
            if is_rank_zero() and self._tracker.needs_reference:
                self._tracker.set_reference(self._fixed_reference())
        except Exception as error:
            return error
        device = next(iter(layers.values())).device
        ready = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            ready = torch.cuda.current_stream(device).record_event()
        return Extracted(layers, time.perf_counter() - start, ready)

    def _activations(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return activations(
            model,
            self.probe,
            layers=self.layers,
            pooling=self._pooling,
            batch_size=self._batch_size,
            weights=weights,
        )

    def _fixed_reference(self) -> Mapping[str, Tensor]:
        reference = self._tracker.reference
        if isinstance(reference, Mapping):
            return reference
        if isinstance(reference, nn.Module):
            return self._activations(reference)
        if is_sharded(self.model):
            raise ValueError(
                "reference must be a module, or representations, for a model that FSDP has split, got "
                f"{str(reference)!r}"
            )
        return self._activations(self.model, fitting_weights(unwrapped(self.model), reference))

    def _in_background(self) -> bool:
        if self._background is not None:
            return self._background
        return any(weight.is_cuda for weight in self.model.parameters())

    def _tell(self, events: Sequence[Event]) -> bool:
        assert self.on_event is not None
        answers = [bool(self.on_event(event)) for event in events]
        return any(answers)

    def _write_history(self) -> None:
        if self.directory is not None and is_rank_zero() and self.history:
            self.directory.mkdir(parents=True, exist_ok=True)
            _files.write_atomically(self.directory / "history.json", self._json())

    def _json(self) -> bytes:
        record = {
            "layers": self.layers,
            "reference": self.reference_name,
            "settings": asdict(self.settings),
            "chance": self.chance,
            "points": [asdict(point) for point in self.history],
        }
        return (json.dumps(record, indent=1) + "\n").encode()


def metrics_of(point: Point) -> dict[str, float]:
    """A point as flat metrics for a logger, ``lfm/<measure>/<layer>``."""
    return {
        f"lfm/{measure}/{layer}": value
        for layer, measured in point.scores.items()
        for measure, value in measured.items()
    }


def _write(directory: Path, contents: Mapping[str, bytes]) -> list[Path]:
    for name, content in contents.items():
        _files.write_atomically(directory / name, content)
    return [directory / name for name in contents]


def _csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, ["step", "epoch", "layer", "measure", "value"])
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()
