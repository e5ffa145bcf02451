"""What the page shows of a landscape of models: pictures in the order of the clusters, map, values to point at."""

from __future__ import annotations

import base64
import json
import math
from importlib.resources import files
from typing import Any

import numpy as np
from markupsafe import Markup
from torch import Tensor

from lfm_torch.comparison.result import Comparison
from lfm_torch.measures.table import MEASURES
from lfm_torch.report.figures import picture
from lfm_torch.report.landscape import Landscape, dendrogram, landscape
from lfm_torch.report.scales import LINE_COLORS, Scale, legend, name_of, scale_of, shown_chance

_MAP, _MARGIN = 420, 26
# representations whose values the page holds one by one: a byte for each pair
_MAX_ITEMS = 5000
# a byte says 255 values: 0 to 254, and 255 for a pair that failed
_STEPS = 254
_NEIGHBORS = 5


def describe(comparison: Comparison) -> dict[str, Any] | None:
    """Return what the template draws; None where there is no landscape."""
    found = landscape(comparison)
    if found is None:
        return None
    shown = [found.measure, *(name for name in comparison.measures if name != found.measure)]
    scale = scale_of(comparison, found.measure)
    layers, n_items = comparison.layers, len(comparison.checkpoints) * len(comparison.layers)
    names = [checkpoint.name for checkpoint in comparison.checkpoints]
    has_layers = len(layers) > 1 and n_items <= _MAX_ITEMS
    matrices = {name: comparison.between_checkpoints(name) for name in shown}
    held = {
        "names": names,
        "layers": list(layers) if has_layers else [],
        "order": found.order,
        "first": _first_two(comparison, names),
        "measures": [_matrix(matrices[name], scale_of(comparison, name)) for name in shown],
        "low": scale.low,
        "high": scale.high,
        "distance": scale.distance,
        "triangle": {"values": _triangle(comparison, found.measure, scale) if has_layers else ""},
    }
    order = np.array(found.order)
    return {
        "measure_name": name_of(found.measure),
        "proper": found.proper,
        "size": len(names),
        "kept": found.kept,
        "pictures": [_picture_of(comparison, name, matrices[name][order][:, order]) for name in shown],
        "dendrogram": _brackets(found),
        "map": _map(comparison, found),
        "outliers": [{"name": names[i], "distance": d, "score": score} for i, d, score in found.outliers],
        "neighbors": min(_NEIGHBORS, len(names) - 1),
        "has_layers": has_layers,
        "too_many": n_items if len(layers) > 1 and not has_layers else 0,
        "layers_height": 26 * len(layers),
        "step": (scale.high - scale.low) / _STEPS,
        # names are data: no "<" of theirs ends the element they stand in
        "data": Markup(json.dumps(held).replace("<", "\\u003c")),
        "script": Markup(files("lfm_torch.report").joinpath("landscape.js").read_text("utf-8")),
    }


def _first_two(comparison: Comparison, names: list[str]) -> list[int]:
    """The two checkpoints that the page compares at first: the last ones of two runs."""
    chosen = [names.index(name) for name in comparison.finals[:2]]
    return chosen if len(chosen) == 2 else [0, len(names) - 1]


def _picture_of(comparison: Comparison, name: str, matrix: Tensor) -> dict[str, Any]:
    scale = scale_of(comparison, name)
    return {
        "name": name_of(name),
        "image": picture(matrix, scale),
        "legend": legend(scale),
        "chance": shown_chance(comparison, name),
    }


def _bytes(values: Tensor, scale: Scale) -> np.ndarray[Any, np.dtype[np.uint8]]:
    places = (values.double().numpy() - scale.low) / (scale.high - scale.low)
    steps = np.rint(_STEPS * np.clip(places, 0, 1))
    return np.where(np.isnan(steps), 255, steps).astype(np.uint8)


def _matrix(values: Tensor, scale: Scale) -> dict[str, Any]:
    return {"low": scale.low, "high": scale.high, "values": base64.b64encode(_bytes(values, scale).tobytes()).decode()}


