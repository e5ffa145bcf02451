"""What the summary of a comparison says, as plain values and as a line: for ``--json``, and beside the printed one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lfm_torch.comparison.result import Comparison
from lfm_torch.report.scales import chance_of

_SHOWN_ROWS = 6


def left_out(comparison: Comparison) -> str:
    """Return which samples were left out of a comparison, in a line; empty where none was."""
    rows = comparison.settings.get("left_out", ())
    if not rows:
        return ""
    listed = ", ".join(map(str, rows[:_SHOWN_ROWS])) + (", ..." if len(rows) > _SHOWN_ROWS else "")
    return f"{len(rows)} samples left out everywhere, with values that are not finite: row {listed}"


def as_json(comparison: Comparison, written: Sequence[Any] = ()) -> dict[str, Any]:
    """Return the content of the summary as plain values."""
    measures, below = {}, comparison.below_chance()
    for name in comparison.measures:
        matching = comparison.layer_matching(name)
        measures[name] = {
            "layer_matching": None if matching is None else vars(matching),
            "shuffled_rows": _or_none(chance_of(comparison, name)),
            "shuffled_rows_std": _or_none(comparison.chance_std.get(name, math.nan)),
            "below_chance": name in below,
            "between_layers": _plain(comparison.between_layers(name)),
            "trajectories": [
                {"run": t.run, "steps": list(t.steps), "values": _plain(t.values)}
                for t in comparison.trajectories(name)
            ],
        }
    return {
        "checkpoints": [{"name": c.name, "run": c.run, "step": c.step} for c in comparison.checkpoints],
        "layers": list(comparison.layers),
        "settings": dict(comparison.settings),
        "measures": measures,
        "failures": [vars(failure) for failure in comparison.failures],
        "notes": [
            {"checkpoint": item.checkpoint, "layer": item.layer, "note": remark}
            for item in comparison.items
            for remark in item.remarks
        ],
        "written": [str(path) for path in written],
    }


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else value


def _plain(matrix: Tensor) -> list[list[float | None]]:
    # JSON has no NaN
    return [[None if math.isnan(value) else round(value, 6) for value in row] for row in matrix.tolist()]
