"""The chosen weights are those that bring held-out anchors together."""

from __future__ import annotations

import pytest
import torch

import lfm_torch as lfm
from lfm_torch.alignment.weights import choose_weights


def test_weights_that_serve_held_out_anchors_are_chosen() -> None:
    x = torch.randn(200, 4, dtype=torch.float64)
    order = torch.randperm(200)
    y = x[order] + 0.02 * torch.randn(200, 4, dtype=torch.float64)
    bx, by = (lfm.spectral_basis(lfm.build_graph(z, n_neighbors=20), n_basis=20) for z in (x, y))
    anchors = torch.stack([order[:8], torch.arange(8)], 1)
    f_x, f_y = (
        lfm.descriptors.heat_diffusion(b, rows, n_times=3) for b, rows in ((bx, anchors[:, 0]), (by, anchors[:, 1]))
    )
    chosen = choose_weights(bx, by, f_x, f_y, anchors, laplacian_weights=(1e-2, 1e4), n_folds=4)
    assert len(chosen.scores) == 4
    # a crushing weight leaves the diagonal alone, which does not know the signs of the eigenvectors
    assert chosen.weights["laplacian_weight"] == 1e-2
    best = min(chosen.scores.values())
    assert best == chosen.scores[tuple(chosen.weights.values())]  # type: ignore[index]
    assert best < 0.5 * chosen.scores[1e4, 0.0, 0.0]
    # by chance log ranks average log(n) - 1
    assert best < 0.5 * (1 - 1 / 5.3)


def test_wrong_input_is_refused() -> None:
    basis = lfm.spectral_basis(lfm.build_graph(torch.randn(40, 3), n_neighbors=8), n_basis=6)
    anchors = torch.arange(4).repeat(2, 1).T
    with pytest.raises(ValueError, match="f_x must have a multiple of 4 columns"):
        choose_weights(basis, basis, torch.randn(40, 6), torch.randn(40, 6), anchors, n_folds=2)
    with pytest.raises(ValueError, match="n_folds must be between 2 and 4"):
        choose_weights(basis, basis, torch.randn(40, 4), torch.randn(40, 4), anchors)
    with pytest.raises(ValueError, match="must not be empty"):
        choose_weights(basis, basis, torch.randn(40, 4), torch.randn(40, 4), anchors, n_folds=2, laplacian_weights=())
