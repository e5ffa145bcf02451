"""The state of a monitor on the rank that measures: last bases, reference, alerts; one measurement after another."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import about, collecting
from lfm_torch.training.alerts import Alert, Watch
from lfm_torch.training.history import Chance, Point
from lfm_torch.training.spaces import Space, SpaceSettings, dimension

Reference = str | Path | nn.Module | Mapping[str, Tensor]
_MOVING = ("previous", "initial", "best")


@dataclass(frozen=True)
class Moment:
    """When a measurement is taken."""

    step: int
    epoch: float | None
    score: float | None


@dataclass(frozen=True)
class Extracted:
    """Representations of the layers, and how long the pass took."""

    layers: dict[str, Tensor]
    seconds: float
    ready: Any


class Tracker:
    """Reduces what was extracted, compares it to the reference, and moves the reference along."""

    def __init__(
        self, settings: SpaceSettings, reference: Reference, layers: Sequence[str], mode: str, alerts: Sequence[Alert]
    ) -> None:
        self.settings, self.layers, self.mode = settings, list(layers), mode
        self.reference = checked_reference(reference)
        self.watch = Watch(alerts)
        self.last: dict[str, Space] = {}
        self.references: dict[str, Space] = {}
        self.best: float | None = None
        self.chance: Chance = {}
        self._stream: Any = None
        self._told: set[str] = set()

    @property
    def needs_reference(self) -> bool:
        """A fixed reference has not been reduced yet."""
        return not self.references and self.reference not in _MOVING

    @outside_autocast
    def set_reference(self, found: Mapping[str, Tensor]) -> None:
        """Reduce a fixed reference."""
        missing = [layer for layer in self.layers if layer not in found]
        if missing:
            raise ValueError(f"reference must have the layers {self.layers}, got none of {missing}")
        points = {
            layer: _checks.check_space(f"reference[{layer!r}]", found[layer], batched=None) for layer in self.layers
        }
        references = {}
        for layer, x in points.items():
            with about(f"reference[{layer!r}]"):
                references[layer] = self._reduced(x)
        self.references = references

    @torch.no_grad()
    @outside_autocast
    def measure(self, moment: Moment, found: Extracted | Exception, *, strict: bool) -> tuple[Point, Chance]:
        """Reduce and compare what was extracted; returns the point, and the chance levels.

        Raises:
            Exception: where ``strict``, what went wrong; otherwise it is a failure of the point.
        """
        start = time.perf_counter()
        if isinstance(found, Exception):
            if strict:
                raise found
            reason = _checks.one_line(found, typed=True)
            return Point(moment.step, moment.epoch, {}, dict.fromkeys(self.layers, reason), (), {}), self.chance
        scores: dict[str, dict[str, float]] = {}
        failures: dict[str, str] = {}
        notes: dict[str, str] = {}
        with self._aside(found):
            for layer, x in found.layers.items():
                scores[layer] = {}
                try:
                    with collecting() as found_notes:
                        self._measure_layer(layer, x, scores[layer])
                except (ValueError, TypeError, RuntimeError) as error:
                    if strict:
                        raise
                    failures[layer] = _checks.one_line(error)
                if found_notes:
                    notes[layer] = "; ".join(found_notes)
            self._move_reference(moment)
            for layer in self.last.keys() - self.chance.keys():
                self.chance[layer] = self.settings.chance(self.last[layer])
        events = tuple(self.watch.events(scores, moment.step, moment.epoch))
        seconds = {"extract": found.seconds, "reduce": time.perf_counter() - start}
        return Point(moment.step, moment.epoch, scores, failures, events, seconds, notes), self.chance

    @outside_autocast
    def layer_matrix(self, measure: str) -> Tensor | None:
        """Layers against layers at the last measurement; None where no bases are held."""
        spaces = [self.last[layer] for layer in self.layers if layer in self.last]
        if not spaces:
            return None
        values = [[self.settings.compare(x, y)[measure] for y in spaces] for x in spaces]
        return torch.tensor(values, dtype=torch.float32, device="cpu")

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.load(weights_only=True)``."""
        return {
            "last": {layer: space.state() for layer, space in self.last.items()},
            "references": {layer: space.state() for layer, space in self.references.items()},
            "best": self.best,
            "counts": dict(self.watch.counts),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Read what :meth:`state` gave."""
        self.last = {layer: Space.from_state(space) for layer, space in state["last"].items()}
        self.references = {layer: Space.from_state(space) for layer, space in state["references"].items()}
        self.best = state["best"]
        self.watch.counts = dict(state["counts"])

    def _measure_layer(self, layer: str, x: Tensor, scores: dict[str, float]) -> None:
        scores["dimension"] = dimension(x)
        if scores["dimension"] == 0:
            raise ValueError("the representation must have rows that differ, got equal ones throughout (collapsed)")
        space = self._reduced(x, self.last.get(layer))
        if space.basis is not None:
            scores["components"] = float(space.basis.n_components)
        reference = self.last if self.reference == "previous" else self.references
        if layer in reference:
            scores |= self.settings.compare(reference[layer], space)
        self.last[layer] = space

    def _reduced(self, x: Tensor, warm_start: Space | None = None) -> Space:
        self.settings = self.settings.for_rows(len(x), self._told)
        return self.settings.reduce(x, warm_start)

    def _move_reference(self, moment: Moment) -> None:
        if self.reference == "initial" and not self.references:
            self.references = dict(self.last)
        if self.reference == "best":
            assert moment.score is not None
            sign = 1 if self.mode == "min" else -1
            if self.best is None or sign * moment.score < sign * self.best:
                self.best, self.references = moment.score, dict(self.last)

    @contextmanager
    def _aside(self, found: Extracted) -> Iterator[None]:
        """On a GPU, work on a stream of our own that starts once the layers are there."""
        if found.ready is None:
            yield
            return
        tensors = list(found.layers.values())
        self._stream = self._stream or torch.cuda.Stream(tensors[0].device)  # type: ignore[no-untyped-call]
        self._stream.wait_event(found.ready)
        for x in tensors:
            # the allocator must not hand this memory to the training's stream while ours reads it
            x.record_stream(self._stream)
        with torch.cuda.stream(self._stream):
            yield
        self._stream.synchronize()


def checked_reference(reference: Reference) -> Reference:
    """Return the reference, a file as a Path.

    Raises:
        TypeError: none of the kinds that there are.
        ValueError: a string that is neither a name nor a file.
    """
    if isinstance(reference, str) and reference not in _MOVING:
        if not Path(reference).exists():
            hint = _checks.did_you_mean(reference, _MOVING)
            raise ValueError(
                "reference must be 'previous', 'initial', 'best', a checkpoint file, a module or representations, got "
                f"{reference!r}, which is no file{hint}"
            )
        return Path(reference)
    if not isinstance(reference, (str, Path, nn.Module, Mapping)):
        raise TypeError(f"reference must be a name, a path, a module or a mapping, got {type(reference).__name__}")
    return reference
