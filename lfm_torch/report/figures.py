"""PNG figures of a comparison, for papers and slides. Figure objects throughout: no display, no global state."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imsave
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lfm_torch import _files
from lfm_torch.comparison.result import Comparison
from lfm_torch.measures.table import MEASURES
from lfm_torch.report.scales import Scale, labelled_steps, line_colors, name_of, scale_of, step_positions

MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
_DPI = 160
# characters of a name beside a heat map; the end of a dotted name tells more than its start
_LABEL = 28
STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    # a layer named $x_1$ is a name, not a formula
    "text.parse_math": False,
}


def layer_figure(comparison: Comparison) -> Figure:
    """Layers against layers, one heat map per measure."""
    return _heat_maps(
        comparison, [comparison.between_layers(measure) for measure in comparison.measures], comparison.layers
    )


def checkpoint_figure(comparison: Comparison) -> Figure:
    """Checkpoints against checkpoints, mean over layers, one heat map per measure."""
    names = [checkpoint.name for checkpoint in comparison.checkpoints]
    return _heat_maps(comparison, [comparison.between_checkpoints(measure) for measure in comparison.measures], names)


def trajectory_figure(comparison: Comparison) -> Figure | None:
    """Similarity to each run's last checkpoint along training, one panel per measure; None without such a run."""
    if not comparison.trajectories(comparison.measures[0]):
        return None
    with matplotlib.rc_context(STYLE):
        count = len(comparison.measures)
        figure = Figure(figsize=(3.3 * count + 0.6, 3.0), layout="constrained")
        axes = figure.subplots(1, count, squeeze=False)[0]
        for ax, measure in zip(axes, comparison.measures, strict=True):
            _trajectory(ax, comparison, measure)
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False)
    return figure


def save_figures(comparison: Comparison, directory: Path) -> list[Path]:
    """Write ``layers.png``, ``checkpoints.png`` and, where there are runs, ``trajectory.png``."""
    figures = {"checkpoints": checkpoint_figure(comparison), "trajectory": trajectory_figure(comparison)}
    if len(comparison.layers) > 1:
        figures["layers"] = layer_figure(comparison)
    written = []
    for name in ("layers", "checkpoints", "trajectory"):
        path, figure = directory / f"{name}.png", figures.get(name)
        if figure is None:
            # of an earlier report in the same directory, about something else
            path.unlink(missing_ok=True)
        else:
            _files.write_atomically(path, png(figure))
            written.append(path)
    return written


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG."""
    with matplotlib.rc_context(STYLE):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white")
    return buffer.getvalue()


def picture(matrix: Tensor, scale: Scale) -> str:
    """Return the matrix as a PNG data URI, one pixel per cell: a table of a million cells would not open."""
    buffer = io.BytesIO()
    colors: dict[str, Any] = {"cmap": _colors(scale), "vmin": scale.low, "vmax": scale.high}
    imsave(buffer, matrix.numpy(), **colors, format="png", pil_kwargs={"compress_level": 2})
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _colors(scale: Scale) -> str:
    """Bright is close, for a distance as for a similarity."""
    return "viridis_r" if scale.distance else "viridis"


def _heat_maps(comparison: Comparison, matrices: Sequence[Tensor], names: Sequence[str]) -> Figure:
    with matplotlib.rc_context(STYLE):
        columns = len(matrices) if len(names) <= 10 else min(2, len(matrices))
        rows = -(-len(matrices) // columns)
        side = min(9.0, max(2.4, 0.24 * len(names)))
        names = [name if len(name) <= _LABEL else "…" + name[1 - _LABEL :] for name in names]
        label = 0.085 * max(map(len, names))
        size = (label + (side + 0.9) * columns, (side + label + 0.6) * rows)
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for i, (ax, measure, matrix) in enumerate(zip(axes, comparison.measures, matrices, strict=False)):
            _heat_map(ax, matrix, scale_of(comparison, measure), names, with_rows=i % columns == 0)
            ax.set_title(name_of(measure))
        for ax in axes[len(matrices) :]:
            ax.set_visible(False)
    return figure


def _heat_map(ax: Axes, matrix: Tensor, scale: Scale, names: Sequence[str], *, with_rows: bool) -> None:
    image = ax.imshow(matrix.numpy(), cmap=_colors(scale), vmin=scale.low, vmax=scale.high, interpolation="nearest")
    # more than sixty names cannot be read, and take longer to draw than everything else
    ticks = range(len(names) if len(names) <= 60 else 0)
    size = 8 if len(names) <= 30 else 6
    ax.set_xticks(ticks, [names[i] for i in ticks], rotation=90, fontsize=size)
    ax.set_yticks(ticks, [names[i] if with_rows else "" for i in ticks], fontsize=size)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if len(names) <= 10:
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=scale.ink(value))
    bar = ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03, ticks=MaxNLocator(5), format="%.2f")
    bar.outline.set_visible(False)
    bar.ax.tick_params(length=2, labelsize=7)
    if scale.low <= scale.chance <= scale.high:
        bar.ax.axhline(scale.chance, color="#d55e00", linewidth=1.6)
        bar.ax.text(
            3.4,
            scale.chance,
            "shuffled",
            color="#d55e00",
            fontsize=7,
            rotation=90,
            va="center",
            transform=bar.ax.get_yaxis_transform(),
        )


def _trajectory(ax: Axes, comparison: Comparison, measure: str) -> None:
    trajectories = comparison.trajectories(measure)
    colors = line_colors(len(comparison.layers))
    positions = step_positions(step for trajectory in trajectories for step in trajectory.steps)
    for k, layer in enumerate(comparison.layers):
        for r, trajectory in enumerate(trajectories):
            x = [positions[step] for step in trajectory.steps]
            ax.plot(
                x,
                trajectory.values[:, k].tolist(),
                color=colors[k],
                marker=MARKERS[k % len(MARKERS)],
                linestyle=DASHES[k % len(DASHES)],
                markersize=3.5,
                linewidth=1.1,
                alpha=0.85,
                label=layer if r == 0 else None,
            )
    chance = scale_of(comparison, measure).chance
    if not math.isnan(chance):
        ax.axhline(chance, color="0.55", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.text(ax.get_xlim()[1], chance, "shuffled ", ha="right", va="bottom", color="0.4", fontsize=7)
    shown = labelled_steps(positions, (max(positions.values()) - min(positions.values())) / 10)
    ax.set_xticks([positions[step] for step in shown], [str(step) for step in shown])
    if not (measure in MEASURES and MEASURES[measure].is_distance):
        ax.set_ylim(top=1.02)
    ax.set_title(f"{name_of(measure)} to the final checkpoint")
    ax.set_xlabel("epoch or step")
