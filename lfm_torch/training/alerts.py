"""Alerts: what should be said, or should end a training, when a measured quantity crosses a threshold."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lfm_torch.measures.table import full_name

Scores = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Alert:
    """A threshold on a quantity that :class:`lfm_torch.training.Monitor` records.

    It speaks once when the threshold is crossed, and again only after the value has been back.

    Attributes:
        measure: A measure ("heat", "overlap", ...: similarity to the reference), "dimension" (participation ratio of
            the layer's covariance spectrum: how many directions it uses) or "components" (of its graph).
        below: Speak when the value is smaller; give this or ``above``.
        above: Speak when the value is larger.
        layers: Glob over layer names.
        all_layers: Speak once when all these layers are past the threshold, not for each.
        patience: Measurements in a row that must be past it.
        stop: Ask for the end of the training.
        name: What the event is called.

    Raises:
        ValueError: not exactly one threshold, or a patience below 1.

    Example:
        >>> Alert.drift(below=0.6, layers="encoder.*").measure
        'heat'
    """

    measure: str
    below: float | None = None
    above: float | None = None
    layers: str = "*"
    all_layers: bool = False
    patience: int = 1
    stop: bool = False
    name: str = "threshold"

    def __post_init__(self) -> None:
        if (self.below is None) == (self.above is None):
            raise ValueError(f"below or above must be given, one of them, got {self.below} and {self.above}")
        if self.patience < 1:
            raise ValueError(f"patience must be at least 1, got {self.patience}")
        object.__setattr__(self, "measure", full_name(self.measure))

    @classmethod
    def drift(cls, *, below: float = 0.5, measure: str = "heat", layers: str = "*", stop: bool = False) -> Alert:
        """Speak when a layer has moved away from the reference."""
        return cls(measure, below=below, layers=layers, stop=stop, name="drift")

    @classmethod
    def collapse(cls, *, below: float = 2.0, layers: str = "*", stop: bool = False) -> Alert:
        """Speak when a layer's samples lie along fewer than ``below`` directions; equal samples have dimension 0."""
        return cls("dimension", below=below, layers=layers, stop=stop, name="collapse")

    @classmethod
    def settled(cls, *, above: float = 0.98, measure: str = "heat", patience: int = 3, stop: bool = False) -> Alert:
        """Speak when all layers have stayed close to the reference (take "previous") for ``patience`` measurements."""
        return cls(measure, above=above, all_layers=True, patience=patience, stop=stop, name="settled")

    @property
    def threshold(self) -> float:
        """The value that is crossed."""
        value = self.below if self.below is not None else self.above
        assert value is not None
        return value

    def is_past(self, value: float) -> bool:
        """Tell whether a value is past the threshold."""
        return value < self.threshold if self.below is not None else value > self.threshold


@dataclass(frozen=True)
class Event:
    """An alert that spoke: which, where, and the value that made it.

    Attributes:
        name: "drift", "collapse", "settled", or the name given.
        layer: The layer; for an alert on all layers the one nearest the threshold.
        measure: What was measured.
        value: Its value.
        threshold: What it crossed.
        step: Where in the training.
        epoch: Where in the training, where known.
        stop: The alert asks for the end of the training.
    """

    name: str
    layer: str
    measure: str
    value: float
    threshold: float
    step: int
    epoch: float | None
    stop: bool

    def __str__(self) -> str:
        where = f"step {self.step}" if self.epoch is None else f"epoch {self.epoch:g}, step {self.step}"
        return (
            f"{self.name}: {self.measure} of layer {self.layer!r} is {self.value:.3g} ({self.threshold:g}) at {where}"
        )


class Watch:
    """Applies alerts to one measurement after another; ``counts`` is all it remembers."""

    def __init__(self, alerts: Sequence[Alert]) -> None:
        self.alerts = list(alerts)
        # measurements in a row past the threshold, by alert and layer ("" for all layers)
        self.counts: dict[str, int] = {}

    def events(self, scores: Scores, step: int, epoch: float | None) -> list[Event]:
        """Return the alerts that speak now."""
        found = []
        for i, alert in enumerate(self.alerts):
            for key, layer, value, past in self._states(alert, scores):
                count = self.counts.get(f"{i}/{key}", 0) + 1 if past else 0
                self.counts[f"{i}/{key}"] = count
                if count == alert.patience:
                    event = Event(alert.name, layer, alert.measure, value, alert.threshold, step, epoch, alert.stop)
                    found.append(event)
        return found

    def _states(self, alert: Alert, scores: Scores) -> Iterator[tuple[str, str, float, bool]]:
        # a layer without a value (no reference yet, or it failed) leaves its count as it is
        values = {
            layer: measured[alert.measure]
            for layer, measured in scores.items()
            if alert.measure in measured and fnmatch.fnmatchcase(layer, alert.layers)
        }
        if not alert.all_layers:
            for layer, value in values.items():
                yield layer, layer, value, alert.is_past(value)
        elif values:
            pick = max if alert.below is not None else min
            layer, value = pick(values.items(), key=lambda item: item[1])
            yield "", layer, value, alert.is_past(value)
