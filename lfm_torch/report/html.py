"""One self-contained HTML page: tables and inline SVG, everything escaped, nothing loaded from anywhere."""

from __future__ import annotations

import math
import platform
from collections.abc import Sequence
from typing import Any

import jinja2
import torch
from torch import Tensor

from lfm_torch._version import __version__
from lfm_torch.comparison.result import Comparison
from lfm_torch.measures.table import MEASURES
from lfm_torch.report.chart import trajectory_chart
from lfm_torch.report.figures import picture
from lfm_torch.report.landscape_page import describe
from lfm_torch.report.scales import Scale, legend, name_of, scale_of, shown_chance

# beyond these a table of cells is slower to open than it is good to read
_MAX_NUMBERED = 12
_MAX_CELLS = 60
_MAX_DETAILS = 30
_MAX_VALUES = 24


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
        "trajectory": trajectory_chart(comparison, measure),
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
