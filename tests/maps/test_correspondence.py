"""Pointwise maps in both directions, and pairs that agree."""

from __future__ import annotations

import pytest
import torch
from extras import needs

import lfm_torch as lfm
from lfm_torch.maps.correspondence import mutual_pairs, pointwise_map


@pytest.mark.parametrize(
    "options", [{}, {"adjoint": True}, pytest.param({"bijective": True}, marks=needs("scipy"))], ids=str
)
def test_pointwise_maps_in_both_directions(options: dict[str, bool]) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    order = torch.randperm(50)
    bx, by = (lfm.spectral_basis(lfm.build_graph(z, n_neighbors=10), n_basis=20) for z in (x, x[order]))
    fmap = lfm.FunctionalMap(by.evecs.T @ bx.evecs[order], bx.evals, by.evals)
    assert torch.equal(pointwise_map(fmap, bx, by, **options), order)  # type: ignore[arg-type]
    assert torch.equal(pointwise_map(fmap, bx, by, direction="xy", **options), order.argsort())  # type: ignore[arg-type]
    noisy = lfm.FunctionalMap(fmap.C + 0.5 * torch.randn_like(fmap.C), bx.evals, by.evals)
    found = len(pointwise_map(noisy, bx, by, **options).unique())  # type: ignore[arg-type]
    assert (found == 50) == ("bijective" in options)


def test_mutual_pairs_are_mutual() -> None:
    x, y = torch.tensor([[0.0], [1.0], [10.0]]), torch.tensor([[0.1], [0.9], [1.2]])
    assert mutual_pairs(x, y).tolist() == [[0, 0], [1, 1]]
