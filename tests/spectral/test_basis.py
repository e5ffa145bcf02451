"""Eigensolvers and bases on hard cases against dense float64 ``eigh``: residuals, orthonormality, subspace angles."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracles
import pytest
import torch
from small_graphs import cliques, graph_of, grid, isolated, orders_of_magnitude, path, ring, star
from torch.utils._python_dispatch import TorchDispatchMode

import lfm_torch as lfm
from lfm_torch import ops
from lfm_torch.linalg import solve
from lfm_torch.linalg.eigenpairs import Eigenpairs
from lfm_torch.linalg.orthogonalize import orthonormalize, project_out

SOLVERS = ("lobpcg", "krylov", "dense")


HARD = {
    "path": path(150),
    "ring": ring(150),  # every eigenvalue but 0 twice
    "grid": grid(13),  # many repeated
    "star": star(120),  # eigenvalue 1 with multiplicity n - 2
    "complete": np.ones((90, 90)) - np.eye(90),
    "cliques": cliques(7, 20),
    "more cliques than pairs": cliques(30, 5),
    "orders of magnitude": orders_of_magnitude(160),
    "isolated vertex": isolated(100),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("case", list(HARD))
def test_hard_cases(case: str, solver: str, dtype: torch.dtype) -> None:
    w = HARD[case]
    n_basis = 12
    basis = lfm.spectral_basis(graph_of(w, dtype), n_basis=n_basis, solver=solver)
    dense = oracles.laplacian(w)
    wanted, vectors = np.linalg.eigh(dense)
    tolerance = 2e-5 if dtype == torch.float32 else 2e-8
    evals, evecs = basis.evals.double().numpy(), basis.evecs.double().numpy()
    np.testing.assert_allclose(evals, wanted[:n_basis], atol=tolerance)
    assert np.linalg.norm(dense @ evecs - evecs * evals, axis=0).max() <= tolerance
    assert np.abs(evecs.T @ evecs - np.eye(n_basis)).max() <= 1e-5 * (1 if dtype == torch.float32 else 1e-5)
    assert bool(basis.converged.all())
    # inside the invariant subspace of all eigenvalues up to the last one (and its multiples)
    inside = vectors[:, wanted <= wanted[n_basis - 1] + 1e-3]
    assert np.linalg.norm(evecs - inside @ (inside.T @ evecs)) <= 5e2 * tolerance


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("n_basis", [1, 2, 39])
def test_smallest_and_largest_number_of_pairs(solver: str, n_basis: int) -> None:
    w = oracles.gaussian_graph(np.random.default_rng(0).normal(size=(40, 3)), 6, "euclidean")
    basis = lfm.spectral_basis(graph_of(w, torch.float64), n_basis=n_basis, solver=solver)
    np.testing.assert_allclose(basis.evals.numpy(), np.linalg.eigvalsh(oracles.laplacian(w))[:n_basis], atol=1e-9)
    assert float((basis.evecs.T @ basis.evecs - torch.eye(n_basis)).abs().max()) < 1e-9


@pytest.mark.parametrize("solver", ["lobpcg", "krylov"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_large_graph_agrees_with_dense(solver: str, dtype: torch.dtype) -> None:
    x = torch.randn(1200, 5, dtype=torch.float64)
    graph = lfm.build_graph(x.to(dtype), n_neighbors=20)
    basis = lfm.spectral_basis(graph, n_basis=40, solver=solver)
    exact = lfm.spectral_basis(graph, n_basis=40, solver="dense")
    tol = 1e-5 if dtype == torch.float32 else 1e-8
    assert float(basis.residuals.max()) <= tol
    torch.testing.assert_close(basis.evals, exact.evals, rtol=0, atol=tol)
    overlap = torch.linalg.svdvals(exact.evecs[:, :35].mT @ basis.evecs)
    assert float(overlap.min()) > 1 - 1e-4


@pytest.mark.parametrize("solver", SOLVERS)
def test_batch_with_different_numbers_of_components(solver: str) -> None:
    x = torch.randn(3, 2, 80, 3, dtype=torch.float64)
    x[0, 1, :30] += 1e3
    x[2, 0, :30] += 1e3
    x[2, 0, 30:50] -= 1e3
    graph = lfm.build_graph(x, n_neighbors=6, metric="euclidean")
    basis = lfm.spectral_basis(graph, n_basis=9, solver=solver)
    assert basis.n_components.tolist() == [[1, 2], [1, 1], [3, 1]]
    for index in np.ndindex(3, 2):
        single = lfm.spectral_basis(
            lfm.build_graph(x[index], n_neighbors=6, metric="euclidean"), n_basis=9, solver="dense"
        )
        torch.testing.assert_close(basis.evals[index], single.evals, rtol=0, atol=1e-8)
        gap = torch.linalg.svdvals(single.evecs.mT @ basis.evecs[index])
        assert float(gap.min()) > 1 - 1e-6


@pytest.mark.parametrize("solver", ["lobpcg", "krylov"])
def test_unnormalized_laplacian(solver: str) -> None:
    graph = lfm.build_graph(torch.randn(300, 3, dtype=torch.float64), n_neighbors=10, metric="euclidean")
    laplacian = graph.laplacian("unnormalized")
    basis = lfm.spectral_basis(laplacian, n_basis=10, solver=solver)
    wanted = torch.linalg.eigvalsh(laplacian.to_dense())[:10]
    torch.testing.assert_close(basis.evals, wanted, rtol=0, atol=1e-7)
    torch.testing.assert_close(basis.evecs[:, 0], torch.full((300,), 300**-0.5, dtype=torch.float64))


@pytest.mark.parametrize("solver", ["lobpcg", "krylov"])
def test_same_answer_every_time(solver: str) -> None:
    graph = lfm.build_graph(torch.randn(700, 4), n_neighbors=15)
    first, second = (lfm.spectral_basis(graph, n_basis=20, solver=solver) for _ in range(2))
    assert torch.equal(first.evecs, second.evecs)
    assert bool((first.evecs.gather(0, first.evecs.abs().argmax(0, keepdim=True)) > 0).all())


def test_solver_that_gives_up_says_so_and_returns_what_it_has() -> None:
    graph = lfm.build_graph(torch.randn(900, 20), n_neighbors=10)
    for solver in ("lobpcg", "krylov"):
        with pytest.warns(lfm.LFMWarning, match=r"eigenpairs did not reach tol=1e-05 in \d+ iterations"):
            basis = lfm.spectral_basis(graph, n_basis=30, solver=solver, max_iterations=3)
        assert not bool(basis.converged.all())
        assert basis.evecs.shape == (900, 30)


@pytest.mark.parametrize(("solver", "way"), [("auto", "refine"), ("lobpcg", "lobpcg")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_warm_start_saves_iterations(solver: str, way: str, dtype: torch.dtype) -> None:
    graph = lfm.build_graph(torch.randn(1500, 40, dtype=dtype), n_neighbors=60)
    cold = lfm.spectral_basis(graph, n_basis=30, solver=solver)
    near = lfm.Graph(graph.rowptr, graph.col, graph.weight**1.02, graph.n_nodes)  # up to 8% less
    warm = lfm.spectral_basis(near, n_basis=30, solver=solver, warm_start=cold)
    again = lfm.spectral_basis(near, n_basis=30, solver=solver)
    assert warm.solver == way
    assert warm.iterations < again.iterations
    assert bool(warm.converged.all())
    torch.testing.assert_close(warm.evals, again.evals, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-10)
    assert float(torch.linalg.svdvals(warm.evecs[:, :28].mT @ again.evecs).min()) > 1 - 1e-5


def test_warm_start_without_a_gap_after_the_pairs() -> None:
    graph = lfm.build_graph(torch.randn(1500, 6), n_neighbors=20)
    near = lfm.Graph(graph.rowptr, graph.col, graph.weight**1.02, graph.n_nodes)
    warm = lfm.spectral_basis(near, n_basis=30, warm_start=lfm.spectral_basis(graph, n_basis=30))
    assert bool(warm.converged.all())
    torch.testing.assert_close(warm.evals, lfm.spectral_basis(near, n_basis=30).evals, rtol=0, atol=1e-5)


def test_warm_start_from_another_number_of_components_and_from_far_away() -> None:
    """What the former basis does not hold is found all the same."""
    x = torch.randn(2, 900, 4, dtype=torch.float64)
    apart = x.clone()
    apart[0, :300] += 1e3
    graphs = [lfm.build_graph(points, n_neighbors=12, metric="euclidean") for points in (x, apart, torch.randn_like(x))]
    bases = [lfm.spectral_basis(graph, n_basis=20) for graph in graphs]
    for graph, wanted in zip(graphs, bases, strict=True):
        for warm in (*bases, bases[0].truncate(7)):
            found = lfm.spectral_basis(graph, n_basis=20, warm_start=warm)
            assert bool(found.converged.all())
            torch.testing.assert_close(found.evals, wanted.evals, rtol=0, atol=1e-8)
            torch.testing.assert_close(found.evecs.mT @ found.evecs, torch.eye(20).double().expand(2, 20, 20))


def test_a_random_start_that_is_the_data_itself() -> None:
    """It lies in the lowest eigenvectors alone, and what is counted from it is far too much."""
    x = torch.randn(600, 16, generator=torch.Generator().manual_seed(0))
    graph = lfm.build_graph(x, n_neighbors=30)
    basis = lfm.spectral_basis(graph, n_basis=16, solver="krylov", generator=torch.Generator().manual_seed(0))
    assert bool(basis.converged.all())
    assert basis.iterations < 200
    exact = lfm.spectral_basis(graph, n_basis=16, solver="dense")
    torch.testing.assert_close(basis.evals, exact.evals, rtol=0, atol=1e-5)


def test_pairs_are_found_where_the_survey_misjudges_the_spectrum() -> None:
    """Outliers far below a dense bulk, in float32: the polynomial's range is the trap."""
    generator = torch.Generator().manual_seed(0)
    centres = 30 * torch.randn(9, 8, generator=generator)
    x = centres.repeat(100, 1) + torch.randn(900, 8, generator=generator)
    near = torch.cat([x, x[:9] + 15 * torch.randn(9, 8, generator=generator)])  # bridges between the clusters
    for graph in (
        lfm.build_graph(near, n_neighbors=15, metric="euclidean"),
        lfm.build_graph(torch.rand(1000, 1), metric="euclidean"),
    ):
        basis = lfm.spectral_basis(graph, n_basis=25, solver="krylov")
        wanted = lfm.spectral_basis(graph.to(torch.float64), n_basis=25, solver="dense")
        assert bool(basis.converged.all())
        torch.testing.assert_close(basis.evals.double(), wanted.evals, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda g: lfm.spectral_basis(g, n_basis=20), ValueError, "n_basis must be between 1 and 19"),
        (lambda g: lfm.spectral_basis(g, n_basis=0), ValueError, "got 0"),
        (lambda g: lfm.spectral_basis(g, n_basis=3, solver="arpack"), ValueError, "solver must be one of"),
        (
            lambda g: lfm.spectral_basis(torch.eye(20), n_basis=3),
            TypeError,
            "graph must be a Graph or a Laplacian, got Tensor",
        ),
        (lambda g: lfm.spectral_basis(g.laplacian("random_walk"), n_basis=3), ValueError, "random_walk"),
        (
            lambda g: lfm.spectral_basis(
                g, n_basis=3, warm_start=lfm.spectral_basis(lfm.build_graph(torch.randn(9, 2)), n_basis=2)
            ),
            ValueError,
            "warm_start must have evecs of shape",
        ),
        (lambda g: lfm.spectral_basis(g, n_basis=5).truncate(6), ValueError, "the basis has 5 pairs"),
    ],
)
def test_bad_input(call: object, error: type[Exception], message: str) -> None:
    graph = lfm.build_graph(torch.randn(20, 3), n_neighbors=5)
    with pytest.raises(error, match=message):
        call(graph)  # type: ignore[operator]