def _triangle(comparison: Comparison, measure: str, scale: Scale) -> str:
    """Values of all pairs of layers of all checkpoints, the upper triangle row by row."""
    keys = [(checkpoint.name, layer) for checkpoint in comparison.checkpoints for layer in comparison.layers]
    values = comparison.block(measure, keys, keys)
    if not (measure in MEASURES and MEASURES[measure].symmetric):
        values = (values + values.mT) / 2
    held = _bytes(values, scale)
    return base64.b64encode(b"".join(held[i, i:].tobytes() for i in range(len(held)))).decode()


def _brackets(found: Landscape) -> str:
    """Path of the dendrogram in a box as wide as there are checkpoints and 600 high, leaves at the bottom."""
    highest = float(found.merges[:, 2].max()) or 1.0
    parts = []
    for left, left_bottom, right, right_bottom, top in dendrogram(found.merges, found.order):
        a, b, y = (590 - 580 * height / highest for height in (left_bottom, right_bottom, top))
        parts.append(f"M{left:g},{a:.1f}V{y:.1f}H{right:g}V{b:.1f}")
    return "".join(parts)


def _map(comparison: Comparison, found: Landscape) -> dict[str, Any]:
    places = found.places
    span = float((places.max(0) - places.min(0)).max()) or 1.0
    at = _MARGIN + (places - places.min(0)) / span * (_MAP - 2 * _MARGIN)
    # the smaller direction in the middle of the square
    at += (_MAP - 2 * _MARGIN - (at.max(0) - _MARGIN)) / 2
    colors, legend_text = _colors(comparison)
    outlying = {i for i, _, _ in found.outliers}
    finals = set(comparison.finals) if len(comparison.runs) < len(comparison.checkpoints) else set()
    points = [
        {
            "x": f"{x:.1f}",
            "y": f"{y:.1f}",
            "r": "5" if checkpoint.name in finals else "3.5",
            "color": colors[i],
            "title": checkpoint.name,
            "outlying": i in outlying,
        }
        for i, (checkpoint, (x, y)) in enumerate(zip(comparison.checkpoints, at.tolist(), strict=True))
    ]
    index = {checkpoint.name: i for i, checkpoint in enumerate(comparison.checkpoints)}
    paths = []
    for members in comparison.runs.values():
        if len(members) > 1:
            steps = [index[member.name] for member in members]
            line = " ".join(f"{points[i]['x']},{points[i]['y']}" for i in steps)
            paths.append({"points": line, "color": colors[steps[-1]] if len(comparison.runs) <= 7 else "var(--soft)"})
    labelled = [i for i, _, _ in found.outliers[:6]] if len(points) > 12 else range(len(points))
    labels = [
        {
            "x": f"{at[i, 0] + (8 if at[i, 0] < _MAP / 2 else -8):.1f}",
            "y": f"{at[i, 1] + 4:.1f}",
            "anchor": "start" if at[i, 0] < _MAP / 2 else "end",
            "text": comparison.checkpoints[i].name,
        }
        for i in labelled
    ]
    return {"size": _MAP, "points": points, "paths": paths, "labels": labels, "legend": legend_text}


def _colors(comparison: Comparison) -> tuple[list[str], str]:
    """Colours of the checkpoints: by run where there are few, else by step, else all the same."""
    runs = list(comparison.runs)
    several = len(runs) < len(comparison.checkpoints)
    if len(runs) <= len(LINE_COLORS) and (several or len(runs) == len(comparison.checkpoints)):
        by_run = dict(zip(runs, LINE_COLORS, strict=False))
        text = "A colour for each run; a line joins its checkpoints in order of training, the last one larger."
        return [by_run[checkpoint.run] for checkpoint in comparison.checkpoints], text if several else ""
    steps = [checkpoint.step for checkpoint in comparison.checkpoints]
    known = [step for step in steps if step is not None]
    if several and len(set(known)) > 1:
        scale = Scale(0.0, 0.0)
        width = math.log1p(max(known) - min(known))
        colors = [
            LINE_COLORS[-1] if step is None else scale.color(0.92 * math.log1p(step - min(known)) / width)
            for step in steps
        ]
        text = f"From dark to bright: steps {min(known)} to {max(known)}; a line joins the checkpoints of a run."
        return colors, text
    return [LINE_COLORS[0]] * len(steps), ""
