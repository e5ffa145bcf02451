"""Watch how the representations of a probe set move while a model trains, without touching the training.

:class:`Monitor` is the core; the callbacks for Lightning and transformers are thin shells around it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch._warnings import kind_of, warn
from lfm_torch.measures.table import check_measures, full_name
from lfm_torch.representations.batches import as_batches
from lfm_torch.representations.layers import Layers, resolve_layers
from lfm_torch.representations.pooling import POOLINGS
from lfm_torch.training.alerts import Alert, Event
from lfm_torch.training.distributed import from_rank_zero, is_rank_zero
from lfm_torch.training.history import Chance, Point, Record, write_files
from lfm_torch.training.options import OnEvent, ProbeOptions
from lfm_torch.training.reading import LayerReader
from lfm_torch.training.spaces import SpaceSettings
from lfm_torch.training.tracker import Moment, Reference, Tracker

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

_SPACE_OPTIONS = ("n_neighbors", "n_basis", "metric", "weights")


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
        mode, pooling = options.get("mode", "min"), options.get("pooling", "mean")
        _checks.check_choice("mode", mode, ("min", "max"))
        _checks.check_choice("pooling", pooling, POOLINGS)
        batch_size, self._background = options.get("batch_size", 256), options.get("background")
        as_batches(probe, batch_size)
        given = {name: options[name] for name in _SPACE_OPTIONS if name in options}  # type: ignore[literal-required]
        settings = SpaceSettings(names, **given)
        self.model, self.probe, self.every = model, probe, every
        self.layers = resolve_layers(model, layers)
        self.on_event, self.on_error = on_event, on_error
        self.directory = None if directory is None else Path(directory)
        self.should_stop = False
        self._reader = LayerReader(probe, self.layers, pooling, batch_size)
        self._tracker = Tracker(settings, reference, self.layers, mode, alerts)
        self._record = Record(self.layers, self.reference_name)
        self._steps = 0
        self._last_step: int | None = None
        self._said: set[tuple[str, str]] = set()
        self._pending: Callable[[], tuple[Point, Chance]] | None = None
        self._pool: ThreadPoolExecutor | None = None

    def __repr__(self) -> str:
        return f"Monitor({len(self.layers)} layers, {len(self.history)} points, reference {self.reference_name!r})"

    @property
    def history(self) -> list[Point]:
        """The points so far."""
        return self._record.points

    @property
    def chance(self) -> Chance:
        """``{layer: {measure: value}}`` of a layer and itself with shuffled rows: what no similarity looks like."""
        return self._record.chance

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
        found = self._reader.extract(self.model, self._tracker)

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
        self._record.add(point, chance)
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
        return self._record.rows()

    def layer_matrix(self, measure: str) -> Tensor | None:
        """Layers against layers at the last measurement; None on ranks that hold no bases, and before the first."""
        return self._tracker.layer_matrix(full_name(measure))

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
        written = self._record.save(directory, self.settings)
        return written + write_files(directory, self._figures()) if figures else written

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
            **self._record.state(),
            "tracker": self._tracker.state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken; the curve continues, also with its reference.

        Raises:
            ValueError: the state of a monitor of other layers.
        """
        self._record.load_state(state)
        self._steps = state["steps"]
        self._last_step = self.history[-1].step if self.history else None
        self._tracker.chance = {layer: dict(values) for layer, values in state["chance"].items()}
        self._tracker.load_state(state["tracker"])

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
            self._record.write(self.directory, self.settings)