def test_truncate_project_reconstruct_save(tmp_path: Path) -> None:
    basis = lfm.spectral_basis(lfm.build_graph(torch.randn(2, 40, 3, dtype=torch.float64)), n_basis=8)
    coefficients = torch.randn(2, 8, 3, dtype=torch.float64)
    torch.testing.assert_close(basis.project(basis.reconstruct(coefficients)), coefficients)
    assert basis.truncate(3).evecs.shape == (2, 40, 3)
    basis.save(tmp_path / "basis.safetensors")
    again = lfm.Basis.load(tmp_path / "basis.safetensors")
    assert torch.equal(again.evecs, basis.evecs)
    assert again.solver == "dense"
    assert basis.to(torch.float32).evals.dtype == torch.float32
    assert "n_basis=8" in repr(basis)


def test_orthonormalize_finds_rank_deficiency() -> None:
    block = torch.randn(100, 6)
    block = torch.cat([block, block @ torch.randn(6, 4), torch.zeros(100, 1), 1e-20 * torch.randn(100, 1)], 1)
    q, present = orthonormalize(block)
    assert int(present.sum()) == 7  # six directions and the tiny one, which is as good as any once scaled
    gram = q.mT @ q
    torch.testing.assert_close(gram, torch.diag(present.float()), rtol=0, atol=1e-6)
    outside = project_out(block, q)
    assert float((outside.norm(dim=0) / block.norm(dim=0).clamp_min(1e-30)).max()) < 1e-4


