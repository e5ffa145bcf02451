"""The Laplacian against dense float64 NumPy."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch
from extras import needs

import lfm_torch as lfm


@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
@pytest.mark.parametrize("n_neighbors", [1, 5, 49])
def test_laplacians_as_defined(metric: str, n_neighbors: int) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    graph = lfm.build_graph(x, n_neighbors=n_neighbors, metric=metric)
    wanted = oracles.gaussian_graph(x.numpy(), n_neighbors, metric)
    np.testing.assert_allclose(graph.laplacian().to_dense().numpy(), oracles.laplacian(wanted), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(
        graph.laplacian("unnormalized").to_dense().numpy(), np.diag(wanted.sum(1)) - wanted, rtol=1e-9, atol=1e-13
    )
    np.testing.assert_allclose(
        graph.laplacian("random_walk").to_dense().numpy(),
        np.eye(50) - wanted / wanted.sum(1, keepdims=True),
        rtol=1e-9,
        atol=1e-13,
    )


@needs("scipy")
@pytest.mark.parametrize("normalization", ["symmetric", "random_walk", "unnormalized"])
def test_sparse_forms_hold_the_same_matrix(normalization: str) -> None:
    laplacian = lfm.build_graph(torch.randn(2, 30, 3), n_neighbors=5).laplacian(normalization)
    dense = torch.block_diag(*laplacian.to_dense())
    rounding = {"rtol": 4 * torch.finfo(dense.dtype).eps, "atol": 0}  # products of three in another order
    np.testing.assert_allclose(laplacian.to_scipy().toarray(), dense.numpy(), **rounding)
    torch.testing.assert_close(laplacian.to_torch_csr().to_dense(), dense, **rounding)


def test_transpose_diagonal_and_quadratic_form() -> None:
    graph = lfm.build_graph(torch.randn(2, 30, 3, dtype=torch.float64), n_neighbors=5)
    x = torch.randn(2, 30, 4, dtype=torch.float64)
    for normalization in ("symmetric", "random_walk", "unnormalized"):
        laplacian = graph.laplacian(normalization)
        dense = laplacian.to_dense()
        torch.testing.assert_close(laplacian.T @ x, dense.mT @ x)
        torch.testing.assert_close(laplacian.T.to_dense(), dense.mT)
        torch.testing.assert_close(laplacian.T.T @ x, dense @ x)
        torch.testing.assert_close(laplacian.diagonal, dense.diagonal(dim1=-2, dim2=-1))
        energies = torch.einsum("bnm,bnk,bkm->bm", x, dense, x)
        torch.testing.assert_close(laplacian.quadratic_form(x), energies)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("columns", [1, 3, 8, 40, 64, 150])
def test_half_storage_is_float32_arithmetic_rounded_once(dtype: torch.dtype, columns: int) -> None:
    laplacian = lfm.build_graph(torch.randn(70, 4), n_neighbors=9).laplacian()
    x, z = (torch.randn(70, columns).to(dtype) for _ in range(2))
    x[3, 0] = torch.nan
    got = laplacian.apply(x, z, a=0.7, b=-0.2, c=1.5)
    wanted = laplacian.apply(x.float(), z.float(), a=0.7, b=-0.2, c=1.5)
    assert got.dtype == dtype
    torch.testing.assert_close(got.float(), wanted, rtol=torch.finfo(dtype).eps * 0.51, atol=1e-5, equal_nan=True)
    x = torch.randn(70, 3).to(dtype).requires_grad_()
    (laplacian @ x).float().square().sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    with pytest.raises(TypeError, match="dtype of the weights"):
        lfm.build_graph(torch.randn(70, 2, dtype=torch.float64)).laplacian() @ x


def test_twice_differentiable_in_functions_and_weights() -> None:
    graph = lfm.build_graph(torch.randn(12, 3, dtype=torch.float64), n_neighbors=3)
    rows = torch.repeat_interleave(torch.arange(12), graph.rowptr.diff())
    keys = torch.minimum(rows, graph.col.long()) * 12 + torch.maximum(rows, graph.col.long())
    first, place = torch.unique(keys, return_inverse=True)
    weights = torch.rand(first.numel(), dtype=torch.float64, requires_grad=True)
    x = torch.randn(12, 2, dtype=torch.float64, requires_grad=True)

    def apply(weights: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        return lfm.Graph(graph.rowptr, graph.col, weights[place], 12).laplacian() @ x

    assert torch.autograd.gradgradcheck(apply, (weights, x))


def test_torch_sparse_is_named_where_it_is_missing() -> None:
    laplacian = lfm.build_graph(torch.randn(20, 3), n_neighbors=4).laplacian()
    try:
        import torch_sparse  # noqa: F401
    except ImportError:
        with pytest.raises(ImportError, match=r"lfm-torch\[pyg\]"):
            laplacian.to_torch_sparse()
    else:
        torch.testing.assert_close(laplacian.to_torch_sparse().to_dense(), laplacian.to_dense())


@pytest.mark.parametrize("normalization", ["symmetric", "random_walk", "unnormalized"])
@pytest.mark.parametrize("shape", [(40,), (9, 30), (2, 3, 25)])
def test_a_recurrence_is_its_products(shape: tuple[int, ...], normalization: str) -> None:
    weights = torch.randn(*shape, 4, dtype=torch.float64, requires_grad=True)
    laplacian = lfm.build_graph(weights, n_neighbors=5).laplacian(normalization)
    x = torch.randn(*shape, 7, dtype=torch.float64)
    steps = [(0.5, -1.0, 7.0), (1.0, -2.0, -1.0), (2.0, 0.5, 0.0), (-1.0, 0.0, 0.25)]
    recorded = laplacian.recurrence(x, steps)  # by products, which autograd follows
    recorded.square().sum().backward()
    assert weights.grad is not None
    with torch.no_grad():
        previous, current = torch.zeros_like(x), x
        for a, b, c in steps:
            previous, current = current, a * laplacian.apply(current) + b * current + c * previous
        torch.testing.assert_close(laplacian.recurrence(x, steps), current, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(recorded.detach(), current, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="coefficients must hold at least one step"):
        laplacian.recurrence(x, [])


@pytest.mark.parametrize("time", [0.0, 1e-3, 0.7, 30.0, 4000.0])
@pytest.mark.parametrize("normalization", ["symmetric", "random_walk", "unnormalized"])
def test_heat_keeps_its_error_bound(normalization: str, time: float) -> None:
    graph = lfm.build_graph(torch.randn(60, 4, dtype=torch.float64), n_neighbors=9)
    laplacian = graph.laplacian(normalization)
    x = torch.randn(60, 5, dtype=torch.float64)
    wanted = torch.linalg.matrix_exp(-time * laplacian.to_dense()) @ x
    weight = graph.degree.sqrt() if normalization == "random_walk" else torch.ones(60, dtype=torch.float64)
    norm = (weight.unsqueeze(1) * x).norm(dim=0)
    errors = []
    for tol in (1e-2, 1e-5, 1e-12):
        got = laplacian.heat(x, time=time, tol=tol)
        errors.append((weight.unsqueeze(1) * (got - wanted)).norm(dim=0))
        assert bool((errors[-1] <= (tol + 1e-12) * norm).all())
    torch.testing.assert_close(laplacian.heat(x, time=[0.1, time])[1], wanted, rtol=1e-10, atol=1e-10)


def test_heat_is_differentiable_in_points_and_functions() -> None:
    x, f = torch.randn(2, 20, 3, dtype=torch.float64), torch.randn(2, 20, 2, dtype=torch.float64)

    def heat(x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
        return lfm.build_graph(x, n_neighbors=4).laplacian().heat(f, time=1.5)

    assert torch.autograd.gradcheck(heat, (x.requires_grad_(), f.requires_grad_()), fast_mode=True)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: lfm.build_graph(x).laplacian("normalized"), ValueError, "normalization must be one of"),
        (lambda x: lfm.build_graph(x).laplacian() @ torch.ones(9, 1), ValueError, r"x must have shape \[10, 'm'\]"),
        (lambda x: lfm.build_graph(x).laplacian() @ torch.ones(10, 1).double(), TypeError, "dtype of the weights"),
        (lambda x: lfm.build_graph(x).laplacian().heat(x, time=-1.0), ValueError, "time must be one or more finite"),
        (lambda x: lfm.build_graph(x).laplacian().heat(x, time=[]), ValueError, "time must be one or more finite"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    x = torch.randn(10, 3)
    with pytest.raises(error, match=message):
        call(x)  # type: ignore[operator]
