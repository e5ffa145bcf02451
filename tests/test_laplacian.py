"""The Laplacian against dense float64 NumPy."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

import lfm_torch as lfm


@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
@pytest.mark.parametrize("n_neighbors", [1, 5, 49])
def test_laplacians_as_defined(metric: str, n_neighbors: int) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    graph = lfm.build_graph(x, n_neighbors=n_neighbors, metric=metric)
    wanted = oracles.gaussian_graph(x.numpy(), n_neighbors, metric)
    np.testing.assert_allclose(graph.laplacian().to_dense().numpy(), oracles.laplacian(wanted), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(graph.laplacian().to_scipy().toarray(), oracles.laplacian(wanted), rtol=1e-9, atol=1e-13)
    np.testing.assert_allclose(
        graph.laplacian("unnormalized").to_dense().numpy(), np.diag(wanted.sum(1)) - wanted, rtol=1e-9, atol=1e-13
    )
    np.testing.assert_allclose(
        graph.laplacian("random_walk").to_torch_csr().to_dense().numpy(),
        np.eye(50) - wanted / wanted.sum(1, keepdims=True),
        rtol=1e-9,
        atol=1e-13,
    )


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
