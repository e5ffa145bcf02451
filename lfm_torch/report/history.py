"""Figures of a training's history: curves of every layer, and heat maps over time and between layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lfm_torch.report.figures import DASHES, MARKERS, png
from lfm_torch.report.scales import line_colors, name_of

if TYPE_CHECKING:
    from lfm_torch.training import Monitor

# with more measurements the markers run together
_MARKED = 40


def history_figures(monitor: Monitor) -> dict[str, bytes]:
    """PNGs by file name: ``curves.png`` once something was measured, ``layers.png`` where bases are held."""
    figures = {"curves.png": curves_figure(monitor)} if monitor.history else {}
    layers = layers_figure(monitor)
    if layers is not None:
        figures["layers.png"] = layers
    return {name: png(figure) for name, figure in figures.items()}


def curves_figure(monitor: Monitor) -> Figure:
    """One panel per measure over the steps, with the level of shuffled rows, and the dimension of every layer."""
    measures = [*monitor.settings.measures, "dimension"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.3 * len(measures) + 0.6, 3.2), layout="constrained")
        axes = figure.subplots(1, len(measures), squeeze=False)[0]
        for ax, measure in zip(axes, measures, strict=True):
            _curves(ax, monitor, measure)
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def layers_figure(monitor: Monitor) -> Figure | None:
    """Layers against layers at the last measurement, one heat map per measure; None for fewer than two layers."""
    matrices = [monitor.layer_matrix(measure) for measure in monitor.settings.measures]
    found = [matrix for matrix in matrices if matrix is not None and len(matrix) > 1]
    if not found or len(found[0]) < len(monitor.layers):
        return None
    side = min(8.0, max(2.2, 0.3 * len(monitor.layers)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=((side + 1.0) * len(found) + 0.8, side + 1.2), layout="constrained")
        axes = figure.subplots(1, len(found), squeeze=False)[0]
        for i, (ax, measure, matrix) in enumerate(zip(axes, monitor.settings.measures, found, strict=True)):
            _heat_map(ax, matrix, monitor.layers, with_rows=i == 0)
            ax.set_title(name_of(measure))
    return figure


def _curves(ax: Axes, monitor: Monitor, measure: str) -> None:
    colors = line_colors(len(monitor.layers))
    marked = len(monitor.history) <= _MARKED
    for k, layer in enumerate(monitor.layers):
        points = [(p.step, p.scores[layer][measure]) for p in monitor.history if measure in p.scores.get(layer, {})]
        ax.plot(
            [step for step, _ in points],
            [value for _, value in points],
            color=colors[k],
            marker=MARKERS[k % len(MARKERS)] if marked else None,
            linestyle=DASHES[(k // len(MARKERS)) % len(DASHES)],
            markersize=3.5,
            linewidth=1.1,
            label=layer,
        )
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if measure == "dimension":
        ax.set_title("dimension (participation ratio)")
        ax.set_ylim(bottom=0)
        return
    levels = [monitor.chance[layer][measure] for layer in monitor.layers if layer in monitor.chance]
    chance = torch.tensor(levels, dtype=torch.float32, device="cpu")
    if len(chance):
        ax.axhline(float(chance.mean()), color="0.55", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.annotate(
            "shuffled", (1, float(chance.mean())), (0, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", color="0.4", fontsize=7,
        )  # fmt: skip
    ax.set_ylim(top=1.02)
    ax.set_title(f"{name_of(measure)} to {_short(monitor.reference_name)}")


def _short(reference: str) -> str:
    names = {"previous": "the last measurement", "initial": "the start", "best": "the best so far"}
    return names.get(reference, "the reference")


def _heat_map(ax: Axes, matrix: Tensor, names: Sequence[str], *, with_rows: bool) -> None:
    low = max(0.0, float(matrix.min()))
    image = ax.imshow(matrix.numpy(), cmap="viridis", vmin=low, vmax=1, interpolation="nearest")
    ax.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
    ax.set_yticks(range(len(names)), names if with_rows else [""] * len(names), fontsize=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    if len(names) <= 10:
        for i, row in enumerate(matrix.tolist()):
            for j, value in enumerate(row):
                ink = "white" if value < low + 0.55 * (1 - low) else "black"
                ax.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=8, color=ink)
    ax.figure.colorbar(image, ax=ax, fraction=0.046, pad=0.03, ticks=MaxNLocator(5))


_STYLE = {
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    # a layer named $x_1$ is a name, not a formula
    "text.parse_math": False,
}