def test_a_batch_finds_what_each_graph_alone_does() -> None:
    """One graph speaks for the batch while it converges: the others are checked all the same."""
    points = torch.randn(7, 600, 5)
    points[2] *= torch.linspace(0.01, 1, 5)  # nearly a curve: converges last
    points[5, 300:] += 100  # two components
    graph = lfm.build_graph(points, n_neighbors=12, metric="euclidean")
    basis = lfm.spectral_basis(graph, n_basis=20, solver="krylov")
    assert bool(basis.converged.all())
    for i in range(7):
        alone = lfm.spectral_basis(
            lfm.build_graph(points[i], n_neighbors=12, metric="euclidean"), n_basis=20, solver="dense"
        )
        torch.testing.assert_close(basis.evals[i], alone.evals, atol=2e-5, rtol=0)
    assert basis.n_components.tolist() == [1, 1, int(basis.n_components[2]), 1, 1, 2, 1]


def test_blocks_are_orthonormal_and_complete() -> None:
    """The two passes of the compiled step against panels in which most of the block lies."""
    space = torch.linalg.qr(torch.randn(3000, 48, dtype=torch.float64)).Q.float()
    panels = space.unflatten(-1, (3, 16)).transpose(0, 1).contiguous()
    block = space @ torch.randn(48, 16) + 1e-3 * torch.randn(3000, 16)
    q, coefficients, coupling, sound = ops.orthonormalize_block(panels, block, 1.0)
    assert bool(sound)
    double = q.double()
    assert float((double.mT @ double - torch.eye(16)).abs().max()) < 1e-6
    assert float((space.double().mT @ double).abs().max()) < 1e-6
    torch.testing.assert_close(
        space.double() @ coefficients + double @ coupling, block.double(), atol=1e-5, rtol=0, check_dtype=False
    )
    *_, sound = ops.orthonormalize_block(panels, space[:, :16] * torch.arange(16), 1.0)
    assert not bool(sound)


