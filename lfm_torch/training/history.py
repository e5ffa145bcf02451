"""The points of a training: what one measurement says, and all of them as a table, as files and as plain values."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lfm_torch import _files
from lfm_torch.training.alerts import Event
from lfm_torch.training.spaces import SpaceSettings

Chance = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        step: Where in the training.
        epoch: Where in the training, where known.
        scores: ``{layer: {measure: value}}``: the measures to the reference (absent while there is none), "dimension"
            and "components".
        failures: ``{layer: reason}`` for layers that could not be measured.
        events: Alerts that spoke.
        seconds: What it took: "extract" and "reduce".
        notes: ``{layer: text}`` where something is to be said of the points: rows of zeros, an offset.
    """

    step: int
    epoch: float | None
    scores: dict[str, dict[str, float]]
    failures: dict[str, str]
    events: tuple[Event, ...]
    seconds: dict[str, float]
    notes: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Point:
        """Read what ``dataclasses.asdict`` gave."""
        return cls(**{**state, "events": tuple(Event(**event) for event in state["events"])})


def metrics_of(point: Point) -> dict[str, float]:
    """A point as flat metrics for a logger, ``lfm/<measure>/<layer>``."""
    return {
        f"lfm/{measure}/{layer}": value
        for layer, measured in point.scores.items()
        for measure, value in measured.items()
    }


class Record:
    """The points of a training in order, with the layers and the reference they are about.

    Attributes:
        layers: Names of the layers.
        reference: What they are compared to, in a word.
        points: One a measurement.
        chance: ``{layer: {measure: value}}`` between a layer and itself with shuffled rows.
    """

    def __init__(self, layers: Sequence[str], reference: str) -> None:
        self.layers, self.reference = list(layers), reference
        self.points: list[Point] = []
        self.chance: Chance = {}

    def add(self, point: Point, chance: Chance) -> None:
        """Append a point, and take the levels of shuffled rows that were known with it."""
        self.chance = chance
        self.points.append(point)

    def rows(self) -> list[dict[str, Any]]:
        """The points as a table: step, epoch, layer, measure, value."""
        return [
            {"step": point.step, "epoch": point.epoch, "layer": layer, "measure": measure, "value": value}
            for point in self.points
            for layer, measured in point.scores.items()
            for measure, value in measured.items()
        ]

    def write(self, directory: Path, settings: SpaceSettings) -> list[Path]:
        """Write ``history.json``: everything, with the settings of the measurements."""
        record = {
            "layers": self.layers,
            "reference": self.reference,
            "settings": asdict(settings),
            "chance": self.chance,
            "points": [asdict(point) for point in self.points],
        }
        return write_files(directory, {"history.json": (json.dumps(record, indent=1) + "\n").encode()})

    def save(self, directory: Path, settings: SpaceSettings) -> list[Path]:
        """Write ``history.json`` and, with the rows of the table, ``history.csv``."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, ["step", "epoch", "layer", "measure", "value"])
        writer.writeheader()
        writer.writerows(self.rows())
        return self.write(directory, settings) + write_files(directory, {"history.csv": buffer.getvalue().encode()})

    def state(self) -> dict[str, Any]:
        """Plain values, for ``torch.load(weights_only=True)``."""
        return {
            "layers": list(self.layers),
            "history": [asdict(point) for point in self.points],
            "chance": {layer: dict(values) for layer, values in self.chance.items()},
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Read what :meth:`state` gave.

        Raises:
            ValueError: the state of other layers.
        """
        if list(state["layers"]) != self.layers:
            raise ValueError(f"state must be of the layers {self.layers}, got {list(state['layers'])}")
        self.points = [Point.from_state(point) for point in state["history"]]
        self.chance = {layer: dict(values) for layer, values in state["chance"].items()}


def write_files(directory: Path, contents: Mapping[str, bytes]) -> list[Path]:
    """Write files by name, each at once; return their paths."""
    directory.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        _files.write_atomically(directory / name, content)
    return [directory / name for name in contents]
