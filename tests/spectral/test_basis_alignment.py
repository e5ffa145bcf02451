"""Signs and rotations inside repeated eigenvalues, planted and undone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from small_graphs import graph_of, grid, ring

import lfm_torch as lfm


def test_signs_planted() -> None:
    basis = lfm.spectral_basis(lfm.build_graph(torch.randn(3, 50, 4, dtype=torch.float64)), n_basis=7)
    signs = torch.where(torch.rand(3, 1, 7) < 0.5, -1.0, 1.0).double()
    assert torch.equal(lfm.align_signs(replace(basis, evecs=basis.evecs * signs), basis).evecs, basis.evecs)


def test_rotation_planted_inside_repeated_eigenvalues() -> None:
    for w in (ring(60), grid(7)):
        basis = lfm.spectral_basis(graph_of(w, torch.float64), n_basis=9)
        together = (basis.evals.unsqueeze(0) - basis.evals.unsqueeze(1)).abs() < 1e-6
        rotation = torch.linalg.qr(torch.randn(9, 9).double() * together).Q
        turned = replace(basis, evecs=basis.evecs @ rotation)
        assert float((turned.evecs - basis.evecs).norm()) > 1
        torch.testing.assert_close(lfm.align_subspaces(turned, basis, tol=1e-6).evecs, basis.evecs)
        # signs alone cannot undo it
        assert float((lfm.align_signs(turned, basis).evecs - basis.evecs).norm()) > 0.1


def test_bad_input() -> None:
    basis = lfm.spectral_basis(lfm.build_graph(torch.randn(40, 3)), n_basis=5)
    with pytest.raises(ValueError, match="reference must have evecs of shape"):
        lfm.align_signs(basis, basis.truncate(3))
    with pytest.raises(ValueError, match="tol must not be negative"):
        lfm.align_subspaces(basis, basis, tol=-1.0)
