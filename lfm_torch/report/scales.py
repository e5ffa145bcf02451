"""What figures and page share: names of measures, ranges of values, colours that print and survive colour blindness."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from lfm_torch.comparison.result import Comparison
from lfm_torch.measures.table import MEASURES

# Okabe & Ito: told apart under every common colour blindness, and readable on white and on black
LINE_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8C8C8C")
# viridis (van der Walt & Smith) at ten even steps, so that the page needs no plotting library for a colour
_VIRIDIS = (
    (68, 1, 84), (72, 40, 120), (62, 73, 137), (49, 104, 142), (38, 130, 142),
    (31, 158, 137), (53, 183, 121), (110, 206, 88), (181, 222, 43), (253, 231, 37),
)  # fmt: skip


@dataclass(frozen=True)
class Scale:
    """Range of colours of one measure, from ``low`` to ``high``, with the chance level; bright is close."""

    low: float
    chance: float
    high: float = 1.0
    distance: bool = False
    chance_std: float = math.nan

    def z_score(self, value: float) -> float:
        """By how many standard deviations of shuffled rows a value is closer than chance, NaN where unknown."""
        closer = self.chance - value if self.distance else value - self.chance
        return closer / self.chance_std if self.chance_std > 0 else math.nan

    def place(self, value: float) -> float:
        """Position of a value in the range, clipped to [0, 1]."""
        return min(1.0, max(0.0, (value - self.low) / (self.high - self.low)))

    def color(self, value: float) -> str:
        """Return the colour of a value as ``#rrggbb``."""
        return "#" + "".join(f"{channel:02x}" for channel in self._rgb(value))

    def ink(self, value: float) -> str:
        """Return black or white, whichever has more contrast on the colour of the value (WCAG relative luminance)."""
        linear = [((c / 255 + 0.055) / 1.055) ** 2.4 for c in self._rgb(value)]
        luminance = sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))
        return "#000" if luminance > 0.179 else "#fff"

    def _rgb(self, value: float) -> list[int]:
        place = self.place(value)
        position = (1 - place if self.distance else place) * (len(_VIRIDIS) - 1)
        below = min(len(_VIRIDIS) - 2, int(position))
        ends = zip(_VIRIDIS[below], _VIRIDIS[below + 1], strict=True)
        return [round(a + (b - a) * (position - below)) for a, b in ends]


def legend(scale: Scale) -> dict[str, Any]:
    """Return what the page draws as the legend of a scale."""
    stops = [scale.low + (scale.high - scale.low) * i / 9 for i in range(10)]
    return {
        "gradient": ", ".join(scale.color(stop) for stop in stops),
        "low": scale.low,
        "high": scale.high,
        "chance": 100 * scale.place(scale.chance) if scale.low <= scale.chance <= scale.high else None,
    }


def scale_of(comparison: Comparison, measure: str) -> Scale:
    """Range for all figures of a measure: from the smallest value (or 0, where that is just above) to 1.

    For a distance from 0 to the largest value.
    """
    values = comparison.matrix(measure)
    # pairs that failed have no place in a range
    values = values[~values.isnan()]
    values = values if len(values) else values.new_zeros(1)
    chance, std = chance_of(comparison, measure), comparison.chance_std.get(measure, math.nan)
    if measure in MEASURES and MEASURES[measure].is_distance:
        high = math.ceil(float(values.max()) * 20) / 20
        return Scale(0.0, chance, max(high, 0.05) if math.isfinite(high) else 1.0, distance=True, chance_std=std)
    low = math.floor(float(values.min()) * 20) / 20
    low = min(low, 0.95) if low >= 0.15 else max(low, -1.0) if low < 0 else 0.0
    return Scale(low, chance, chance_std=std)


def chance_of(comparison: Comparison, measure: str) -> float:
    """Mean over items of the measure with shuffled rows; NaN where the measure does not depend on the pairing."""
    return float(comparison.chance[measure].mean())


def shown_chance(comparison: Comparison, measure: str) -> str:
    """Return the chance level with its spread, as text."""
    chance, std = chance_of(comparison, measure), comparison.chance_std.get(measure, math.nan)
    if math.isnan(chance):
        return "-"
    return f"{chance:.3f}" if math.isnan(std) else f"{chance:.3f} ± {std:.3f}"


def name_of(measure: str) -> str:
    """Return the measure's name for people."""
    return MEASURES[measure].title if measure in MEASURES else measure


def line_colors(count: int) -> list[str]:
    """Return ``count`` colours for lines: distinct ones, or a sequence where there are too many to be distinct."""
    if count <= len(LINE_COLORS):
        return list(LINE_COLORS[:count])
    scale = Scale(0.0, 0.0)
    return [scale.color(0.1 + 0.85 * i / (count - 1)) for i in range(count)]


def step_positions(steps: Iterable[int]) -> dict[int, float]:
    """Place steps on an axis, in order: as they are, or as ``log2(1 + step)`` where they span orders of magnitude."""
    ordered = sorted(set(steps))
    positive = [step for step in ordered if step > 0]
    wide = ordered[0] >= 0 and len(positive) > 2 and positive[-1] > 8 * positive[0]
    return {step: math.log2(1 + step) if wide else float(step) for step in ordered}


def labelled_steps(positions: Mapping[int, float], gap: float) -> list[int]:
    """Choose the steps to label, the last one first, so that labels are at least ``gap`` apart."""
    steps = list(positions)
    shown = [steps[-1]]
    for step in reversed(steps[:-1]):
        if positions[shown[-1]] - positions[step] >= gap:
            shown.append(step)
    return shown[::-1]
