"""The chart of trajectories on the page, laid out in the coordinates of its SVG."""

from __future__ import annotations

import math
from typing import Any

import torch

from lfm_torch.comparison.result import Comparison, Trajectory
from lfm_torch.measures.table import MEASURES
from lfm_torch.report.scales import chance_of, labelled_steps, line_colors, step_positions

# runs whose lines have markers with values to point at
_MAX_MARKED = 12
_DASHES = ("", "7 3", "7 3 2 3", "2 3")
_WIDTH, _HEIGHT = 360, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 14, 12, 40
# units of the drawing between two labels of steps
_LABEL_GAP = 28


def trajectory_chart(comparison: Comparison, measure: str) -> dict[str, Any] | None:
    """Return the lines to the final checkpoint, one per layer and run, with their axes; None without such a run."""
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
