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


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: lfm.build_graph(x).laplacian("normalized"), ValueError, "normalization must be one of"),
        (lambda x: lfm.build_graph(x).laplacian() @ torch.ones(9, 1), ValueError, r"x must have shape \[10, 'm'\]"),
        (lambda x: lfm.build_graph(x).laplacian() @ torch.ones(10, 1).double(), TypeError, "dtype of the weights"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    x = torch.randn(10, 3)
    with pytest.raises(error, match=message):
        call(x)  # type: ignore[operator]
