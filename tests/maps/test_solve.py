"""The solved functional map against dense and SciPy oracles, and its implicit gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from extras import need
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.maps.solve import functional_map, laplacian_mask, multiplication_operators


def basis_of(n: int, n_basis: int, *, seed: int = 0, dtype: torch.dtype = torch.float64, batch: int = 0) -> lfm.Basis:
    shape = (batch, n, 4) if batch else (n, 4)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return lfm.spectral_basis(lfm.build_graph(x, n_neighbors=10), n_basis=n_basis)


def descriptors(n_x: int, n_y: int, p: int, *, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    return torch.randn(n_x, p, dtype=dtype), torch.randn(n_y, p, dtype=dtype)


def energy(C: Tensor, bx: lfm.Basis, by: lfm.Basis, fx: Tensor, fy: Tensor, w: tuple[float, float, float]) -> Tensor:
    """The documented formula, written out."""
    fx, fy = fx / fx.norm(dim=0), fy / fy.norm(dim=0)
    p, m_x = fx.shape[1], bx.n_basis
    total = (C @ (bx.evecs.T @ fx) - by.evecs.T @ fy).square().sum() / p
    gap = (by.evals[:, None] - bx.evals[None, :]) ** 2
    total = total + w[0] / m_x * (gap / gap.mean() * C**2).sum() + 1e-6 / m_x * C.square().sum()
    for k in range(p if w[1] else 0):
        s_x = bx.evecs.T @ torch.diag(fx[:, k] * len(fx) ** 0.5) @ bx.evecs
        s_y = by.evecs.T @ torch.diag(fy[:, k] * len(fy) ** 0.5) @ by.evecs
        total = total + w[1] / (m_x * p) * (s_y @ C - C @ s_x).square().sum()
    return total + w[2] / m_x * (C.T @ C - torch.eye(m_x, dtype=C.dtype)).square().sum()


def named(w: tuple[float, float, float]) -> dict[str, float]:
    return dict(zip(("laplacian_weight", "commutativity_weight", "orthogonality_weight"), w, strict=True))


@pytest.mark.parametrize("w", [(1e-2, 0.0, 0.0), (0.1, 0.5, 0.0), (0.0, 1.0, 0.0), (0.1, 0.3, 0.2)])
def test_the_solution_is_a_minimum_of_the_documented_energy(w: tuple[float, float, float]) -> None:
    minimize = need("scipy.optimize").minimize
    bx, by = basis_of(60, 8), basis_of(50, 6, seed=1)
    fx, fy = descriptors(60, 50, 12)
    fmap = functional_map(bx, by, fx, fy, **named(w))
    assert fmap.C.shape == (6, 8)
    C = fmap.C.requires_grad_()
    value = energy(C, bx, by, fx, fy, w)
    (gradient,) = torch.autograd.grad(value, C)
    assert float(gradient.norm()) < 1e-8
    # no other start finds less: an L-BFGS of SciPy on the same formula
    start = torch.randn(6, 8, dtype=torch.float64) / 4 if w[2] == 0 else fmap.C.detach() + 0.02

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        C = torch.from_numpy(flat.copy()).view(6, 8).requires_grad_()
        value = energy(C, bx, by, fx, fy, w)
        return float(value.detach()), torch.autograd.grad(value, C)[0].flatten().numpy()

    best = minimize(objective, start.flatten().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 500})
    assert float(value.detach()) <= best.fun + 1e-12


def test_rows_are_solved_exactly_without_commutativity() -> None:
    bx, by = basis_of(60, 8), basis_of(50, 6, seed=1)
    fx, fy = descriptors(60, 50, 3)
    fmap = functional_map(bx, by, fx, fy, laplacian_weight=0.05)
    A, B = (b.evecs.T @ (f / f.norm(dim=0)) for b, f in ((bx, fx), (by, fy)))
    mask = laplacian_mask(bx.evals, by.evals)
    for i in range(6):
        matrix = A @ A.T / 3 + torch.diag(0.05 * mask[i] + 1e-6) / 8
        torch.testing.assert_close(fmap.C[i], torch.linalg.solve(matrix, A @ B[i] / 3), rtol=1e-8, atol=1e-10)
    assert (fmap.ridge, fmap.iterations) == (1e-6, 0)


def test_a_batch_is_its_entries() -> None:
    bx, by = basis_of(60, 8, batch=3), basis_of(50, 6, seed=1, batch=3)
    fx, fy = torch.randn(3, 60, 5, dtype=torch.float64), torch.randn(3, 50, 5, dtype=torch.float64)
    weights = torch.tensor([0.1, 0.5, 2.0], dtype=torch.float64)
    together = functional_map(bx, by, fx, fy, commutativity_weight=weights, orthogonality_weight=0.05)
    for i in range(3):
        one_x, one_y = (replace(b, evals=b.evals[i], evecs=b.evecs[i]) for b in (bx, by))
        alone = functional_map(
            one_x, one_y, fx[i], fy[i], commutativity_weight=float(weights[i]), orthogonality_weight=0.05
        )
        torch.testing.assert_close(together.C[i], alone.C, rtol=1e-6, atol=1e-8)


def test_a_permuted_copy_gives_an_orthogonal_map() -> None:
    x = torch.randn(80, 4, dtype=torch.float64)
    order = torch.randperm(80)
    bx, by = (lfm.spectral_basis(lfm.build_graph(z, n_neighbors=10), n_basis=15) for z in (x, x[order]))
    f = torch.cdist(x, x[:20])
    fmap = functional_map(bx, by, f, f[order], commutativity_weight=0.1)
    torch.testing.assert_close(fmap.C, by.evecs.T @ bx.evecs[order], atol=1e-3, rtol=0)
    assert float(lfm.lfm_similarity(fmap)) > 0.9999


@pytest.mark.parametrize("w", [(0.1, 0.0, 0.0), (0.1, 0.3, 0.0), (0.1, 0.3, 0.2)])
def test_implicit_gradients(w: tuple[float, float, float]) -> None:
    bx, by = basis_of(30, 5), basis_of(26, 4, seed=1)
    fx, fy = descriptors(30, 26, 4)

    def solve(ex: Tensor, vx: Tensor, ey: Tensor, vy: Tensor, fx: Tensor, fy: Tensor, *weights: Tensor) -> Tensor:
        named_weights: dict[str, Any] = dict(zip(named(w), weights, strict=True))
        one, other = replace(bx, evals=ex, evecs=vx), replace(by, evals=ey, evecs=vy)
        fmap = functional_map(one, other, fx, fy, tol=1e-11, max_iterations=2000, **named_weights)
        return torch.cat([fmap.C.flatten(), lfm.lfm_similarity(fmap).view(1)])

    given = [bx.evals, bx.evecs, by.evals, by.evecs, fx, fy]
    inputs = [t.clone().requires_grad_() for t in given]
    inputs += [torch.tensor(v, dtype=torch.float64, requires_grad=v > 0) for v in w]
    assert torch.autograd.gradcheck(solve, inputs, fast_mode=True)


def test_operators_multiply_functions() -> None:
    basis = basis_of(40, 39)
    f = torch.randn(40, 2, dtype=torch.float64)
    operators = multiplication_operators(basis, f)
    g = basis.evecs @ torch.randn(39, dtype=torch.float64)
    wanted = basis.evecs.T @ (40**0.5 * f[:, 1] * g)
    torch.testing.assert_close(operators[1] @ (basis.evecs.T @ g), wanted)


def test_it_says_when_it_did_not_converge() -> None:
    bx, by = basis_of(60, 8), basis_of(50, 6, seed=1)
    fx, fy = descriptors(60, 50, 12)
    with pytest.warns(lfm.LFMWarning, match="relative gradient norm is .* after 1 conjugate"):
        functional_map(bx, by, fx, fy, commutativity_weight=1.0, max_iterations=1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"f_x": torch.randn(59, 3).double()}, ValueError, "f_x must have the 60 rows of its basis"),
        ({"f_y": torch.randn(50, 4).double()}, ValueError, "f_y must have the 3 descriptors of f_x, got 4"),
        ({"f_x": torch.randn(60, 3)}, TypeError, "f_x must have the dtype of its basis"),
        ({"f_x": torch.zeros(60, 3).double()}, ValueError, "f_x must have no zero descriptor, got one in column 0"),
        ({"f_x": torch.full((60, 3), torch.nan).double()}, ValueError, "f_x must be finite"),
        ({"laplacian_weight": -1.0}, ValueError, "laplacian_weight must be finite and not negative"),
        ({"ridge": -1.0}, ValueError, "ridge must not be negative"),
    ],
)
def test_wrong_input_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"f_x": torch.randn(60, 3).double(), "f_y": torch.randn(50, 3).double()}
    arguments |= change
    with pytest.raises(error, match=message):
        functional_map(basis_of(60, 8), basis_of(50, 6, seed=1), **arguments)
