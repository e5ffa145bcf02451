"""Figures of maps, spectra, distortions and curves: they hold what they are given, and say what they cannot draw."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from extras import need, reason

import lfm_torch as lfm

pytest.importorskip("matplotlib", reason=reason("matplotlib"))
from lfm_torch.report import plots
from lfm_torch.report.figures import png


def pair() -> tuple[torch.Tensor, lfm.Basis, lfm.Basis]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60, 4, generator=generator)
    y = x + 0.3 * torch.randn(60, 4, generator=generator)
    bases = [lfm.spectral_basis(lfm.build_graph(p, n_neighbors=9), n_basis=6) for p in (x, y)]
    return x, bases[0], bases[1]


def test_maps_and_spectra() -> None:
    _, basis_x, basis_y = pair()
    fmap = lfm.paired_map(basis_x, basis_y)
    figure = plots.map_figure({"a": fmap, "b": fmap})
    assert [ax.get_title() for ax in figure.axes][:2] == ["a", "b"]
    shown = torch.from_numpy(figure.axes[0].images[0].get_array().data)
    torch.testing.assert_close(shown, fmap.C.square().clamp_min(1e-4))
    spectra = plots.spectrum_figure({"x": basis_x, "y": basis_y})
    assert [line.get_label() for line in spectra.axes[0].lines] == ["x", "y"]
    assert list(spectra.axes[0].lines[1].get_ydata()) == pytest.approx(basis_y.evals.tolist())
    for drawn in (figure, spectra):
        assert png(drawn).startswith(b"\x89PNG")


def test_curves_name_measures_and_differ_without_colour() -> None:
    figure = plots.curve_figure([0, 1, 2], {"heat": [1, 0.9, 0.8], "$x_1$": [1, 0.5, 0]}, xlabel="t")
    lines = figure.axes[0].lines
    assert [line.get_label() for line in lines] == ["heat overlap", "$x_1$"]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 2
    assert png(figure).startswith(b"\x89PNG")


def test_distortion_is_drawn_on_any_embedding() -> None:
    need("sklearn")
    x, basis_x, basis_y = pair()
    found = lfm.distortion(lfm.paired_map(basis_x, basis_y), basis_y)
    labels = torch.arange(60) % 3
    figure = plots.distortion_figure(found, embedding=x[:, :2], labels=labels)
    drawn = figure.axes[0].collections[0]
    assert sorted(drawn.get_array().data.tolist()) == pytest.approx(sorted(found.per_sample.tolist()))
    bars = [bar.get_width() for bar in figure.axes[1].patches]
    assert bars == pytest.approx(found.per_class(labels).tolist())
    assert png(plots.distortion_figure(found, x)).startswith(b"\x89PNG")  # t-SNE


def test_sensitivity_is_drawn_per_setting() -> None:
    x, *_ = pair()
    found = lfm.sensitivity(x, x.tanh(), n_samples=[30, 60], n_neighbors=[5, 9], n_basis=[4, 6])
    figure = plots.sensitivity_figure(found)
    assert [ax.get_xlabel() for ax in figure.axes] == ["samples", "neighbors", "eigenvectors"]
    assert len(figure.axes[0].lines) == 4  # three measures and the setting of the others


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: plots.map_figure({}), "at least one map"),
        (lambda f: plots.spectrum_figure({}), "at least one basis"),
        (lambda f: plots.curve_figure([0, 1], {"a": [1]}, xlabel="t"), r"curves\['a'\] must have the 2 values"),
        (lambda f: plots.distortion_figure(f), "points or an embedding"),
        (lambda f: plots.distortion_figure(f, embedding=torch.zeros(3, 2)), r"embedding must have shape \[60, 2\]"),
        (lambda f: plots.distortion_figure(f, torch.zeros(3, 2)), r"points must have shape \[60, d\]"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    _, basis_x, basis_y = pair()
    found = lfm.distortion(lfm.paired_map(basis_x, basis_y), basis_y)
    with pytest.raises(ValueError, match=message):
        call(found)
