"""Figures of maps, spectra, distortions and curves. Figure objects throughout: no display, no global state.

Colours are told apart under every common colour blindness and in grey; every line also has a marker and a dash of its
own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from torch import Tensor

from lfm_torch.comparison.across_settings import Sensitivity
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.measures.distortion import Distortion
from lfm_torch.report.figures import DASHES, MARKERS, STYLE
from lfm_torch.report.scales import line_colors, name_of
from lfm_torch.spectral.basis import Basis

# squares of a map's entries below this share of the largest are one colour
_FLOOR = 1e-4


def map_figure(maps: Mapping[str, FunctionalMap]) -> Figure:
    """Draw functional maps as matrices of ``C_ji^2`` on a logarithmic scale, one panel each.

    Squares, because the sign of an eigenfunction means nothing. A map between equal spaces is a diagonal; blocks beside
    it are rotations inside nearly repeated eigenvalues, which only the basis-free readings ignore.

    Args:
        maps: Unbatched maps by name.

    Raises:
        ValueError: no map, or a batch.
    """
    if not maps:
        raise ValueError("maps must hold at least one map, got none")
    for name, fmap in maps.items():
        if fmap.C.dim() != 2:
            raise ValueError(f"maps[{name!r}] must be one map [m_y, m_x], got shape {list(fmap.C.shape)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(3.0 * len(maps) + 0.7, 3.2), layout="constrained")
        axes = figure.subplots(1, len(maps), squeeze=False)[0]
        norm = LogNorm(_FLOOR, 1.0, clip=True)
        for ax, (name, fmap) in zip(axes, maps.items(), strict=True):
            squares = fmap.C.detach().cpu().square().clamp_min(_FLOOR).numpy()
            image = ax.imshow(squares, cmap="cividis", norm=norm, interpolation="nearest")
            ax.set_title(name)
            ax.set_xlabel("eigenfunction of x")
            ax.spines[:].set_visible(False)
        axes[0].set_ylabel("eigenfunction of y")
        exponents = range(round(math.log10(_FLOOR)), 1)
        bar = figure.colorbar(image, ax=list(axes), shrink=0.8, pad=0.02, label="squared coefficient")
        bar.set_ticks([10.0**e for e in exponents], labels=[f"{10.0**e:g}" for e in exponents])
        bar.minorticks_off()
        bar.outline.set_visible(False)
    return figure


def spectrum_figure(bases: Mapping[str, Basis]) -> Figure:
    """Draw the eigenvalues of several bases over their number.

    Raises:
        ValueError: no basis, or a batch.
    """
    if not bases:
        raise ValueError("bases must hold at least one basis, got none")
    for name, basis in bases.items():
        if basis.evals.dim() != 1:
            raise ValueError(f"bases[{name!r}] must be one basis, evals [m], got shape {list(basis.evals.shape)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.2), layout="constrained")
        ax = figure.subplots()
        curves = {name: (range(1, basis.n_basis + 1), basis.evals.tolist()) for name, basis in bases.items()}
        _lines(ax, curves)
        ax.set_xlabel("number of the eigenvalue")
        ax.set_ylabel("eigenvalue of the Laplacian")
        ax.set_ylim(bottom=0)
        ax.legend(frameon=False)
    return figure


def curve_figure(
    x: Sequence[float], curves: Mapping[str, Sequence[float]], *, xlabel: str, ylabel: str = "similarity"
) -> Figure:
    """Draw one line per measure over a common axis: robustness curves and the like.

    Args:
        x: Positions.
        curves: Values by name; names of measures are written out.
        xlabel: What changes along the axis.
        ylabel: What the values are.

    Raises:
        ValueError: a curve of another length than ``x``.
    """
    for name, values in curves.items():
        if len(values) != len(x):
            raise ValueError(f"curves[{name!r}] must have the {len(x)} values of x, got {len(values)}")
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.4), layout="constrained")
        ax = figure.subplots()
        _lines(ax, {name_of(name): (x, values) for name, values in curves.items()})
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        values = [value for curve in curves.values() for value in curve]
        if min(values, default=0) >= 0 and max(values, default=0) <= 1 + 1e-6:
            ax.set_ylim(0, 1.02)
        ax.grid(axis="y", color="0.92")
        ax.set_axisbelow(True)
        figure.legend(loc="outside right upper", frameon=False)
    return figure


def sensitivity_figure(found: Sensitivity) -> Figure:
    """Draw what :func:`lfm_torch.sensitivity` found, one panel per setting."""
    titles = {"n_samples": "samples", "n_neighbors": "neighbors", "n_basis": "eigenvectors"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.9 * len(found.values), 2.9), layout="constrained")
        axes = figure.subplots(1, len(found.values), squeeze=False, sharey=True)[0]
        for ax, (setting, rows) in zip(axes, found.values.items(), strict=True):
            names = next(iter(rows.values()))
            _lines(ax, {name_of(name): (list(rows), [row[name] for row in rows.values()]) for name in names})
            ax.axvline(found.base[setting], color="0.7", linewidth=0.8, linestyle=":")
            ax.set_xlabel(titles.get(setting, setting))
            ax.set_xticks(list(rows))
        axes[0].set_ylabel("value")
        figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def distortion_figure(
    distortion: Distortion,
    points: Tensor | None = None,
    *,
    embedding: Tensor | None = None,
    labels: Tensor | None = None,
    title: str = "distortion",
) -> Figure:
    """Draw every sample in two dimensions, coloured by its distortion; with labels, the mean of each class beside it.

    Args:
        distortion: Unbatched.
        points: ``[n, d]``, embedded by scikit-learn's t-SNE where no ``embedding`` is given.
        embedding: ``[n, 2]``, any embedding of the samples.
        labels: ``[n]`` integers from 0.
        title: Of the scatter.

    Raises:
        ImportError: t-SNE is needed and scikit-learn is missing.
        ValueError: neither points nor an embedding, or shapes that do not fit.
    """
    values = distortion.per_sample.detach().cpu()
    if values.dim() != 1:
        raise ValueError(f"distortion must be that of one map, per_sample [n], got {list(values.shape)}")
    at = _embedded(points, embedding, len(values))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.4 if labels is None else 6.6, 3.8), layout="constrained")
        widths = [1.0] if labels is None else [1.0, 0.42]
        axes = figure.subplots(1, len(widths), squeeze=False, width_ratios=widths)[0]
        # the most distorted samples on top
        order = values.argsort().numpy()
        shade = {"c": values.numpy()[order], "cmap": "cividis"}
        drawn = axes[0].scatter(*at[order].T, s=7, linewidths=0, rasterized=True, **shade)
        axes[0].set_title(title)
        axes[0].set_axis_off()
        bar = figure.colorbar(drawn, ax=axes[0], fraction=0.046, pad=0.02)
        bar.outline.set_visible(False)
        if labels is not None:
            means = distortion.per_class(labels.to(distortion.per_sample.device)).cpu()
            axes[1].barh(range(len(means)), means.tolist(), color="#0072B2")
            axes[1].set_yticks(range(len(means)))
            axes[1].invert_yaxis()
            axes[1].set_ylabel("class")
            axes[1].set_xlabel("mean distortion")
    return figure


def _embedded(points: Tensor | None, embedding: Tensor | None, n: int) -> np.ndarray:
    if embedding is None:
        if points is None:
            raise ValueError("points or an embedding must be given, got neither")
        if points.dim() != 2 or len(points) != n:
            raise ValueError(f"points must have shape [{n}, d], got {list(points.shape)}")
        try:
            from sklearn.manifold import TSNE
        except ImportError as error:
            message = 'embedding by t-SNE needs scikit-learn: pip install "lfm-torch[demo]" (or pass embedding=)'
            raise ImportError(message) from error
        perplexity = min(30.0, (n - 1) / 3)
        found = TSNE(perplexity=perplexity, init="pca", random_state=0).fit_transform(points.detach().cpu().numpy())
        return np.asarray(found)
    if embedding.shape != (n, 2):
        raise ValueError(f"embedding must have shape [{n}, 2], got {list(embedding.shape)}")
    return np.asarray(torch.as_tensor(embedding, device="cpu").detach().numpy())


def _lines(ax: Axes, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> None:
    colors = line_colors(len(curves))
    for k, (name, (x, y)) in enumerate(curves.items()):
        ax.plot(
            list(x),
            list(y),
            color=colors[k],
            marker=MARKERS[k % len(MARKERS)],
            linestyle=DASHES[k % len(DASHES)],
            markersize=3.5,
            markevery=max(1, len(list(x)) // 12),
            linewidth=1.3,
            label=name,
        )
