"""Functional maps and their readings on planted answers and under the invariances they promise."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

import lfm_torch as lfm


def basis_of(x: torch.Tensor, n_basis: int = 10) -> lfm.Basis:
    return lfm.spectral_basis(lfm.build_graph(x, n_neighbors=12), n_basis=n_basis)


def map_of(matrix: torch.Tensor) -> lfm.FunctionalMap:
    evals = torch.linspace(0, 1, max(matrix.shape[-2:]), dtype=matrix.dtype)
    return lfm.FunctionalMap(matrix, evals[: matrix.shape[-1]], evals[: matrix.shape[-2]])


def orthogonal(n: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_map_of_paired_spaces_is_the_product_of_the_bases() -> None:
    x, y = torch.randn(100, 5, dtype=torch.float64), torch.randn(100, 7, dtype=torch.float64)
    bx, by = basis_of(x, 10), basis_of(y, 8)
    fmap = lfm.paired_map(bx, by)
    np.testing.assert_allclose(fmap.C.numpy(), by.evecs.numpy().T @ bx.evecs.numpy(), atol=1e-14)
    assert fmap.adjoint.C.shape == (10, 8)
    f = bx.reconstruct(torch.randn(10, 2, dtype=torch.float64))
    torch.testing.assert_close(fmap.transfer(f, bx, by), by.evecs @ (by.evecs.mT @ f))


def test_unequal_numbers_of_samples_are_refused() -> None:
    with pytest.raises(ValueError, match="same samples as basis_x, 100 rows, got 90"):
        lfm.paired_map(basis_of(torch.randn(100, 3)), basis_of(torch.randn(90, 3)))


def test_perfect_and_empty_maps() -> None:
    identity, zero = map_of(torch.eye(6)), map_of(torch.zeros(6, 6))
    for squared in (True, False):
        for symmetric in (True, False):
            assert float(lfm.lfm_similarity(identity, squared=squared, symmetric=symmetric)) == 1
            assert float(lfm.lfm_similarity(zero, squared=squared, symmetric=symmetric)) == 0
    assert float(lfm.subspace_overlap(identity)) == 1
    assert float(lfm.heat_overlap(identity)) == pytest.approx(1)
    assert float(lfm.heat_overlap(zero)) == 0


def test_readings_as_defined() -> None:
    c = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    fmap = lfm.FunctionalMap(c, torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64))
    for index in np.ndindex(4, 3):
        m = c[index].numpy()
        gram, other = m.T @ m, m @ m.T

        def off(g: np.ndarray) -> float:
            return float(np.linalg.norm(g - np.diag(np.diag(g))) / np.linalg.norm(g))

        a, b = fmap.evals_x.numpy(), fmap.evals_y.numpy()
        kernel = sum(np.exp(-1.5 * (a[i] + b[j])) * m[j, i] ** 2 for i in range(6) for j in range(5))
        heat = kernel / np.sqrt(np.exp(-3 * a).sum() * np.exp(-3 * b).sum())
        assert float(lfm.lfm_similarity(fmap)[index]) == pytest.approx(1 - off(gram) ** 2)
        assert float(lfm.lfm_similarity(fmap, squared=False)[index]) == pytest.approx(1 - off(gram))
        both = (1 - off(gram) ** 2 + 1 - off(other) ** 2) / 2
        assert float(lfm.lfm_similarity(fmap, symmetric=True)[index]) == pytest.approx(both)
        assert float(lfm.subspace_overlap(fmap)[index]) == pytest.approx((m**2).sum() / 5)
        assert float(lfm.heat_overlap(fmap, time=1.5, raw=True)[index]) == pytest.approx(heat)


def test_overlap_and_heat_do_not_depend_on_the_basis() -> None:
    c = orthogonal(12)[:5, :5]
    evals = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.7], dtype=torch.float64)
    rotation = torch.eye(5, dtype=torch.float64)
    rotation[1:4, 1:4] = orthogonal(3)  # inside the eigenvalue that is repeated
    before, after = (lfm.FunctionalMap(m, evals, evals) for m in (c, c @ rotation))
    torch.testing.assert_close(lfm.heat_overlap(before), lfm.heat_overlap(after))
    torch.testing.assert_close(lfm.subspace_overlap(before), lfm.subspace_overlap(after))
    assert abs(float(lfm.lfm_similarity(before) - lfm.lfm_similarity(after))) > 1e-3


def test_heat_of_time_zero_is_the_overlap() -> None:
    fmap = map_of(orthogonal(9)[:4, :4])
    torch.testing.assert_close(lfm.heat_overlap(fmap, time=0.0, raw=True), lfm.subspace_overlap(fmap))
    rest = lfm.FunctionalMap(fmap.C[1:, 1:], fmap.evals_x[1:], fmap.evals_y[1:])
    torch.testing.assert_close(lfm.heat_overlap(fmap, time=0.0), lfm.subspace_overlap(rest))
    for time in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"time must be finite and not negative, got {time}"):
            lfm.heat_overlap(fmap, time=time)


def test_readings_are_differentiable() -> None:
    c = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (5, 4))

    def readings(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        fmap = lfm.FunctionalMap(c, a, b)
        return torch.stack(
            [lfm.lfm_similarity(fmap, symmetric=True), lfm.lfm_similarity(fmap, squared=False), lfm.heat_overlap(fmap)]
        )

    assert torch.autograd.gradcheck(readings, (c, a, b))
    perfect = torch.eye(4, dtype=torch.float64, requires_grad=True)
    lfm.lfm_similarity(map_of(perfect), squared=False).backward()
    assert perfect.grad is not None
    assert bool(perfect.grad.isfinite().all())


def test_save_and_load(tmp_path: Path) -> None:
    fmap = map_of(torch.randn(3, 4))
    fmap.save(tmp_path / "map.safetensors")
    assert torch.equal(lfm.FunctionalMap.load(tmp_path / "map.safetensors").C, fmap.C)
    assert "x with 4 -> y with 3" in repr(fmap)
    assert fmap.to(torch.float64).evals_x.dtype == torch.float64
