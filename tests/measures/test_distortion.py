"""Distortion of samples on planted changes, and shape-difference operators as defined."""

from __future__ import annotations

import pytest
import torch

import lfm_torch as lfm
from lfm_torch.pipeline import representation_basis


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def basis_of(x: torch.Tensor, n_basis: int = 10) -> lfm.Basis:
    return lfm.spectral_basis(lfm.build_graph(x, n_neighbors=12), n_basis=n_basis)


def moved_class() -> tuple[lfm.FunctionalMap, lfm.Basis, torch.Tensor]:
    """Five groups of 40; in y the samples of the last are scattered everywhere."""
    labels = torch.arange(200) // 40
    x = 6 * randn(5, 6)[labels] + randn(200, 6, seed=1)
    y = x.clone()
    y[labels == 4] = 6 * randn(40, 6, seed=2)
    basis_y = basis_of(y)
    return lfm.paired_map(basis_of(x), basis_y), basis_y, labels


def test_distortion_as_defined() -> None:
    x, y = randn(80, 4), randn(80, 5, seed=1)
    basis_x, basis_y = basis_of(x, 7), basis_of(y, 9)
    fmap = lfm.paired_map(basis_x, basis_y)
    found = lfm.distortion(fmap, basis_y)
    # without any singular vector: 1 - s on the range, as a matrix function of C C^T
    values, vectors = torch.linalg.eigh(fmap.C @ fmap.C.mT)
    lost = vectors @ torch.diag(1 - values.clamp(0, 1).sqrt()) @ vectors.mT
    phi = basis_y.evecs
    torch.testing.assert_close(found.per_sample, ((phi @ lost) * phi).sum(1) / phi.square().sum(1), atol=1e-7, rtol=0)
    assert found.singular_values.shape == (9,)
    assert float(found.per_sample.min()) >= 0
    assert float(found.per_sample.max()) <= 1
    assert "n=80" in repr(found)


def test_distortion_finds_the_samples_that_moved() -> None:
    fmap, basis_y, labels = moved_class()
    found = lfm.distortion(fmap, basis_y)
    moved = labels == 4
    assert float(found.auc(moved)) > 0.97
    per_class = found.per_class(labels)
    assert int(per_class.argmax()) == 4
    torch.testing.assert_close(per_class[2], found.per_sample[labels == 2].mean())
    indices, values = found.worst(10)
    assert bool(moved[indices].all())
    assert values.tolist() == sorted(values.tolist(), reverse=True)
    torch.testing.assert_close(found.share(moved), found.per_sample[moved].sum() / found.per_sample.sum())
    assert float(found.share(moved)) > 0.7  # of a fifth of the samples


def test_auc_counts_ties_half() -> None:
    found = lfm.Distortion(torch.tensor([0.1, 0.5, 0.5, 0.9]), torch.ones(1))
    mask = torch.tensor([False, True, False, True])
    assert float(found.auc(mask)) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    with pytest.raises(ValueError, match="true for some samples"):
        found.auc(mask | True)


def test_distortion_of_a_batch_is_one_by_one() -> None:
    x, y = randn(3, 60, 4), randn(3, 60, 4, seed=1)
    basis_x, basis_y = (lfm.spectral_basis(lfm.build_graph(p, n_neighbors=9), n_basis=6) for p in (x, y))
    found = lfm.distortion(lfm.paired_map(basis_x, basis_y), basis_y)
    for k in range(3):
        single = basis_of_index(basis_y, k)
        wanted = lfm.distortion(lfm.paired_map(basis_of_index(basis_x, k), single), single)
        torch.testing.assert_close(found.per_sample[k], wanted.per_sample)
    assert found.per_class(torch.arange(60) % 4).shape == (3, 4)


def basis_of_index(basis: lfm.Basis, k: int) -> lfm.Basis:
    from dataclasses import replace

    return replace(basis, evals=basis.evals[k], evecs=basis.evecs[k])


def test_shape_differences_as_defined() -> None:
    fmap = lfm.FunctionalMap(randn(4, 5), torch.tensor([0.0, 0.1, 0.2, 0.4, 0.5]).double(), torch.rand(4).double())
    torch.testing.assert_close(lfm.shape_difference(fmap), fmap.C.mT @ fmap.C)
    conformal = lfm.shape_difference(fmap, kind="conformal")
    # <f, g> of y equals <f, R g> of x, for functions of x of nonzero frequency
    f, g = torch.cat([torch.zeros(1).double(), randn(4, seed=1)]), randn(5, seed=2)
    there = (fmap.C @ f) @ (fmap.evals_y * (fmap.C @ g))
    torch.testing.assert_close(f @ (fmap.evals_x * (conformal @ g)), there)
    same = lfm.FunctionalMap(torch.eye(5).double(), fmap.evals_x, fmap.evals_x)
    torch.testing.assert_close(lfm.shape_difference(same, kind="conformal").diagonal()[1:], torch.ones(4).double())


def test_area_difference_is_supported_on_what_moved() -> None:
    fmap, _, labels = moved_class()
    values, vectors = torch.linalg.eigh(lfm.shape_difference(fmap))
    assert float(values.min()) < 0.5
    x = 6 * randn(5, 6)[labels] + randn(200, 6, seed=1)
    worst = (basis_of(x).evecs @ vectors[:, 0]).square()
    assert float(worst[labels == 4].mean()) > 2 * float(worst[labels != 4].mean())


def test_bad_input() -> None:
    fmap, basis_y, labels = moved_class()
    found = lfm.distortion(fmap, basis_y)
    with pytest.raises(ValueError, match="must have the 10 functions that the map reaches, got 5"):
        lfm.distortion(fmap, basis_y.truncate(5))
    with pytest.raises(TypeError, match="labels must be integers"):
        found.per_class(labels.float())
    with pytest.raises(ValueError, match="labels must be 200 numbers from 0"):
        found.per_class(labels[:5])
    with pytest.raises(ValueError, match="count must be between 1 and 200"):
        found.worst(201)
    with pytest.raises(ValueError, match="kind must be one of"):
        lfm.shape_difference(fmap, kind="volume")  # type: ignore[arg-type]


def test_points_or_a_map_give_the_same_distortion() -> None:
    x = randn(90, 4)
    y = x + 0.5 * randn(90, 4, seed=1)
    settings = {"n_neighbors": 12, "n_basis": 8, "metric": "euclidean"}
    basis_x, basis_y = (representation_basis(points, **settings) for points in (x, y))
    wanted = lfm.distortion(lfm.paired_map(basis_x, basis_y), basis_y)
    torch.testing.assert_close(lfm.distortion(x, y, **settings).per_sample, wanted.per_sample)


def test_distortion_says_what_it_takes() -> None:
    fmap, basis_y, _ = moved_class()
    with pytest.raises(
        TypeError, match="two representations, or a FunctionalMap and the Basis of y, got FunctionalMap and Tensor"
    ):
        lfm.distortion(fmap, basis_y.evecs)
    with pytest.raises(TypeError, match=r"settings must be left out beside a map.*n_basis"):
        lfm.distortion(fmap, basis_y, n_basis=5)
    with pytest.raises(ValueError, match="y must have the rows of x"):
        lfm.distortion(randn(40, 3), randn(41, 3))
