"""Weights, symmetrisation and components, against dense float64 NumPy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch
from extras import need

import lfm_torch as lfm
from lfm_torch.graphs.weights import WEIGHTS


@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
@pytest.mark.parametrize("n_neighbors", [1, 5, 49])
def test_gaussian_graph_as_defined(metric: str, n_neighbors: int) -> None:
    x = torch.randn(50, 4, dtype=torch.float64)
    graph = lfm.build_graph(x, n_neighbors=n_neighbors, metric=metric)
    wanted = oracles.gaussian_graph(x.numpy(), n_neighbors, metric)
    np.testing.assert_allclose(graph.to_torch_csr().to_dense().numpy(), wanted, rtol=1e-10, atol=1e-14)
    np.testing.assert_allclose(graph.degree.numpy(), wanted.sum(1), rtol=1e-10)


@pytest.mark.parametrize("symmetrize", ["mean", "union", "mutual"])
@pytest.mark.parametrize("weights", ["gaussian", "self_tuning", "binary", "inverse_distance", "distance"])
def test_weights_and_symmetrisations(weights: str, symmetrize: str) -> None:
    x = torch.randn(60, 3, dtype=torch.float64)
    indices, d = oracles.knn(x.numpy(), None, 8, "euclidean")
    scale = d[:, 6]
    directed = {
        "gaussian": np.exp(-4 * (d / d[:, -1:]) ** 2),
        "self_tuning": np.exp(-(d**2) / (scale[:, None] * scale[indices])),
        "binary": np.ones_like(d),
        "inverse_distance": 1 / d,
        "distance": d,
    }[weights]
    w = np.zeros((60, 60))
    np.put_along_axis(w, indices, directed, 1)
    wanted = {"mean": (w + w.T) / 2, "union": np.maximum(w, w.T), "mutual": np.minimum(w, w.T)}[symmetrize]
    graph = lfm.build_graph(x, n_neighbors=8, metric="euclidean", weights=weights, symmetrize=symmetrize)
    np.testing.assert_allclose(graph.to_torch_csr().to_dense().numpy(), wanted, rtol=1e-10)
    assert graph.col.numel() == np.count_nonzero(wanted)


@pytest.mark.parametrize("weights", ["gaussian", "self_tuning", "binary", "inverse_distance", "distance"])
@pytest.mark.parametrize("symmetrize", ["mean", "union", "mutual"])
def test_graph_is_differentiable_in_the_points(weights: str, symmetrize: str) -> None:
    x = torch.randn(2, 30, 3, dtype=torch.float64, requires_grad=True)
    functions = torch.randn(2, 30, 2, dtype=torch.float64)

    def image(x: torch.Tensor) -> torch.Tensor:
        return lfm.build_graph(x, n_neighbors=5, weights=weights, symmetrize=symmetrize).laplacian() @ functions

    assert torch.autograd.gradcheck(image, (x,), fast_mode=True)


@pytest.mark.parametrize("weights", ["gaussian", "self_tuning", "binary", "inverse_distance"])
def test_duplicated_points_give_finite_weights_and_a_usable_basis(weights: str) -> None:
    x = torch.randn(12, 3).repeat_interleave(6, 0)
    graph = lfm.build_graph(x, n_neighbors=5, metric="euclidean", weights=weights)
    assert bool(graph.weight.isfinite().all())
    assert int(graph.n_components) == 12  # five neighbours at distance 0 each: nothing links the twelve places
    basis = lfm.spectral_basis(graph, n_basis=20)
    assert int((basis.evals.abs() < 1e-5).sum()) == 12


def test_components_are_counted_per_graph_of_a_batch() -> None:
    x = torch.randn(3, 60, 2)
    x[1, :20] += 1e3
    x[2, :20] += 1e3
    x[2, 20:40] -= 1e3
    graph = lfm.build_graph(x, n_neighbors=6, metric="euclidean")
    assert graph.n_components.tolist() == [1, 2, 3]


@pytest.mark.parametrize("weights", ["gaussian", "self_tuning"])
def test_a_ragged_batch_is_its_graphs(weights: Any, tmp_path: Path) -> None:
    sizes = [20, 35, 11]
    x, batch = torch.randn(66, 4, dtype=torch.float64), torch.repeat_interleave(torch.arange(3), torch.tensor(sizes))
    x[20:30] += 50  # the second falls in two
    graph = lfm.build_graph(x, n_neighbors=6, metric="euclidean", weights=weights, batch=batch)
    alone = [lfm.build_graph(part, n_neighbors=6, metric="euclidean", weights=weights) for part in x.split(sizes)]
    for part, wanted in zip(graph.unbatch(), alone, strict=True):
        assert torch.equal(part.rowptr, wanted.rowptr)
        assert torch.equal(part.col, wanted.col)
        assert torch.equal(part.weight, wanted.weight)
        assert repr(part) == repr(wanted)
    assert graph.n_components.tolist() == [int(wanted.n_components) for wanted in alone]
    assert graph.n_components[1] > 1
    functions = torch.randn(66, 3, dtype=torch.float64)
    for normalization in ("symmetric", "random_walk", "unnormalized"):
        laplacian = graph.laplacian(normalization)
        pieces = [(g.laplacian(normalization), f) for g, f in zip(alone, functions.split(sizes), strict=True)]
        torch.testing.assert_close(laplacian @ functions, torch.cat([part @ f for part, f in pieces]))
        torch.testing.assert_close(laplacian.T @ functions, torch.cat([part.T @ f for part, f in pieces]))
        torch.testing.assert_close(laplacian.diagonal, torch.cat([part.diagonal for part, _ in pieces]))
        torch.testing.assert_close(
            laplacian.quadratic_form(functions), torch.stack([part.quadratic_form(f) for part, f in pieces])
        )
        heat = torch.cat([part.heat(f, time=0.7) for part, f in pieces])
        torch.testing.assert_close(laplacian.heat(functions, time=0.7), heat, rtol=1e-6, atol=1e-9)
    graph.save(tmp_path / "graph.safetensors")
    loaded = lfm.Graph.load(tmp_path / "graph.safetensors")
    assert loaded.offsets is not None
    assert loaded.offsets.tolist() == [0, 20, 55, 66]
    again = graph.update(x)
    assert torch.equal(again.weight, graph.weight)
    assert again.offsets is not None
    assert "ragged batch of 3" in repr(again)
    with pytest.raises(ValueError, match=r"got Graph\(ragged batch of 3.*graph.unbatch"):
        lfm.spectral_basis(graph, n_basis=4)
    with pytest.raises(ValueError, match="more than n_neighbors=11 points, got 11 in graph 2"):
        lfm.build_graph(x, n_neighbors=11, batch=batch)
    assert lfm.build_graph(x, batch=batch).n_neighbors == 2  # 15% of the smallest


def test_a_batch_of_equal_size_comes_apart() -> None:
    x = torch.randn(2, 3, 15, 4)
    graphs = lfm.build_graph(x, n_neighbors=4).unbatch()
    assert len(graphs) == 6
    for graph, points in zip(graphs, x.flatten(0, 1), strict=True):
        assert torch.equal(graph.weight, lfm.build_graph(points, n_neighbors=4).weight)


def test_graphs_are_put_side_by_side() -> None:
    sizes = ((20, 4), (20, 7), (20, 3))
    graphs = [lfm.build_graph(torch.randn(n, 3), n_neighbors=k) for n, k in sizes]
    batch = lfm.Graph.batch(graphs)
    assert batch.batch_shape == (3,)
    assert batch.metric == "angular"
    assert batch.n_neighbors == 0  # they differ
    for found, wanted in zip(batch.unbatch(), graphs, strict=True):
        assert torch.equal(found.to_torch_csr().to_dense(), wanted.to_torch_csr().to_dense())
    basis = lfm.spectral_basis(batch, n_basis=5)
    for found, graph in zip(basis.unbatch(), graphs, strict=True):
        wanted = lfm.spectral_basis(graph, n_basis=5)
        torch.testing.assert_close(found.evals, wanted.evals, atol=1e-5, rtol=0)
        assert found.evecs.shape == (20, 5)
        assert found.n_components.dim() == 0
    ragged = lfm.Graph.batch([*graphs, lfm.build_graph(torch.randn(9, 3), n_neighbors=2)])
    assert ragged.offsets is not None
    assert ragged.offsets.tolist() == [0, 20, 40, 60, 69]
    assert len(ragged.unbatch()) == 4
    with pytest.raises(ValueError, match="graphs must be one or more single graphs"):
        lfm.Graph.batch([batch])
    with pytest.raises(ValueError, match="one dtype and device"):
        lfm.Graph.batch([graphs[0], graphs[1].to(torch.float64)])


def test_a_ragged_graph_is_differentiable() -> None:
    x = torch.randn(25, 3, dtype=torch.float64, requires_grad=True)
    batch, functions = torch.tensor([0] * 10 + [1] * 15), torch.randn(25, 2, dtype=torch.float64)

    def energies(points: torch.Tensor) -> torch.Tensor:
        return (
            lfm.build_graph(points, n_neighbors=4, metric="euclidean", batch=batch)
            .laplacian()
            .quadratic_form(functions)
        )

    assert torch.autograd.gradcheck(energies, (x,))


def test_save_and_load(tmp_path: Path) -> None:
    graph = lfm.build_graph(torch.randn(2, 20, 3), n_neighbors=4)
    graph.save(tmp_path / "graph.safetensors")
    again = lfm.Graph.load(tmp_path / "graph.safetensors")
    assert repr(again) == repr(graph)
    assert torch.equal(again.weight, graph.weight)
    assert torch.equal(again.col, graph.col)
    with pytest.raises(ValueError, match="must hold a Basis, got Graph"):
        lfm.Basis.load(tmp_path / "graph.safetensors")
    (tmp_path / "other").write_text("no")
    with pytest.raises(ValueError, match="must be a safetensors file"):
        lfm.Graph.load(tmp_path / "other")


def test_update_builds_the_same_way() -> None:
    how: Any = {"n_neighbors": 4, "metric": "cosine", "weights": "self_tuning", "symmetrize": "mutual"}
    x = torch.randn(2, 20, 3)
    updated, fresh = lfm.build_graph(x, **how).update(x.sin()), lfm.build_graph(x.sin(), **how)
    assert repr(updated) == repr(fresh)
    assert torch.equal(updated.weight, fresh.weight)
    with pytest.raises(ValueError, match=r"x must have shape \[2, 20, 'd'\]"):
        updated.update(x[0])
    with pytest.raises(ValueError, match="must come from build_graph"):
        lfm.Graph.from_torch_csr(fresh.to_torch_csr()).update(x)


@pytest.mark.parametrize("symmetrize", ["mean", "union", "mutual"])
def test_graph_of_many_nodes_and_words(symmetrize: str) -> None:
    """More nodes than the 64 x 64 that one word of the summary stands for, in a batch, against SciPy."""
    sp = need("scipy.sparse")
    generator = torch.Generator().manual_seed(0)
    n, k = 9000, 6
    x = torch.randn(2, n, 2, generator=generator)
    graph = lfm.build_graph(x, n_neighbors=k, metric="euclidean", symmetrize=symmetrize)
    found = lfm.knn(x, n_neighbors=k)
    weights = (-4 * (found.distances / found.distances[..., -1:]).double() ** 2).exp().numpy()
    columns = (found.indices + n * torch.arange(2).view(2, 1, 1)).flatten().numpy()
    w = sp.csr_matrix((weights.ravel(), columns, np.arange(0, 2 * n * k + 1, k)), shape=(2 * n, 2 * n))
    pattern = w.copy()
    pattern.data[:] = 1
    both = pattern.multiply(pattern.T)
    wanted = {"mean": (w + w.T) / 2, "union": w.maximum(w.T), "mutual": w.minimum(w.T)}[symmetrize].tocsr()
    wanted.sort_indices()
    assert graph.col.numel() == (both.nnz if symmetrize == "mutual" else (pattern + pattern.T).nnz)
    assert abs(graph.to_scipy() - wanted).max() < 1e-6
    assert bool((graph.to_scipy().indices == wanted.indices).all())


def test_cast_and_repr() -> None:
    graph = lfm.build_graph(torch.randn(20, 3), n_neighbors=4).to(torch.float64)
    assert graph.weight.dtype == torch.float64
    assert "n_nodes=20" in repr(graph)
    assert "symmetric" in repr(graph.laplacian())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.float32, s) for s in (1e-35, 1e-25, 1e25, 1e36)]
    + [(torch.float64, s) for s in (1e-320, 1e-300, 1e-160, 1e160, 1e300)],
)
def test_a_graph_does_not_depend_on_the_scale(dtype: torch.dtype, scale: float, metric: Any, weights: Any) -> None:
    x = torch.randn(40, 5, dtype=torch.float64)
    if scale < 1e-310:  # what denormal numbers round to is what the points are
        x = x.mul(scale).div(1e-323).round() * 1e-3
        scaled = x.div(1e-3).round() * 1e-323
    else:
        scaled = (x * scale).to(dtype)
        x = (scaled.double() / scale).to(dtype) if dtype == torch.float32 else scaled / scale
    wanted = lfm.build_graph(x, n_neighbors=6, metric=metric, weights=weights)
    if weights == "inverse_distance" and metric == "euclidean" and scale < 1e-310:
        with pytest.raises(ValueError, match="weights must have sums at the nodes that float64 can hold"):
            lfm.build_graph(scaled, n_neighbors=6, metric=metric, weights=weights)
        return
    found = lfm.build_graph(scaled, n_neighbors=6, metric=metric, weights=weights)
    assert bool(found.weight.isfinite().all())
    assert bool((found.weight > 0).all())
    evals = lfm.spectral_basis(found, n_basis=8).evals
    torch.testing.assert_close(evals, lfm.spectral_basis(wanted, n_basis=8).evals, rtol=1e-4, atol=1e-5)
    if weights == "distance" and metric == "euclidean" and scale > 1e-310:
        torch.testing.assert_close(found.weight.double() / scale, wanted.weight.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("weights", [name for name in WEIGHTS if name != "binary"])
@pytest.mark.parametrize("metric", ["euclidean", "angular", "cosine"])
@pytest.mark.parametrize("scale", [1e-30, 1e-15, 1e15, 1e30])
def test_gradients_of_weights_do_not_depend_on_the_scale(scale: float, metric: Any, weights: Any) -> None:
    """With duplicates: float32 against float64."""
    x = torch.randn(20, 4)
    x[1] = x[2] = x[0]
    x *= scale
    has_unit = metric == "euclidean" and weights in ("distance", "inverse_distance")
    unit = (1 / scale if weights == "distance" else scale) if has_unit else 1.0

    def gradient(points: torch.Tensor) -> torch.Tensor:
        points = points.clone().requires_grad_()
        weight = lfm.build_graph(points, n_neighbors=4, metric=metric, weights=weights).weight
        (weight * unit * torch.linspace(0, 1, weight.numel(), dtype=weight.dtype)).sum().backward()
        assert points.grad is not None
        return points.grad.double() * scale

    single, double = gradient(x), gradient(x.double())
    largest = double.abs().max().clamp_min(1)
    torch.testing.assert_close(single / largest, double / largest, rtol=1e-3, atol=1e-4)


def test_points_that_nearly_coincide_have_finite_weights() -> None:
    x = torch.randn(60, 4)
    x[:20] *= 1e-38
    for weights in WEIGHTS:
        graph = lfm.build_graph(x, n_neighbors=5, metric="euclidean", weights=weights)
        assert bool(graph.degree.isfinite().all()), weights


def test_weights_that_the_dtype_cannot_sum_are_refused() -> None:
    x = torch.randn(40, 5).clamp(-4, 4) * 8e37
    assert bool(lfm.build_graph(x, metric="euclidean").weight.isfinite().all())
    with pytest.raises(ValueError, match="sums at the nodes that float32 can hold, got infinity"):
        lfm.build_graph(x, n_neighbors=6, metric="euclidean", weights="distance")
    with pytest.raises(ValueError, match="sums at the nodes that float64 can hold"):
        lfm.Graph.from_torch_csr((1e308 * (1 - torch.eye(3, dtype=torch.float64))).to_sparse_csr())


def test_weights_are_real_and_in_full_precision() -> None:
    graph = lfm.build_graph(torch.randn(10, 3))
    for dtype in (torch.complex64, torch.int32, torch.float16):
        with pytest.raises(TypeError, match=f"weight must be float32 or float64, got {dtype}"):
            graph.to(dtype)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: lfm.build_graph(x, weights="gauss"), ValueError, "did you mean 'gaussian'"),
        (lambda x: lfm.build_graph(x, metric="inner_product"), ValueError, "weights must be 'binary'"),
        (lambda x: lfm.build_graph(x[:1]), ValueError, "at least 2 rows"),
        (lambda x: lfm.build_graph(x + 0j), TypeError, "got torch.complex64"),
        (lambda x: lfm.build_graph(x.to_sparse()), TypeError, "take x.to_dense"),
        (lambda x: lfm.build_graph(0 * x), ValueError, "nothing but zeros .*collapsed"),
        (lambda x: lfm.Graph.from_scipy(x.numpy()), TypeError, "must be a SciPy sparse matrix, got ndarray"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    x = torch.randn(10, 3)
    with pytest.raises(error, match=message):
        call(x)  # type: ignore[operator]
