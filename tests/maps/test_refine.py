"""Refinements recover planted maps from poor ones, and Sinkhorn is a differentiable soft assignment."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.maps.correspondence import pointwise_map
from lfm_torch.maps.refine import icp, log_sinkhorn, orthogonalize, projected_map, sinkhorn_map, zoomout


def pair(n: int, n_basis: int) -> tuple[Tensor, lfm.Basis, lfm.Basis]:
    x = torch.randn(n, 4, dtype=torch.float64)
    order = torch.randperm(n)
    bases = [lfm.spectral_basis(lfm.build_graph(z, n_neighbors=12), n_basis=n_basis) for z in (x, x[order])]
    return order, bases[0], bases[1]


def small_map(order: Tensor, bx: lfm.Basis, by: lfm.Basis, m: int, noise: float) -> lfm.FunctionalMap:
    fmap = projected_map(order, bx.truncate(m), by.truncate(m))
    return replace(fmap, C=fmap.C + noise * torch.randn(m, m, dtype=torch.float64))


def test_zoomout_grows_a_noisy_small_map_to_the_right_one() -> None:
    order, bx, by = pair(200, 40)
    start = small_map(order, bx, by, 6, 0.1)
    before = (pointwise_map(start, bx, by) == order).double().mean()
    fmap = zoomout(start, bx, by, step=5)
    assert fmap.C.shape == (40, 40)
    assert before < 0.5
    assert torch.equal(pointwise_map(fmap, bx, by), order)
    torch.testing.assert_close(fmap.C, by.evecs.T @ bx.evecs[order])


def test_icp_recovers_a_noisy_map() -> None:
    order, bx, by = pair(150, 20)
    fmap = icp(small_map(order, bx, by, 20, 0.1), bx, by)
    assert torch.equal(pointwise_map(fmap, bx, by), order)
    assert fmap.residual <= 1e-6
    assert fmap.iterations >= 2


def test_orthogonalize_gives_the_nearest_orthogonal_map() -> None:
    C = torch.randn(2, 5, 7, dtype=torch.float64)
    evals = torch.rand(7, dtype=torch.float64)
    result = orthogonalize(lfm.FunctionalMap(C, evals, evals[:5])).C
    torch.testing.assert_close(result @ result.mT, torch.eye(5, dtype=torch.float64).expand(2, 5, 5))
    other = torch.linalg.qr(torch.randn(2, 7, 5, dtype=torch.float64)).Q.mT
    assert bool(((result - C).norm(dim=(1, 2)) < (other - C).norm(dim=(1, 2))).all())


def test_maps_between_unequal_numbers_of_points_keep_their_scale() -> None:
    x = torch.rand(400, 2, dtype=torch.float64)
    graphs = (lfm.build_graph(z, n_neighbors=15, metric="euclidean") for z in (x, x[:300]))
    bx, by = (lfm.spectral_basis(graph, n_basis=8) for graph in graphs)
    fmap = projected_map(torch.arange(300), bx, by)
    singular = torch.linalg.svdvals(fmap.C)
    assert 0.8 < float(singular[0]) < 1.2
    # random points of the square are 0.52 apart
    found = x[pointwise_map(orthogonalize(fmap), bx, by)]
    assert float((found - x[:300]).norm(dim=1).mean()) < 0.1


def test_sinkhorn_has_the_marginals_and_sharpens_to_the_assignment() -> None:
    scores = torch.randn(2, 6, 9, dtype=torch.float64)
    plan = log_sinkhorn(scores, 500).exp()
    torch.testing.assert_close(plan.sum(-1), torch.ones(2, 6, dtype=torch.float64))
    torch.testing.assert_close(plan.sum(-2), torch.full((2, 9), 6 / 9, dtype=torch.float64))
    order, bx, by = pair(60, 12)
    fmap, soft = sinkhorn_map(small_map(order, bx, by, 12, 0.02), bx, by, temperature=1e-3, iterations=200)
    assert torch.equal(soft.argmax(-1), order)
    torch.testing.assert_close(fmap.C, by.evecs.T @ bx.evecs[order], atol=1e-2, rtol=0)


def test_sinkhorn_is_differentiable() -> None:
    assert torch.autograd.gradcheck(
        lambda s: log_sinkhorn(s, 8).exp(), torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    )
    order, bx, by = pair(25, 5)

    def refined(C: Tensor) -> Tensor:
        return sinkhorn_map(replace(start, C=C), bx, by, temperature=0.3, iterations=10)[0].C

    start = small_map(order, bx, by, 5, 0.1)
    fixed = start.C.clone().requires_grad_()
    # the scale of the scores, a mean distance, is held fixed in the gradient
    (gradient,) = torch.autograd.grad(refined(fixed).sum(), fixed)
    assert float(gradient.norm()) > 0


def test_sizes_are_checked() -> None:
    order, bx, by = pair(60, 12)
    with pytest.raises(ValueError, match="n_basis must be between 12 and 12"):
        zoomout(small_map(order, bx, by, 12, 0.0), bx, by, n_basis=13)
    with pytest.raises(ValueError, match="temperature must be positive"):
        sinkhorn_map(small_map(order, bx, by, 12, 0.0), bx, by, temperature=0.0)