@pytest.mark.parametrize("d", [384, 1024])
def test_points_without_structure(d: int) -> None:
    """The filter's polynomial is enormous at 0, where the known vector lies: nothing of it may come back."""
    graph = lfm.build_graph(torch.randn(2000, d))
    basis = lfm.spectral_basis(graph, solver="krylov")
    assert bool(basis.converged.all())
    exact = lfm.spectral_basis(graph.to(torch.float64), solver="dense")
    torch.testing.assert_close(basis.evals.double(), exact.evals, rtol=0, atol=1e-5)


@pytest.mark.parametrize("normalization", ["symmetric", "unnormalized"])
def test_the_constant_comes_first_among_several_null_vectors(normalization: str) -> None:
    """It is what all spaces share, and what readings leave out."""
    w = cliques(5, 12)
    w[:3, :3] = 0
    laplacian = graph_of(w, torch.float64).laplacian(normalization)  # type: ignore[arg-type]
    root = torch.from_numpy(w.sum(1)).sqrt() if normalization == "symmetric" else torch.ones(60, dtype=torch.float64)
    for n_basis in (5, 9):
        basis = lfm.spectral_basis(laplacian, n_basis=n_basis)
        torch.testing.assert_close(basis.evecs[:, 0], root / root.norm())
        assert float((laplacian @ basis.evecs[:, :5]).abs().max()) < 1e-12
        torch.testing.assert_close(basis.evecs.mT @ basis.evecs, torch.eye(n_basis, dtype=torch.float64))


