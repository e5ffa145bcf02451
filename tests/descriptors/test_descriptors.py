"""Descriptors against their formulas, written out densely."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from extras import need
from torch import Tensor

import lfm_torch as lfm
import lfm_torch.descriptors as ds
from lfm_torch.alignment.relative import relative_representations


@pytest.fixture
def cloud() -> Tensor:
    return torch.randn(60, 4, dtype=torch.float64)


@pytest.fixture
def basis(cloud: Tensor) -> lfm.Basis:
    return lfm.spectral_basis(lfm.build_graph(cloud, n_neighbors=10), n_basis=15)


def test_anchor_distances_are_the_metrics(cloud: Tensor) -> None:
    anchors = torch.tensor([3, 50, 7])
    for metric in ("euclidean", "cosine", "angular"):
        neighbors = lfm.knn(cloud, cloud[anchors], n_neighbors=3, metric=metric)  # type: ignore[arg-type]
        wanted = torch.empty(60, 3, dtype=torch.float64).scatter_(1, neighbors.indices, neighbors.distances)
        distance = ds.anchor_distances(cloud, anchors, metric=metric)  # type: ignore[arg-type]
        torch.testing.assert_close(distance, wanted, atol=1e-7, rtol=0)
        assert bool((distance[anchors].diagonal().abs() < 1e-7).all())
        kernel = ds.anchor_distances(cloud, anchors, metric=metric, kernel=True)  # type: ignore[arg-type]
        torch.testing.assert_close(kernel, (-(distance**2)).exp())


def test_geodesics_are_scipys_shortest_paths(cloud: Tensor) -> None:
    dijkstra = need("scipy.sparse.csgraph").dijkstra
    x = torch.stack([cloud, torch.cat([cloud[:30], cloud[30:] + 100])])
    anchors = torch.tensor([3, 50])
    got = ds.geodesic_distances(x, anchors, n_neighbors=5, metric="euclidean")
    for i in range(2):
        graph = lfm.build_graph(x[i], n_neighbors=5, metric="euclidean", weights="distance", symmetrize="union")
        wanted = dijkstra(graph.to_scipy(), directed=False, indices=anchors.numpy()).T
        finite = np.isfinite(wanted)
        np.testing.assert_allclose(got[i].numpy()[finite], wanted[finite], rtol=1e-12)
        np.testing.assert_allclose(got[i].numpy()[~finite], 2 * wanted[finite].max())
    assert not finite.all()
    straight = ds.anchor_distances(cloud, anchors, metric="euclidean")
    assert bool((got[0] >= straight - 1e-9).all())


def test_signatures_as_defined(basis: lfm.Basis) -> None:
    phi, evals = basis.evecs.numpy(), basis.evals.numpy()
    times = np.array([0.5, 3.0])
    wanted = np.stack([(np.exp(-t * evals) * phi**2).sum(1) for t in times], 1)
    got = ds.heat_kernel_signature(basis, times=torch.tensor(times))
    np.testing.assert_allclose(got.numpy(), wanted, atol=1e-14)
    landmarks = torch.tensor([4, 9, 11])
    kernel = np.stack([phi @ np.diag(np.exp(-t * evals)) @ phi.T for t in times], -1)
    got = ds.heat_diffusion(basis, landmarks, times=torch.tensor(times))
    np.testing.assert_allclose(got.numpy(), kernel[:, landmarks].reshape(60, 6), atol=1e-14)
    wave = ds.wave_kernel_signature(basis, n_energies=5)
    assert wave.shape == (60, 5)
    logs = np.log(np.maximum(evals, 1e-6 * evals[-1]))
    first, last = np.log(evals[1]), logs[-1]
    for e, energy in enumerate(np.linspace(first, last, 5)):
        window = np.exp(-((energy - logs) ** 2) / (2 * (7 * (last - first) / 5) ** 2))
        np.testing.assert_allclose(wave[:, e].numpy(), (window / window.sum() * phi**2).sum(1), atol=1e-12)


def test_heat_by_polynomials_is_the_matrix_exponential() -> None:
    x = torch.randn(2, 50, 3, dtype=torch.float64)
    laplacian = lfm.build_graph(x, n_neighbors=8).laplacian()
    anchors, times = torch.tensor([4, 30, 9]), torch.tensor([0.5, 8.0])
    got = ds.heat_diffusion(laplacian, anchors, times=times)
    kernels = torch.stack([torch.linalg.matrix_exp(-t * laplacian.to_dense()) for t in times], -1)
    torch.testing.assert_close(got, kernels[:, :, anchors].flatten(-2), atol=1e-10, rtol=0)
    basis = lfm.spectral_basis(laplacian, n_basis=49)
    late = torch.tensor([20.0])
    cut, exact = (ds.heat_diffusion(source, anchors, times=late) for source in (basis, laplacian))
    torch.testing.assert_close(cut, exact, atol=1e-8, rtol=0)


def test_heat_times_span_the_spectrum(basis: lfm.Basis) -> None:
    times = ds.heat_times(basis, 6)
    assert float(times[0]) == pytest.approx(4 * math.log(10) / float(basis.evals[-1]))
    assert float(times[-1]) == pytest.approx(4 * math.log(10) / float(basis.evals[1]))
    ratios = times[1:] / times[:-1]
    torch.testing.assert_close(ratios, ratios[:1].expand(5))


def test_signatures_do_not_see_the_order_of_rows_or_the_signs_of_eigenvectors(cloud: Tensor, basis: lfm.Basis) -> None:
    order = torch.randperm(60)
    other = lfm.spectral_basis(lfm.build_graph(cloud[order], n_neighbors=10), n_basis=15)
    for signature in (ds.heat_kernel_signature, ds.wave_kernel_signature):
        torch.testing.assert_close(signature(basis)[order], signature(other))  # type: ignore[operator]
    torch.testing.assert_close(
        ds.heat_diffusion(basis, order[:3])[order], ds.heat_diffusion(other, torch.arange(3)), atol=1e-10, rtol=0
    )


def test_batches_are_their_entries() -> None:
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    basis = lfm.spectral_basis(lfm.build_graph(x, n_neighbors=8), n_basis=7)
    landmarks = torch.tensor([1, 2])
    for i in range(2):
        one = lfm.spectral_basis(lfm.build_graph(x[i], n_neighbors=8), n_basis=7)
        torch.testing.assert_close(ds.heat_diffusion(basis, landmarks)[i], ds.heat_diffusion(one, landmarks))
        torch.testing.assert_close(ds.wave_kernel_signature(basis)[i], ds.wave_kernel_signature(one))
        torch.testing.assert_close(ds.anchor_distances(x, landmarks)[i], ds.anchor_distances(x[i], landmarks))


def test_indicators(basis: lfm.Basis) -> None:
    labels = torch.arange(60) % 4
    indicators = ds.label_indicators(labels, dtype=torch.float64)
    assert indicators.sum(0).tolist() == [15] * 4
    assert ds.label_indicators(labels, classes=torch.tensor([2, 9])).sum(0).tolist() == [15, 0]
    smooth = ds.label_indicators(labels, dtype=torch.float64, basis=basis)
    torch.testing.assert_close(smooth, basis.evecs @ (basis.evecs.T @ indicators))
    unit = ds.normalize(indicators, basis)
    torch.testing.assert_close(unit.norm(dim=0), torch.ones(4, dtype=torch.float64))
    with pytest.raises(TypeError, match="labels must be integers"):
        ds.label_indicators(torch.rand(4))


@pytest.mark.parametrize(("metric", "apart"), [("angular", 2**0.5), ("cosine", 1.0)])
def test_rows_of_zeros_are_orthogonal_to_all(metric: Any, apart: float) -> None:
    x = torch.randn(20, 3)
    x[[2, 5]] = 0
    anchors = torch.tensor([1, 2, 7])
    with pytest.warns(lfm.LFMWarning, match="2 of 20 rows are zero"):
        found = ds.anchor_distances(x, anchors, metric=metric)
    wanted = torch.full((20,), apart)
    torch.testing.assert_close(found[[2, 5]], torch.tensor([[apart, 0, apart], [apart, apart, apart]]))
    torch.testing.assert_close(found[:, 1], wanted.index_fill(0, torch.tensor(2), 0))
    kept = torch.ones(20, dtype=torch.bool).index_fill_(0, torch.tensor([2, 5]), False)
    alone = ds.anchor_distances(x[kept], torch.tensor([1, 5]), metric=metric)
    torch.testing.assert_close(found[kept][:, [0, 2]], alone)
    order = ds.farthest_points(x, 20, metric=metric).tolist()
    assert sorted(order) == list(range(20))
    assert set(order[-2:]) == {2, 5}


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_distances_and_landmarks_at_any_scale(scale: float) -> None:
    x, anchors = torch.randn(20, 3), torch.tensor([3, 8])
    for metric, size in (("euclidean", scale), ("angular", 1.0), ("cosine", 1.0)):
        found = ds.anchor_distances(x * scale, anchors, metric=metric)
        torch.testing.assert_close(found / size, ds.anchor_distances(x, anchors, metric=metric))
        landmarks = ds.farthest_points(x * scale, 8, metric=metric)
        assert torch.equal(landmarks, ds.farthest_points(x, 8, metric=metric))
    relative = relative_representations(x * scale, anchors)
    torch.testing.assert_close(relative, relative_representations(x, anchors))


def test_farthest_points_spread_out() -> None:
    corners = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    x = torch.cat([torch.rand(50, 2) * 0.2 + 0.4, corners])
    chosen = ds.farthest_points(x, 4, start=50, metric="euclidean")
    assert sorted(chosen.tolist()) == [50, 51, 52, 53]
    assert chosen[:2].tolist() == [50, 53]
    assert len(ds.farthest_points(x, 54).unique()) == 54


def test_anchors_are_checked(cloud: Tensor) -> None:
    for wrong, error, message in (
        (torch.tensor([60]), ValueError, r"anchors must lie in \[0, 60\)"),
        (torch.tensor([0.5]), TypeError, "anchors must be integers, got torch.float32"),
        (torch.zeros(0).long(), ValueError, r"anchors must have shape \[p\]"),
    ):
        with pytest.raises(error, match=message):
            ds.anchor_distances(cloud, wrong)
    with pytest.raises(ValueError, match="count must be between 1 and 60"):
        ds.farthest_points(cloud, 61)
