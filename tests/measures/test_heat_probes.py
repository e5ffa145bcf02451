"""Heat overlap by random probes against dense kernels."""

from __future__ import annotations

import math

import pytest
import torch

import lfm_torch as lfm


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph_of(x: torch.Tensor) -> lfm.Graph:
    return lfm.build_graph(x, n_neighbors=8)


def test_probes_against_dense_kernels() -> None:
    x = randn(90, 4)
    laplacians = [graph_of(p).laplacian() for p in (x, x + 0.4 * randn(90, 4, seed=1))]
    eye = torch.eye(90, dtype=torch.float64)
    for time in (1.0, 3.0):
        kernels = []
        for L in laplacians:
            constant = L.graph.degree.sqrt() / L.graph.degree.sum().sqrt()
            without = eye - torch.outer(constant, constant)
            kernel = torch.linalg.matrix_exp(-time * (L @ eye)) - math.exp(-time) * eye
            kernels.append(without @ kernel @ without)
        wanted = float((kernels[0] * kernels[1]).sum() / (kernels[0].norm() * kernels[1].norm()))
        got = float(lfm.heat_overlap_probes(*laplacians, time=time, n_probes=2000))
        assert got == pytest.approx(wanted, abs=0.01)


def test_probes_tell_related_from_unrelated_and_take_batches() -> None:
    x = randn(2, 150, 4)
    near, far = x + 0.2 * randn(2, 150, 4, seed=1), randn(2, 150, 4, seed=2)
    sides = [lfm.build_graph(p, n_neighbors=12).laplacian() for p in (x, near, far)]
    related, unrelated = (lfm.heat_overlap_probes(sides[0], side) for side in sides[1:])
    assert related.shape == (2,)
    assert float(related.min()) > 0.6 > 0.2 > float(unrelated.abs().max())


def test_probes_are_differentiable_in_the_points() -> None:
    x, y = randn(14, 3).requires_grad_(), randn(14, 3, seed=1)

    def score(x: torch.Tensor) -> torch.Tensor:
        laplacians = [lfm.build_graph(p, n_neighbors=5).laplacian() for p in (x, y)]
        return lfm.heat_overlap_probes(*laplacians, n_probes=4)

    assert torch.autograd.gradcheck(score, (x,))


def test_probes_refuse_what_is_no_pair() -> None:
    laplacian = graph_of(randn(40, 3)).laplacian()
    with pytest.raises(ValueError, match="laplacian_y must be the symmetric Laplacian, got 'random_walk'"):
        lfm.heat_overlap_probes(laplacian, graph_of(randn(40, 3)).laplacian("random_walk"))
    with pytest.raises(ValueError, match="laplacian_y must be over the samples"):
        lfm.heat_overlap_probes(laplacian, graph_of(randn(41, 3)).laplacian())
    with pytest.raises(ValueError, match="time must be positive"):
        lfm.heat_overlap_probes(laplacian, laplacian, time=0)
