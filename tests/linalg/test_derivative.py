"""Derivatives of eigenvalues, eigenvectors and projectors against finite differences in float64."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from small_graphs import cliques, graph_of, grid, isolated, ring, star
from torch import Tensor

import lfm_torch as lfm

Build = Callable[[Tensor], lfm.Graph]


def family(w: np.ndarray) -> tuple[Tensor, Build]:
    """The weights of the upper triangle, and the graph as a function of them."""
    graph = graph_of(w, torch.float64)
    rows = torch.repeat_interleave(torch.arange(graph.n_nodes), graph.rowptr.diff())
    low, high = torch.minimum(rows, graph.col.long()), torch.maximum(rows, graph.col.long())
    keys, place = torch.unique(low * graph.n_nodes + high, return_inverse=True)
    weights = graph.weight.new_zeros(keys.numel()).index_copy_(0, place, graph.weight)

    def build(edges: Tensor) -> lfm.Graph:
        return lfm.Graph(graph.rowptr, graph.col, edges[place], graph.n_nodes)

    return weights, build


def check(function: Callable[[Tensor], object], weights: Tensor, *, eps: float = 1e-5) -> None:
    assert torch.autograd.gradcheck(
        function, (weights.clone().requires_grad_(),), eps=eps, atol=1e-5, rtol=1e-4, fast_mode=True
    )


def random_graph(n: int, seed: int = 0) -> np.ndarray:
    generator = np.random.default_rng(seed)
    w = np.triu(generator.uniform(0.1, 1, (n, n)) * (generator.random((n, n)) < 0.2), 1)
    return w + w.T + ring(n)


def heat(basis: lfm.Basis, time: float = 3.0) -> Tensor:
    return (basis.evecs * (-time * basis.evals).exp().unsqueeze(-2)) @ basis.evecs.mT


@pytest.mark.parametrize("normalization", ["symmetric", "unnormalized"])
@pytest.mark.parametrize(("solver", "n"), [("dense", 30), ("krylov", 170), ("lobpcg", 60)])
def test_simple_spectrum(solver: str, n: int, normalization: str) -> None:
    weights, build = family(random_graph(n))

    def pairs(edges: Tensor) -> tuple[Tensor, Tensor]:
        laplacian = build(edges).laplacian(normalization)
        basis = lfm.spectral_basis(laplacian, n_basis=6, solver=solver, tol=1e-11)
        return basis.evals, basis.evecs

    check(pairs, weights)


@pytest.mark.parametrize("solver", ["dense", "krylov"])
def test_clustered_spectrum(solver: str) -> None:
    n = 170
    w = ring(n) * (1 + 3e-2 * np.random.default_rng(0).uniform(-1, 1, (n, n)))
    weights, build = family((w + w.T) / 2)
    basis = lfm.spectral_basis(build(weights), n_basis=9, solver=solver, tol=1e-11)
    gaps = basis.evals.diff()
    assert 1e-7 < float(gaps[1::2].min()) < float(gaps[1::2].max()) < 1e-4 < float(gaps[2::2].min())  # four near pairs
    probe = torch.randn(n, n, dtype=torch.float64)
    check(
        lambda e: (heat(lfm.spectral_basis(build(e), n_basis=9, solver=solver, tol=1e-11)) * probe).sum(),
        weights,
        eps=1e-4,
    )
    # simple eigenvalues all the same, so that each vector has a derivative; they turn fast: small steps
    check(
        lambda e: lfm.spectral_basis(build(e), n_basis=9, solver=solver, tol=1e-13).evecs.square() * gaps.min(),
        weights,
        eps=1e-7,
    )


REPEATED = {
    "ring": (ring(40), 7),
    "grid": (grid(6), 6),
    "star": (star(24), 23),
    "complete": (np.ones((14, 14)) - np.eye(14), 1),
    "cliques": (cliques(3, 7), 3),
    "isolated vertex": (isolated(20), 4),
}


@pytest.mark.parametrize("case", list(REPEATED))
def test_repeated_spectrum(case: str) -> None:
    """A ring, a grid and the like: every level but the first is repeated; the basis ends at a gap."""
    w, n_basis = REPEATED[case]
    weights, build = family(w)
    n = len(w)
    probe = torch.randn(n, n, dtype=torch.float64)

    def losses(edges: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        basis = lfm.spectral_basis(build(edges), n_basis=n_basis)
        projector = basis.evecs @ basis.evecs.mT
        signature = (basis.evecs.square() * (-2.0 * basis.evals).exp()).sum(-1)
        return (projector * probe).sum(), (heat(basis) * probe).sum(), (signature * probe[0]).sum()

    # steps that split the levels by far more than the distance at which they count as repeated
    check(losses, weights, eps=1e-3)


def test_repeated_spectrum_without_the_dense_solver() -> None:
    weights, build = family(ring(200))
    probe = torch.randn(200, 200, dtype=torch.float64)

    def losses(edges: Tensor, solver: str) -> Tensor:
        basis = lfm.spectral_basis(build(edges), n_basis=7, solver=solver, tol=1e-11)
        return torch.stack([(basis.evecs @ basis.evecs.mT * probe).sum(), (heat(basis) * probe).sum()])

    found = []
    for solver in ("dense", "krylov", "lobpcg"):
        edges = weights.clone().requires_grad_()
        found.append(torch.autograd.grad(losses(edges, solver).sum(), edges)[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found[2], found[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_loss_that_turns_with_the_basis_stays_finite(dtype: torch.dtype) -> None:
    """Inside a repeated eigenvalue such a loss has no derivative: nothing may blow up."""
    for w in (ring(40), star(20), cliques(3, 6)):
        graph = graph_of(w, dtype)
        edges = graph.weight.clone().requires_grad_()
        built = lfm.Graph(graph.rowptr, graph.col, edges, graph.n_nodes)
        basis = lfm.spectral_basis(built, n_basis=6)
        generator = torch.Generator().manual_seed(0)
        (basis.evecs * torch.randn(basis.evecs.shape, generator=generator).to(dtype)).sum().backward()
        assert edges.grad is not None
        assert bool(edges.grad.isfinite().all())
        assert float(edges.grad.abs().max()) < 1e3


def test_null_vectors_follow_the_degrees() -> None:
    """More components than pairs asked for: the vectors are ``D^{1/2} 1`` on a component, in closed form."""
    weights, build = family(np.kron(np.eye(5), random_graph(6)))

    def pairs(edges: Tensor) -> tuple[Tensor, Tensor]:
        basis = lfm.spectral_basis(build(edges), n_basis=3)
        return basis.evals + 0 * edges.sum(), basis.evecs

    check(pairs, weights)


@pytest.mark.parametrize("metric", ["euclidean", "angular"])
def test_through_the_graph_to_the_points(metric: str) -> None:
    x = torch.randn(2, 40, 4, dtype=torch.float64)
    x[1, :15] += 50  # two components in one graph of the batch, one in the other

    def pairs(x: Tensor) -> tuple[Tensor, Tensor]:
        basis = lfm.spectral_basis(lfm.build_graph(x, n_neighbors=6, metric=metric), n_basis=5)
        return basis.evals, basis.evecs

    check(pairs, x, eps=1e-6)


def test_gradients_in_float32_agree_with_float64() -> None:
    x = torch.randn(700, 6, dtype=torch.float64)
    graph = lfm.build_graph(x, n_neighbors=20)
    probe = torch.randn(700, 20, dtype=torch.float64)
    found = []
    for dtype, solver in ((torch.float64, "dense"), (torch.float32, "krylov"), (torch.float32, "lobpcg")):
        edges = graph.weight.to(dtype).requires_grad_()
        built = lfm.Graph(graph.rowptr, graph.col, edges, graph.n_nodes)
        basis = lfm.spectral_basis(built, n_basis=20, solver=solver)
        loss = (heat(basis) @ probe.to(dtype)).square().sum() + basis.evals.square().sum()
        found.append(torch.autograd.grad(loss, edges)[0].double())
    for other in found[1:]:
        assert float((other - found[0]).norm() / found[0].norm()) < 2e-3


def test_a_cut_inside_a_cluster_is_announced_or_right() -> None:
    """The basis ends inside a repeated eigenvalue: finite, and the pairs before the cut are not touched by it."""
    weights, build = family(ring(200))
    for solver in ("dense", "krylov"):
        edges = weights.clone().requires_grad_()
        basis = lfm.spectral_basis(build(edges), n_basis=6, solver=solver, tol=1e-11)  # levels of 1, 2, 2 and a half
        projector = basis.evecs[:, :5] @ basis.evecs[:, :5].mT
        (gradient,) = torch.autograd.grad(projector[:20, :20].sum(), edges)
        whole = weights.clone().requires_grad_()
        basis = lfm.spectral_basis(build(whole), n_basis=5, solver="dense")
        projector = basis.evecs @ basis.evecs.mT
        (wanted,) = torch.autograd.grad(projector[:20, :20].sum(), whole)
        torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-6)


def test_without_a_recorded_gradient_nothing_is_paid() -> None:
    graph = lfm.build_graph(torch.randn(40, 3, requires_grad=True))
    with torch.no_grad():
        basis = lfm.spectral_basis(graph, n_basis=4)
    assert not basis.evecs.requires_grad
    # what was cached without gradient must not swallow a later one
    assert lfm.spectral_basis(graph, n_basis=4).evecs.requires_grad
    (first,) = torch.autograd.grad(lfm.spectral_basis(graph, n_basis=4).evals.sum(), graph.weight, retain_graph=True)
    assert float(first.abs().sum()) > 0
