"""One self-contained HTML page: tables and inline SVG, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jinja2
import torch
from torch import Tensor

from lfm_torch._version import __version__
from lfm_torch.measures.table import MEASURES
from lfm_torch.report.landscape_page import describe, legend, picture
from lfm_torch.report.scales import (
    Scale,
    chance_of,
    labelled_steps,
    line_colors,
    name_of,
    scale_of,
    shown_chance,
    step_positions,
)

if TYPE_CHECKING:
    from lfm_torch.comparison.result import Comparison, Trajectory

# beyond these a table of cells is slower to open than it is good to read
_MAX_NUMBERED = 12
_MAX_CELLS = 60
_MAX_DETAILS = 30
# runs whose lines have markers with values to point at
_MAX_MARKED = 12
_MAX_VALUES = 24
_DASHES = ("", "7 3", "7 3 2 3", "2 3")
_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 12, 40
# units of the drawing between two labels of steps
_LABEL_GAP = 28


def render(comparison: Comparison, *, title: str | None = None, table: str = "similarity.csv") -> str:
    """Return the page as text; ``table`` is the file of all pairs that stands beside it."""
    loader = jinja2.PackageLoader("lfm_torch", "report")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    below = comparison.below_chance()
    page: str = environment.get_template("template.html").render(
        title=title or "Similarity of representations",
        comparison=comparison,
        compared=comparison.compared(),
        steps=_step_range(comparison),
        measures=[_measure(comparison, name, below.get(name)) for name in comparison.measures],
        landscape=describe(comparison),
        remarks=comparison.remarks(),
        table=table,
        left_out=len(comparison.settings.get("left_out", ())),
        rows=_checkpoint_rows(comparison),
        settings=_settings(comparison),
    )
    return page


def _measure(comparison: Comparison, measure: str, below: str | None) -> dict[str, Any]:
    scale = scale_of(comparison, measure)
    names = [checkpoint.name for checkpoint in comparison.checkpoints]
    matching = comparison.layer_matching(measure)
    several = len(comparison.layers) > 1
    # of more the landscape has a picture
    beside = 1 < len(names) <= _MAX_CELLS
    details: list[tuple[str, dict[str, Any]]] = []
    if several and len(names) <= _MAX_DETAILS:
        details = [
            (layer, _heat_map(comparison.between_checkpoints(measure, layer), names, scale))
            for layer in comparison.layers
        ]
    return {
        "name": name_of(measure),
        "reading": MEASURES[measure].reading if measure in MEASURES else "",
        "chance": shown_chance(comparison, measure),
        "below_chance": below,
        "matching": matching,
        "legend": legend(scale),
        "layers": _heat_map(comparison.between_layers(measure), comparison.layers, scale) if several else None,
        "checkpoints": _heat_map(comparison.between_checkpoints(measure), names, scale) if beside else None,
        "details": details,
        "trajectory": _chart(comparison, measure),
    }


def _heat_map(matrix: Tensor, names: Sequence[str], scale: Scale) -> dict[str, Any]:
    if len(names) > _MAX_CELLS:
        return {"picture": picture(matrix, scale), "names": list(names), "rows": []}
    rows = []
    for name, values in zip(names, matrix.tolist(), strict=True):
        cells = []
        for other, value in zip(names, values, strict=True):
            if math.isnan(value):
                cells.append({"text": "", "title": f"{name} → {other}: failed", "style": ""})
                continue
            text = f"{value:.2f}".removeprefix("0") if len(names) <= _MAX_NUMBERED else ""
            style = f"background:{scale.color(value)};color:{scale.ink(value)}"
            z = scale.z_score(value)
            beyond = "" if math.isnan(z) else f", {z:.0f} standard deviations from shuffled rows"
            cells.append({"text": text, "title": f"{name} → {other}: {value:.4f}{beyond}", "style": style})
        rows.append((name, cells))
    return {"picture": "", "names": list(names), "rows": rows}


def _chart(comparison: Comparison, measure: str) -> dict[str, Any] | None:
    """Lay out the lines of a trajectory chart in the coordinates of its SVG."""
    trajectories = comparison.trajectories(measure)
    if not trajectories:
        return None
    places = step_positions(step for trajectory in trajectories for step in trajectory.steps)
    first, last = min(places.values()), max(places.values())
    x_of = {
        step: _LEFT + (_WIDTH - _LEFT - _RIGHT) * (place - first) / ((last - first) or 1)
        for step, place in places.items()
    }
    chance = chance_of(comparison, measure)
    closest = MEASURES[measure].closest if measure in MEASURES else 1.0
    drawn = torch.cat([trajectory.values.flatten() for trajectory in trajectories])
    values: list[float] = [closest if math.isnan(chance) else chance, closest, *drawn[drawn.isfinite()].tolist()]
    span = max(values) - min(values)
    every = 0.1 if span <= 0.5 else 0.2 if span <= 1.2 else 0.5
    # an axis has a length even where every value is the same (a single eigenvector, say); one that float32 rounds to
    # just above 1 does not begin another step
    low: float = math.floor(min(values) / every + 1e-5) * every
    high: float = max(math.ceil(max(values) / every - 1e-5) * every, low + every)

    def y_of(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (1 - (value - low) / (high - low))

    colors = line_colors(len(comparison.layers))
    lines = [
        _line(trajectory, k, colors[k], x_of, y_of, marked=len(trajectories) <= _MAX_MARKED)
        for k in range(len(comparison.layers))
        for trajectory in trajectories
    ]
    ticks = [low + every * i for i in range(round((high - low) / every) + 1)]
    return {
        "width": _WIDTH,
        "height": _HEIGHT,
        "left": _LEFT,
        "right": _WIDTH - _RIGHT,
        "bottom": _HEIGHT - _BOTTOM,
        "lines": lines,
        "chance": None if math.isnan(chance) else y_of(chance),
        "x_ticks": [(x_of[step], step) for step in labelled_steps(x_of, _LABEL_GAP)],
        "y_ticks": [(y_of(value), f"{value:.1f}") for value in ticks],
        "layers": [
            {"layer": layer, "color": colors[k], "dash": _DASHES[k % len(_DASHES)], "marker": _marker(k, 15, 6)}
            for k, layer in enumerate(comparison.layers)
        ],
    }


def _line(
    trajectory: Trajectory, k: int, color: str, x_of: dict[int, float], y_of: Any, *, marked: bool
) -> dict[str, Any]:
    layer = trajectory.layers[k]
    points = [
        (x_of[step], y_of(value), f"{trajectory.run}, {layer}, {step}: {value:.4f}")
        for step, value in zip(trajectory.steps, trajectory.values[:, k].tolist(), strict=True)
        if not math.isnan(value)
    ]
    return {
        "color": color,
        "dash": _DASHES[k % len(_DASHES)],
        "path": " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in points),
        "opacity": 1 if marked else 0.35,
        "points": [(_marker(k, x, y), text) for x, y, text in points] if marked else [],
    }


def _marker(k: int, x: float, y: float) -> str:
    """Return the SVG path of a marker: circle, square, triangle, diamond, in turn."""
    r = 3.2
    if k % 4 == 0:
        return f"M{x - r:.1f},{y:.1f}a{r},{r} 0 1,0 {2 * r},0a{r},{r} 0 1,0 {-2 * r},0Z"
    corners = (
        ((-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)),
        ((0, -1.2), (1.1, 0.9), (-1.1, 0.9)),
        ((0, -1.3), (1.2, 0), (0, 1.3), (-1.2, 0)),
    )[k % 4 - 1]
    return "M" + "L".join(f"{x + r * dx:.1f},{y + r * dy:.1f}" for dx, dy in corners) + "Z"


def _checkpoint_rows(comparison: Comparison) -> list[dict[str, Any]]:
    finals = {run: members[-1].name for run, members in comparison.runs.items()}
    place = {checkpoint.name: i for i, checkpoint in enumerate(comparison.checkpoints)}
    means = {measure: comparison.between_checkpoints(measure) for measure in comparison.measures}
    items: dict[str, list[Any]] = {}
    for item in comparison.items:
        items.setdefault(item.checkpoint, []).append(item)
    rows = []
    for checkpoint in comparison.checkpoints:
        i, final = place[checkpoint.name], finals[checkpoint.run]
        others = [place[name] for run, name in finals.items() if run != checkpoint.run]
        values = []
        for matrix in means.values():
            to_others = float(matrix[i, others].nanmean()) if others else math.nan
            values.append((float(matrix[i, place[final]]), to_others))
        rows.append(
            {
                "checkpoint": checkpoint,
                "values": values,
                "components": max(item.n_components for item in items[checkpoint.name]),
                "unconverged": sum(item.n_unconverged for item in items[checkpoint.name]),
            }
        )
    return rows


def _step_range(comparison: Comparison) -> str:
    steps = [checkpoint.step for checkpoint in comparison.checkpoints if checkpoint.step is not None]
    return f"steps {min(steps)} to {max(steps)}" if len(set(steps)) > 1 else ""


def _listed(values: Sequence[Any]) -> str:
    more = f" and {len(values) - _MAX_VALUES} more" if len(values) > _MAX_VALUES else ""
    return ", ".join(map(str, values[:_MAX_VALUES])) + more


def _settings(comparison: Comparison) -> list[tuple[str, str]]:
    shown = []
    for name, value in comparison.settings.items():
        text = _listed(value) if isinstance(value, (list, tuple)) else str(value)
        shown.append((name.replace("_", " "), text))
    versions = f"lfm_torch {__version__}, torch {torch.__version__}, Python {platform.python_version()}"
    return [*shown, ("versions", versions)]