def test_null_vectors_of_nodes_without_edges_alone() -> None:
    w = isolated(30)
    w[:6] = w[:, :6] = 0
    basis = lfm.spectral_basis(graph_of(w, torch.float64), n_basis=4)
    torch.testing.assert_close(basis.evecs, torch.eye(30, 4, dtype=torch.float64))


def bipartite(n: int) -> np.ndarray:
    w = np.zeros((n, n))
    w[: n // 2, n // 2 :] = w[n // 2 :, : n // 2] = 1
    return w


def pairs_of_codes() -> np.ndarray:
    """Cliques of equal points, joined two by two: an eigenvalue of high multiplicity below the last one asked for."""
    return np.kron(np.kron(np.eye(40), np.ones((2, 2))) - 0.9 * np.eye(80), np.ones((9, 9)))


@pytest.mark.parametrize(("w", "m"), [(bipartite(640), 50), (star(900), 50), (pairs_of_codes(), 90)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_eigenvalue_more_often_than_a_block_has_vectors(w: np.ndarray, m: int, dtype: torch.dtype) -> None:
    np.fill_diagonal(w, 0)
    basis = lfm.spectral_basis(graph_of(w, dtype), n_basis=m, solver="krylov")
    assert bool(basis.converged.all())
    assert basis.iterations < 200
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(basis.evecs.mT @ basis.evecs, torch.eye(m, dtype=dtype), rtol=0, atol=100 * eps)
    wanted = torch.from_numpy(np.linalg.eigvalsh(oracles.laplacian(w))[:m])
    torch.testing.assert_close(basis.evals.double(), wanted, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-8)


def test_lobpcg_stays_out_of_a_large_null_space() -> None:
    """Points drawn with repetition: small corrections consist of what rounding left of the known vectors."""
    x = torch.randn(300, 1, dtype=torch.float64)[torch.randint(75, (300,))]
    graph = lfm.build_graph(x, n_neighbors=8, metric="euclidean", weights="distance")
    basis = lfm.spectral_basis(graph, n_basis=20, solver="lobpcg")
    assert bool(basis.converged.all())
    exact = lfm.spectral_basis(graph, n_basis=20, solver="dense")
    torch.testing.assert_close(basis.evals, exact.evals, rtol=0, atol=1e-8)


def twice_the_same(operator: lfm.Laplacian, n_pairs: int, *, known: torch.Tensor, **_: object) -> Eigenpairs:
    """An eigenvector in every place: each residual is small, and there is one pair only."""
    right = solve.dense_eigenpairs(operator, 1, known)
    evals, evecs = right.evals.expand(n_pairs), right.evecs.expand(-1, n_pairs).contiguous()
    return Eigenpairs(evals, evecs, right.residuals.expand(n_pairs), 1)


def breaks_down(*_: object, **__: object) -> Eigenpairs:
    raise torch.linalg.LinAlgError("linalg.eigh: the input matrix contained non-finite values")  # type: ignore[attr-defined]


@pytest.mark.parametrize("faulty", [twice_the_same, breaks_down])
def test_what_one_solver_fails_at_the_next_one_finds(faulty: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(solve, "krylov", faulty)
    graph = lfm.build_graph(torch.randn(600, 4), n_neighbors=15)
    basis = lfm.spectral_basis(graph, n_basis=10, solver="krylov")
    assert basis.solver == "krylov, dense"
    assert bool(basis.converged.all())
    torch.testing.assert_close(basis.evals, lfm.spectral_basis(graph, n_basis=10, solver="dense").evals)
    with pytest.warns(lfm.LFMWarning, match=r"of 10 eigenpairs did not reach tol=1e-05 .*V\^T V - I 1"):
        limited = lfm.spectral_basis(graph, n_basis=10, solver="krylov", max_iterations=5)
    assert not bool(limited.converged.all())


def test_of_a_batch_only_the_graphs_that_failed_are_solved_again(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = lfm.build_graph(torch.randn(3, 600, 4), n_neighbors=15)
    right = lfm.spectral_basis(graph, n_basis=10, solver="krylov")
    krylov = solve.krylov

    def one_wrong(*args: object, **kwargs: object) -> Eigenpairs:
        pairs = krylov(*args, **kwargs)  # type: ignore[arg-type]
        pairs.evecs[1, :, 3] = pairs.evecs[1, :, 2]
        return pairs._replace(guards=None)

    monkeypatch.setattr(solve, "krylov", one_wrong)
    basis = lfm.spectral_basis(graph, n_basis=10, solver="krylov")
    assert basis.solver == "krylov, dense"
    assert bool(basis.converged.all())
    torch.testing.assert_close(basis.evals, right.evals, rtol=0, atol=1e-5)
    assert torch.equal(basis.evecs[[0, 2]], right.evecs[[0, 2]])


@pytest.mark.parametrize("solver", SOLVERS)
def test_no_eigenvalue_is_negative_or_out_of_order(solver: str) -> None:
    for w in (path(600), ring(600), cliques(7, 80)):
        basis = lfm.spectral_basis(graph_of(w, torch.float32), n_basis=20, solver=solver)
        assert bool(basis.converged.all())
        assert float(basis.evals[0]) == 0
        assert bool((basis.evals.diff() >= 0).all())


class NoFloat32Products(TorchDispatchMode):
    """Refuses what a process may have allowed to run in TF32 or bfloat16."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func.overloadpacket._qualified_op_name.split("::")[1] in ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv"):
            assert not any(isinstance(a, torch.Tensor) and a.dtype == torch.float32 for a in args), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("solver", ["lobpcg", "krylov", "dense", "refine"])
@pytest.mark.parametrize("precision", ["high", "medium"])
def test_solvers_multiply_in_full_precision_whatever_the_process_allows(solver: str, precision: str) -> None:
    graph = lfm.build_graph(torch.randn(560, 40), n_neighbors=40)
    warm = lfm.spectral_basis(graph, n_basis=20, solver="krylov") if solver == "refine" else None
    chosen = "auto" if solver == "refine" else solver
    wanted = lfm.spectral_basis(graph, n_basis=20, solver=chosen, warm_start=warm)
    weight = graph.weight.clone().requires_grad_()
    recorded = lfm.Graph(graph.rowptr, graph.col, weight, graph.n_nodes)
    torch.set_float32_matmul_precision(precision)
    try:
        with NoFloat32Products():
            basis = lfm.spectral_basis(graph, n_basis=20, solver=chosen, warm_start=warm)
            lfm.spectral_basis(recorded, n_basis=20, solver=chosen, warm_start=warm).evals.sum().backward()
    finally:
        torch.set_float32_matmul_precision("highest")
    assert bool(basis.converged.all())
    torch.testing.assert_close(basis.evals, wanted.evals, rtol=0, atol=1e-5)
    assert weight.grad is not None
    assert bool(weight.grad.isfinite().all())
