"""The map of paired spaces, and functional maps as records."""

from __future__ import annotations

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


def test_save_and_load(tmp_path: Path) -> None:
    fmap = map_of(torch.randn(3, 4))
    fmap.save(tmp_path / "map.safetensors")
    assert torch.equal(lfm.FunctionalMap.load(tmp_path / "map.safetensors").C, fmap.C)
    assert "x with 4 -> y with 3" in repr(fmap)
    assert fmap.to(torch.float64).evals_x.dtype == torch.float64
