"""The Nyström extension on held-out points."""

from __future__ import annotations

import pytest
import torch

import lfm_torch as lfm


@pytest.mark.parametrize("weights", ["gaussian", "binary", "inverse_distance"])
def test_held_out_points_get_the_values_of_the_basis_of_all_points(weights: str) -> None:
    """A torus band: the extension from 1,500 points against the eigenvectors of all 1,800."""
    angle, height = torch.rand(2, 1800, dtype=torch.float64)
    x = torch.stack([(6.28 * angle).cos(), (6.28 * angle).sin(), 1.5 * height], -1)
    x = x + 0.01 * torch.randn(x.shape, dtype=x.dtype)
    kept, new = x[:1500], x[1500:]
    graph = lfm.build_graph(kept, n_neighbors=20, metric="euclidean", weights=weights)
    basis = lfm.spectral_basis(graph, n_basis=9)
    whole = lfm.spectral_basis(lfm.build_graph(x, n_neighbors=20, metric="euclidean", weights=weights), n_basis=12)
    extended = basis.extend(new, x=kept, graph=graph)
    # the best combination of the basis of all points explains what was extended, on the points that were held out
    coefficients = torch.linalg.lstsq(whole.evecs[:1500], basis.evecs).solution
    wanted = whole.evecs[1500:] @ coefficients
    error = (extended - wanted).norm(dim=0) / wanted.norm(dim=0)
    assert float(error[:6].max()) < 0.15, error


def test_batch_and_gradient() -> None:
    x = torch.randn(2, 40, 3, dtype=torch.float64)
    graph = lfm.build_graph(x, n_neighbors=9)
    basis = lfm.spectral_basis(graph, n_basis=4)
    new = torch.randn(2, 5, 3, dtype=torch.float64)
    values = basis.extend(new, x=x, graph=graph)
    single = lfm.build_graph(x[1], n_neighbors=9)
    alone = lfm.spectral_basis(single, n_basis=4).extend(new[1], x=x[1], graph=single)
    torch.testing.assert_close(values[1], alone)
    assert torch.autograd.gradcheck(
        lambda p: basis.extend(p, x=x, graph=graph), (new.requires_grad_(),), fast_mode=True
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b, x, g: b.extend(x[:3], x=x[:9], graph=g), "x must have the"),
        (lambda b, x, g: b.extend(x[:3], x=x, graph=lfm.build_graph(x[:9], n_neighbors=3)), "graph must be that of x"),
        (
            lambda b, x, g: b.extend(x[:3], x=x, graph=lfm.build_graph(x, n_neighbors=3, weights="self_tuning")),
            "weights='self_tuning'",
        ),
        (
            lambda b, x, g: lfm.spectral_basis(g, n_basis=30).extend(x[:3], x=x, graph=g),
            "eigenvalues below",
        ),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    x = torch.randn(40, 3)
    graph = lfm.build_graph(x, n_neighbors=5)
    with pytest.raises(ValueError, match=message):
        call(lfm.spectral_basis(graph, n_basis=3), x, graph)  # type: ignore[operator]


def test_a_neighbour_without_edges_adds_nothing() -> None:
    """In a mutual graph a point may have none; a new point can pick it all the same."""
    x = torch.cat([torch.randn(80, 2), torch.tensor([[30.0, 30.0]])])
    graph = lfm.build_graph(x, n_neighbors=6, metric="euclidean", symmetrize="mutual")
    assert float(graph.degree[-1]) == 0
    basis = lfm.spectral_basis(graph, n_basis=5)
    new = torch.tensor([[30.1, 30.0], [0.0, 0.0]])
    assert bool(basis.extend(new, x=x, graph=graph).isfinite().all())
