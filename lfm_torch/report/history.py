"""Figures of a training's history: curves of every layer, and heat maps over time and between layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lfm_torch.report.figures import DASHES, MARKERS, png
from lfm_torch.report.scales import line_colors, name_of

# with more measurements the markers run together
_MARKED = 40

# {layer: {measure: value}}
Scores = Mapping[str, Mapping[str, float]]


def history_figures(
    layers: Sequence[str],
    measures: Sequence[str],
    points: Sequence[tuple[int, Scores]],
    *,
    chance: Scores,
    reference: str,
    matrices: Mapping[str, Tensor],
) -> dict[str, bytes]:
    """PNGs by file name: ``curves.png`` once something was measured, ``layers.png`` where bases are held.

    Args:
        layers: Names of the layers.
        measures: Names of the measures to the reference.
        points: Step and ``{layer: {measure: value}}`` of every measurement, "dimension" among the measures.
        chance: ``{layer: {measure: value}}`` of shuffled rows.
        reference: What the layers are compared to, in a word.
        matrices: Layers against layers at the last measurement, by measure; none where no bases are held.
    """
    figures = {}
    if points:
        figures["curves.png"] = curves_figure(layers, measures, points, chance=chance, reference=reference)
    between = layers_figure(layers, matrices)
    if between is not None:
        figures["layers.png"] = between
    return {name: png(figure) for name, figure in figures.items()}


def curves_figure(
    layers: Sequence[str],
    measures: Sequence[str],
    points: Sequence[tuple[int, Scores]],
    *,
    chance: Scores,
    reference: str,
) -> Figure:
    """One panel per measure over the steps, with the level of shuffled rows, and the dimension of every layer."""
    measures = [*measures, "dimension"]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(3.3 * len(measures) + 0.6, 3.2), layout="constrained")
        axes = figure.subplots(1, len(measures), squeeze=False)[0]
        for ax, measure in zip(axes, measures, strict=True):
            _curves(ax, layers, measure, points)
            if measure == "dimension":
                ax.set_title("dimension (participation ratio)")
                ax.set_ylim(bottom=0)
            else:
                _chance_level(ax, [chance[layer][measure] for layer in layers if layer in chance])
                ax.set_ylim(top=1.02)
                ax.set_title(f"{name_of(measure)} to {_short(reference)}")
        handles, labels = axes[-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    return figure


def layers_figure(layers: Sequence[str], matrices: Mapping[str, Tensor]) -> Figure | None:
    """Layers against layers at the last measurement, one heat map per measure; None for fewer than two layers."""
    # a layer that was never measured has no basis, and so no row
    whole = all(len(matrix) == len(layers) for matrix in matrices.values())
    if len(layers) < 2 or not matrices or not whole:
        return None
    side = min(8.0, max(2.2, 0.3 * len(layers)))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=((side + 1.0) * len(matrices) + 0.8, side + 1.2), layout="constrained")
        axes = figure.subplots(1, len(matrices), squeeze=False)[0]
        for i, (ax, (measure, matrix)) in enumerate(zip(axes, matrices.items(), strict=True)):
            _heat_map(ax, matrix, layers, with_rows=i == 0)
            ax.set_title(name_of(measure))
    return figure


def _curves(ax: Axes, layers: Sequence[str], measure: str, points: Sequence[tuple[int, Scores]]) -> None:
    colors = line_colors(len(layers))
    marked = len(points) <= _MARKED
    for k, layer in enumerate(layers):
        measured = [(step, scores[layer][measure]) for step, scores in points if measure in scores.get(layer, {})]
        ax.plot(
            [step for step, _ in measured],
            [value for _, value in measured],
            color=colors[k],
            marker=MARKERS[k % len(MARKERS)] if marked else None,
            linestyle=DASHES[(k // len(MARKERS)) % len(DASHES)],
            markersize=3.5,
            linewidth=1.1,
            label=layer,
        )
    ax.set_xlabel("step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))


def _chance_level(ax: Axes, levels: Sequence[float]) -> None:
    chance = torch.tensor(levels, dtype=torch.float32, device="cpu")
    if len(chance):
        ax.axhline(float(chance.mean()), color="0.55", linewidth=0.8, linestyle=(0, (1, 2)))
        ax.annotate(
            "shuffled", (1, float(chance.mean())), (0, 2), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="bottom", color="0.4", fontsize=7,
        )  # fmt: skip


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
