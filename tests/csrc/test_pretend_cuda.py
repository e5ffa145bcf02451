"""What the Python layer does with tensors of a GPU, rehearsed without one: see pretend_cuda.py.

Each call runs twice, with tensors of the CPU and of the pretended GPU, and has to say the same; what it returns has to
be on the GPU too. Left out: what answers with sparse tensors and the step "kernels", which multiplies with one, for
they cannot be pretended; autocast, which looks at what C++ knows of a tensor; CUDA graphs; more than one GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_cuda_library
import test_gpu_stages as stages
import torch
from extras import CLI, need, needs
from pretend_cuda import DEVICE, DeviceError, PretendedCuda, PretendedTensor, pretended_cuda
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch import baselines, descriptors
from lfm_torch.alignment.consistent import consistent_maps
from lfm_torch.alignment.gromov import gromov_wasserstein
from lfm_torch.alignment.relative import relative_representations
from lfm_torch.alignment.translator import Translator
from lfm_torch.alignment.weights import choose_weights
from lfm_torch.cli import main
from lfm_torch.comparison.jobs import bases, pieces
from lfm_torch.integrations.pyg import knn_graph
from lfm_torch.losses import DirichletAlignmentLoss, LFMAlignmentLoss
from lfm_torch.maps.correspondence import agreeing_pairs, mutual_pairs
from lfm_torch.maps.retrieval import retrieve
from lfm_torch.measures.table import MEASURES
from lfm_torch.ops import OPERATORS
from lfm_torch.representations.models import Models
from lfm_torch.training import Monitor

gpu_steps = pytest.importorskip("gpu_steps", reason="the benchmarks are not beside the tests")
pytestmark = pytest.mark.skipif(torch.version.cuda is not None, reason="this torch has CUDA of its own")

Move = Callable[[Tensor], Tensor]


@pytest.fixture(autouse=True)
def gpu() -> Iterator[PretendedCuda]:
    with pretended_cuda() as gpu:
        yield gpu


@pytest.fixture
def fixed() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def clusters(n: int, *batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    return tuple(x.double() for x in stages.spaces(torch.Generator().manual_seed(seed), n, batch))  # type: ignore[return-value]


def alike(got: Any, wanted: Any, atol: float, where: str = "result") -> None:
    """The same values; what is a tensor of the CPU in ``wanted`` is one of the GPU in ``got``."""
    if isinstance(wanted, Tensor):
        assert isinstance(got, PretendedTensor), f"{where} is on the CPU"
        torch.testing.assert_close(got.detach().cpu(), wanted.detach(), atol=atol, rtol=atol, msg=lambda m: where + m)
    elif isinstance(wanted, dict):
        assert got.keys() == wanted.keys()
        for key in wanted:
            alike(got[key], wanted[key], atol, f"{where}[{key!r}]")
    elif isinstance(wanted, (tuple, list)):
        assert len(got) == len(wanted)
        for i, pair in enumerate(zip(got, wanted, strict=True)):
            alike(*pair, atol, f"{where}[{i}]")
    elif dataclasses.is_dataclass(wanted):
        for field in dataclasses.fields(wanted):
            if field.name != "offsets":  # on the CPU by contract
                alike(getattr(got, field.name), getattr(wanted, field.name), atol, f"{where}.{field.name}")
    elif isinstance(wanted, float):
        assert got == pytest.approx(wanted, abs=atol, nan_ok=True), where
    else:
        assert got == wanted, where


def both(run: Callable[[Move], Any], atol: float = 1e-5) -> None:
    """Run with what leaves tensors where they are, and with what moves them to the GPU."""
    alike(run(lambda x: x.to("cuda")), run(lambda x: x), atol)


# ---- the pretended GPU itself


def test_what_cuda_refuses_is_refused() -> None:
    x, generator = torch.ones(3, 3, device="cuda"), torch.Generator("cuda")
    for refused in (
        lambda: x + torch.ones(3),
        lambda: x @ torch.ones(3, 3),
        lambda: torch.cat([x, torch.ones(1, 3)]),
        lambda: torch.stack([x.sum(), torch.tensor(1.0)]),
        lambda: torch.where(x > 0, torch.ones(3, 3), 0.0),
        lambda: torch.ones(3).add_(x.sum()),
        lambda: torch.zeros(()).add_(x.sum()),
        lambda: torch.ones(3)[torch.arange(2, device="cuda")],
        lambda: x.gather(0, torch.zeros(1, 3, dtype=torch.int64)),
        lambda: x.index_put_((torch.tensor(0),), torch.ones(3)),
        lambda: x.long() @ x.long(),
        lambda: x.pin_memory(),
        lambda: torch.histogram(x, 3),
        lambda: torch.linalg.lstsq(x, x, driver="gelsd"),
        lambda: torch.randn(3, generator=torch.Generator(), device="cuda"),
        lambda: torch.randn(3, generator=generator),
        lambda: torch.zeros(3, device="cuda:1"),
        lambda: OPERATORS["knn"].compiled(x[None], torch.ones(1, 3, 3), 1, "euclidean", 0),
        lambda: OPERATORS["knn_ragged"].compiled(x, None, torch.tensor([0, 3], device="cuda"), None, 1, "euclidean", 0),
    ):
        with pytest.raises(DeviceError):
            refused()
    for refused in (x.numpy, lambda: np.asarray(x), lambda: np.array(x)):
        with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
            refused()


def test_what_cuda_allows_is_allowed() -> None:
    x = torch.arange(6.0, device="cuda").view(2, 3)
    assert x.device == DEVICE
    assert x.is_cuda
    assert x.to("cuda") is x
    assert x.tolist() == x.cpu().tolist() == [[0, 1, 2], [3, 4, 5]]
    assert type(x.cpu()) is Tensor
    for y in (x * torch.tensor(2.0), x[torch.tensor([1])], x[[0, 1]], x.new_zeros(2), torch.tensor([1], device=DEVICE)):
        assert y.is_cuda
    y = torch.zeros(2)
    y.copy_(x[:, 0])
    assert y.tolist() == [0, 3]
    x[0] = torch.tensor(7.0)
    x[torch.tensor([False, True])] = 8
    assert (x @ torch.ones(3, device="cuda")).tolist() == [21, 24]
    first, again = (torch.randn(4, generator=torch.Generator("cuda").manual_seed(3), device="cuda") for _ in range(2))
    assert torch.equal(first, again)


def test_gradients_pass_between_devices() -> None:
    weight = torch.ones(3, requires_grad=True)
    leaf = torch.ones(3, device="cuda", requires_grad=True)
    (weight.cuda() * leaf * 2).sum().backward()
    assert weight.grad is not None
    assert leaf.grad is not None
    assert (type(weight.grad), type(leaf.grad)) == (Tensor, PretendedTensor)
    assert weight.grad.tolist() == leaf.grad.tolist() == [2, 2, 2]


# ---- what the first run on a GPU does


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The steps of that run, at the sizes of a rehearsal and on the pretended GPU."""
    for module in (gpu_steps, test_cuda_library, stages):
        monkeypatch.setattr(module, "DEVICE", torch.device("cuda"))
    monkeypatch.setattr(gpu_steps, "DRY", True)
    monkeypatch.setattr(gpu_steps, "failed", False)
    monkeypatch.delenv("LFM_TORCH_GPU_RECORD", raising=False)
    return gpu_steps


def test_the_first_step(steps: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(steps, "DRY", False)
    steps.device()  # finds a GPU, and no CUDA library that this torch could load
    assert "Pretended" in capsys.readouterr().out


@pytest.mark.parametrize("step", ["limits", "neighbors", "solvers", "training"])
def test_steps_of_the_first_run(steps: Any, step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps, "profile", lambda graph: None)  # torch's profiler looks for a GPU itself
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        getattr(steps, step)()
    assert not steps.failed, printed.getvalue()


@pytest.mark.parametrize("name", [*OPERATORS, "sanitized"])
def test_operators_of_the_first_run(steps: Any, fixed: torch.Generator, name: str) -> None:
    checks = steps.checks(name, test_cuda_library, fixed)
    assert sum(1 for _ in itertools.islice(checks, 5)) > 1  # the rest of them differ in sizes alone


@pytest.mark.parametrize("name", list(OPERATORS))
def test_twins_stay_on_their_device(name: str) -> None:
    """What runs on a GPU for which no library is loaded."""
    with pretended_cuda(twins=True):
        for args in list(OPERATORS[name].sample_inputs(torch.device("cuda"), torch.float64))[:4]:
            results = OPERATORS[name].compiled(*args)
            assert all(r.is_cuda for r in ((results,) if isinstance(results, Tensor) else results))


@pytest.mark.parametrize("solver", ["auto", "lobpcg", "krylov", "dense"])
def test_stage_spectral_basis(steps: Any, fixed: torch.Generator, solver: str) -> None:
    stages.test_spectral_basis(fixed, torch.float32, solver, n_basis=11)


@pytest.mark.parametrize("batch", [(), (4,)])
def test_stage_similarity(steps: Any, fixed: torch.Generator, batch: tuple[int, ...]) -> None:
    stages.test_similarity(fixed, batch)


@pytest.mark.parametrize("make", [LFMAlignmentLoss, DirichletAlignmentLoss])
def test_stage_losses(steps: Any, fixed: torch.Generator, make: Any) -> None:
    stages.test_losses_and_their_gradients(fixed, make)


@pytest.mark.parametrize("count", [0, 3])
def test_stage_align(steps: Any, fixed: torch.Generator, count: int) -> None:
    stages.test_align(fixed, count)


def test_other_stages(steps: Any, fixed: torch.Generator) -> None:
    stages.test_heat_and_inputs_that_are_not_contiguous(fixed)
    stages.test_a_stage_runs_on_the_current_stream(fixed)


# ---- graphs and bases


@pytest.mark.parametrize("weights", ["gaussian", "self_tuning", "inverse_distance"])
@pytest.mark.parametrize("symmetrize", ["mean", "union", "mutual"])
def test_graphs(weights: Any, symmetrize: Any) -> None:
    x = clusters(90)[0]
    both(lambda m: lfm.build_graph(m(x), n_neighbors=9, weights=weights, symmetrize=symmetrize))
    both(lambda m: lfm.build_graph(m(x.view(2, 45, 6)), n_neighbors=5, weights=weights, symmetrize=symmetrize))


@needs("scipy")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_graphs_and_their_parts(tmp_path: Path) -> None:
    x, sets = clusters(90)[0], torch.arange(90) // 40
    both(lambda m: lfm.build_graph(m(x), n_neighbors=9, batch=m(sets)))
    both(lambda m: lfm.knn(m(x), m(x[:40]), n_neighbors=3, batch=m(sets), batch_y=m(sets[:40].clone().fill_(2) - 2)))

    def parts(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=9)
        joined = lfm.Graph.batch([graph, graph])
        others = lfm.Graph.batch([graph, lfm.build_graph(m(x[:50]), n_neighbors=5)])
        graph.save(tmp_path / "graph.safetensors")
        loaded = lfm.Graph.load(tmp_path / "graph.safetensors").to(graph.weight.device)
        restored = lfm.Graph.from_scipy(graph.to_scipy()).to(graph.weight.device)
        numbers = [graph.degree, graph.component_labels, graph.n_components, graph.edge_index, others.component_labels]
        graphs = [joined, others, loaded, *joined.unbatch(), *others.unbatch(), graph.to(torch.float32)]
        return [*graphs, graph.update(m(x + 0.1)), restored.col, numbers]

    both(parts)


def test_sets_of_several_sizes() -> None:
    x, f = clusters(90)[1], draw(90, 3, seed=1)
    sets = torch.arange(90) // 40

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=9, batch=m(sets))
        found = [graph.n_components, graph.component_labels, graph.laplacian().quadratic_form(m(f))]
        found += [knn_graph(m(x), 5, batch=m(sets), loop=True), knn_graph(m(x[:, 0]), 4, cosine=False)]
        return [*found, lfm.knn(m(x), n_neighbors=9, memory_budget=0.5), lfm.knn(m(x.half()), n_neighbors=4)]

    both(run)


def test_neighbors_through_faiss() -> None:
    need("faiss")
    x = clusters(400)[1].float()
    both(lambda m: lfm.knn(m(x), n_neighbors=5, backend="faiss"))
    # approximate: the recall is measured
    assert lfm.knn(x.to("cuda"), n_neighbors=5, backend="faiss_hnsw").indices.is_cuda


@pytest.mark.parametrize("normalization", ["symmetric", "random_walk", "unnormalized"])
def test_laplacians(normalization: Any) -> None:
    x, f = clusters(90)[0], draw(90, 4, seed=1)

    def run(m: Move) -> Any:
        laplacian = lfm.build_graph(m(x), n_neighbors=9).laplacian(normalization)
        found = [laplacian.apply(m(f), m(f.cos()), a=0.5, b=0.3, c=2.0), laplacian.quadratic_form(m(f))]
        found += [laplacian.recurrence(m(f), [(0.5, 0.1, 0.0), (1.0, 0.2, -1.0)]), laplacian.to_dense()]
        found += [laplacian.T.apply(m(f)), laplacian.diagonal, laplacian.scalings]
        if normalization != "random_walk":
            found.append(laplacian.null_space(3))
        return [*found, laplacian.heat(m(f), time=0.7), laplacian.heat(m(f), time=[0.1, 3.0])]

    both(run)


def test_parts_of_sparse_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "sparse_csr_tensor", lambda *parts, **options: parts)  # what it is made of
    graph = lfm.build_graph(clusters(90)[1], n_neighbors=9)
    both(lambda m: graph.to(m(graph.weight).device).to_torch_csr()[:3])
    both(lambda m: graph.to(m(graph.weight).device).laplacian().to_torch_csr()[:3])


def test_functions_of_half_precision() -> None:
    x, f = clusters(90)[1].float(), draw(90, 4, seed=1)

    def run(m: Move) -> Any:
        laplacian = lfm.build_graph(m(x), n_neighbors=9).laplacian()
        functions = [m(f.to(dtype)) for dtype in (torch.float16, torch.bfloat16)]
        products = [laplacian.apply(half, half, c=1.0) for half in functions]
        assert [product.dtype for product in products] == [torch.float16, torch.bfloat16]
        steps = [laplacian.recurrence(half, [(0.5, 0.1, 0.0), (0.5, 0.2, -1.0)]).float() for half in functions]
        return [product.float() for product in products], steps

    both(run, atol=0.05)


def test_second_derivatives_of_a_laplacian() -> None:
    x, f = clusters(40)[1], draw(40, 2, seed=1)

    def run(m: Move) -> Any:
        graph, functions = lfm.build_graph(m(x), n_neighbors=7), m(f).requires_grad_()
        weight = graph.weight.clone().requires_grad_()
        image = dataclasses.replace(graph, weight=weight).laplacian() @ functions
        first = torch.autograd.grad(image.square().sum(), weight, create_graph=True)[0]
        return torch.autograd.grad(first.square().sum(), [weight, functions])

    both(run)


def test_gradients_of_a_laplacian() -> None:
    x, f = clusters(60)[0], draw(60, 3, seed=1)

    def run(m: Move) -> Any:
        points, functions = m(x).requires_grad_(), m(f).requires_grad_()
        laplacian = lfm.build_graph(points, n_neighbors=7).laplacian()
        value = laplacian.quadratic_form(functions).sum() + laplacian.heat(functions, time=0.5).square().sum()
        return torch.autograd.grad(value, [points, functions])

    both(run)


@pytest.mark.parametrize("solver", ["lobpcg", "krylov", "dense"])
@pytest.mark.parametrize("batch", [(), (2,)])
def test_bases(solver: Any, batch: tuple[int, ...]) -> None:
    x = clusters(140, *batch)[1]  # the first are as many components as pairs are asked for: no solver would run

    def run(m: Move) -> Any:
        basis = lfm.spectral_basis(lfm.build_graph(m(x), n_neighbors=10), n_basis=6, solver=solver)
        near = lfm.build_graph(m(x + 0.01 * x.cos()), n_neighbors=10)
        warm = lfm.spectral_basis(near, n_basis=6, solver=solver, warm_start=basis)
        return basis.evals, basis.evecs, basis.converged, basis.n_components, warm.evals, warm.evecs

    both(run)


def test_bases_chosen_for_a_gpu() -> None:
    """Other solvers than on the CPU: the values alone are compared."""
    x = clusters(700)[1].float()

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=15)
        basis = lfm.spectral_basis(graph, n_basis=6)
        assert basis.solver == ("lobpcg" if graph.weight.is_cuda else "krylov")
        near = lfm.build_graph(m(x + 0.001 * x.cos()), n_neighbors=15)
        return basis.evals, lfm.spectral_basis(near, n_basis=6, warm_start=basis).evals

    both(run, atol=2e-5)


@pytest.mark.parametrize("solver", ["lobpcg", "krylov", "dense"])
def test_bases_of_disconnected_graphs(solver: Any) -> None:
    x = draw(2, 130, 4) * 0.1
    x[0, :40] += 30
    x[1, :70, 0] -= 50

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=6, metric="euclidean")
        basis = lfm.spectral_basis(graph, n_basis=7, solver=solver)
        few = lfm.spectral_basis(graph, n_basis=1, solver=solver)
        return basis.evals, basis.n_components, few.evals, [part.evals for part in basis.unbatch()]

    both(run)


def test_a_generator_has_to_be_on_the_device_of_the_graph() -> None:
    graph = lfm.build_graph(clusters(140)[1].to("cuda"), n_neighbors=10)
    options: dict[str, Any] = {"n_basis": 6, "solver": "krylov"}
    assert lfm.spectral_basis(graph, generator=torch.Generator("cuda"), **options).evecs.is_cuda
    with pytest.raises(RuntimeError, match="generator"):
        lfm.spectral_basis(graph, generator=torch.Generator(), **options)


@pytest.mark.parametrize("solver", ["lobpcg", "krylov", "dense"])
def test_gradients_of_bases(solver: Any) -> None:
    x = clusters(120)[1]

    def run(m: Move) -> Any:
        points = m(x).requires_grad_()
        basis = lfm.spectral_basis(lfm.build_graph(points, n_neighbors=10), n_basis=5, solver=solver)
        value = basis.evals.sum() + basis.evecs.square().square().sum()
        return value, torch.autograd.grad(value, points)

    both(run)


def basis_of(x: Tensor, n_basis: int = 8) -> lfm.Basis:
    return lfm.spectral_basis(lfm.build_graph(x, n_neighbors=10), n_basis=n_basis)


def test_a_start_that_repeats_itself() -> None:
    x = clusters(140)[1]

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=10)
        basis = lfm.spectral_basis(graph, n_basis=6, solver="lobpcg")
        twice = dataclasses.replace(basis, evecs=basis.evecs[:, [0, 1, 1, 2, 3, 4]], guards=None)
        found = [lfm.spectral_basis(graph, n_basis=6, solver="lobpcg", warm_start=twice).evals]
        for first in ("lobpcg", "krylov"):  # refined from the pairs of either
            cold = lfm.spectral_basis(graph, n_basis=6, solver=first, tol=1e-8)  # type: ignore[arg-type]
            found.append(lfm.spectral_basis(graph, n_basis=6, solver="krylov", warm_start=cold).evals)
        return found

    both(run)


def test_what_a_basis_can_do(tmp_path: Path) -> None:
    x, f = clusters(120)[1], draw(120, 3, seed=2)

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=10)
        basis = lfm.spectral_basis(graph, n_basis=6)
        basis.save(tmp_path / "basis.safetensors")
        loaded = lfm.Basis.load(tmp_path / "basis.safetensors").to(graph.weight.device)
        other = dataclasses.replace(basis, evecs=-basis.evecs)
        aligned = [lfm.align_signs(other, basis), lfm.align_subspaces(other, basis)]
        new = basis.extend(m(x[:20] + 0.1), x=m(x), graph=graph)
        functions = [new, basis.project(m(f)), basis.reconstruct(basis.project(m(f)))]
        return (
            loaded,
            aligned,
            functions,
            basis.truncate(4),
            basis.to(torch.float32),
            repr(basis).replace("cuda:0", "cpu"),
        )

    both(run)


# ---- maps and what is read from them


@needs("scipy")
def test_maps(tmp_path: Path) -> None:
    x, y = clusters(100)
    f = draw(100, 12, seed=3)

    def run(m: Move) -> Any:
        bases = a, b = basis_of(m(x)), basis_of(m(y))
        fmap = lfm.functional_map(*bases, m(f), m(f))
        options = {"commutativity_weight": 0.1, "orthogonality_weight": 0.1, "tol": 1e-6}
        maps = [fmap, fmap.adjoint, lfm.functional_map(*bases, m(f), m(f), **options), lfm.paired_map(*bases)]
        fmap.save(tmp_path / "map.safetensors")
        maps.append(lfm.FunctionalMap.load(tmp_path / "map.safetensors").to(fmap.C.device))
        maps += [lfm.zoomout(lfm.functional_map(a.truncate(4), b.truncate(4), m(f), m(f)), *bases, n_basis=8, step=2)]
        maps += [lfm.icp(fmap, *bases), lfm.sinkhorn_map(fmap, *bases)]
        points = [lfm.pointwise_map(fmap, *bases, bijective=bijective) for bijective in (False, True)]
        points += [lfm.pointwise_map(fmap, *bases, direction="xy"), lfm.pointwise_map(fmap, *bases, adjoint=True)]
        points += [agreeing_pairs(points[2], points[0]), mutual_pairs(m(x), m(x + 0.01))]
        read = [lfm.lfm_similarity(fmap), lfm.lfm_similarity(fmap, symmetric=True, centered=True, squared=False)]
        read += [lfm.subspace_overlap(fmap), lfm.heat_overlap(fmap), lfm.shape_difference(fmap)]
        read += [lfm.shape_difference(fmap, kind="conformal"), fmap.transfer(m(f), *bases)]
        return maps, points, read, repr(fmap).replace("cuda:0", "cpu")

    both(run, atol=1e-4)


def test_maps_of_batches_and_their_gradients() -> None:
    x, y = clusters(60, 2)
    f, g = draw(2, 60, 12, seed=3), draw(2, 60, 12, seed=4)

    def run(m: Move) -> Any:
        bases = basis_of(m(x), 5), basis_of(m(y), 5)
        functions = m(f).requires_grad_()
        fmap = lfm.functional_map(*bases, functions, m(g), orthogonality_weight=0.1, tol=1e-6)
        return fmap.C, torch.autograd.grad(fmap.C.square().sum(), functions)

    both(run, atol=1e-4)


def test_weights_of_maps_and_a_loss_with_descriptors() -> None:
    x, y = (points.flip(0) for points in clusters(60))
    rows = torch.arange(0, 60, 5)

    def run(m: Move) -> Any:
        functions = [descriptors.anchor_distances(m(points), m(rows)) for points in (x, y)]
        given = (*(basis_of(m(points), 6) for points in (x, y)), *functions)
        chosen = choose_weights(*given, m(torch.stack([rows, rows], 1)), n_folds=3)
        points = m(y.clone()).requires_grad_()
        loss = LFMAlignmentLoss(n_basis=6, n_neighbors=10, reading="lfm")(points, m(x), descriptors=tuple(functions))  # type: ignore[arg-type]
        return chosen.weights, loss, torch.autograd.grad(loss, points)

    both(run, atol=1e-4)


def test_figures() -> None:
    need("matplotlib")
    from lfm_torch.report import plots

    x, y = (basis_of(points.to("cuda")) for points in clusters(60))
    fmap = lfm.paired_map(x, y)
    labels = torch.arange(60) % 6
    plots.map_figure({"map": fmap})
    plots.spectrum_figure({"x": x, "y": y})
    plots.distortion_figure(lfm.distortion(fmap, y), points=x.evecs[:, 1:3], labels=labels.to("cuda"))


def test_consistent_maps_and_couplings() -> None:
    x, y = clusters(60)

    def run(m: Move) -> Any:
        bases = [basis_of(m(points), 6) for points in (x, y, x.cos())]
        maps = {(i, j): lfm.paired_map(bases[i], bases[j]) for i in range(3) for j in range(3) if i != j}
        kernels = [(m(points) @ m(points).mT)[:20, :20] for points in (x, y)]
        return consistent_maps(maps).spectrum, gromov_wasserstein(*kernels)

    both(run, atol=1e-4)


def test_heat_of_probes() -> None:
    x, y = clusters(90)
    laplacian = lambda points: lfm.build_graph(points, n_neighbors=9).laplacian()  # noqa: E731
    both(lambda m: lfm.heat_overlap_probes(laplacian(m(x)), laplacian(m(y)), n_probes=8))


def test_all_measures() -> None:
    x, y = clusters(110)
    both(lambda m: lfm.similarity(m(x), m(y), n_neighbors=15, n_basis=6, measures=tuple(MEASURES)))
    both(lambda m: lfm.similarity(m(x.float()), m(y.float()), n_neighbors=15, n_basis=6), atol=1e-4)


def test_baselines() -> None:
    x, y = clusters(80)

    def run(m: Move) -> Any:
        pair = m(x), m(y)
        cka = baselines.MinibatchCKA()
        cka.update(*pair)
        streamed = cka.compute()
        anchors = [baselines.relative_representation(pair[0], m(torch.arange(9)))]
        anchors.append(baselines.relative_similarity(*pair, anchors=m(torch.arange(9))))
        kinds = [baselines.procrustes(*pair, kind="angular"), baselines.mutual_knn(*pair), baselines.svcca(*pair)]
        kinds += [
            baselines.rsa(*pair, dissimilarity=dissimilarity, comparison=comparison)  # type: ignore[arg-type]
            for dissimilarity in ("euclidean", "correlation")
            for comparison in ("spearman", "pearson")
        ]
        return streamed, anchors, kinds, baselines.minibatch_cka(*pair, batch_size=30)

    both(run)


def test_significance_and_sensitivity() -> None:
    x, y = clusters(80)
    settings: dict[str, Any] = {"measures": ("lfm", "heat", "linear_cka", "rsa"), "n_neighbors": 10}

    def found(m: Move) -> Any:
        return lfm.significance(m(x), m(y), n_permutations=12, n_splits=3, n_basis=6, **settings)

    wanted, got = found(lambda x: x), found(lambda x: x.to("cuda"))
    for name, value in wanted.items():
        for field in dataclasses.fields(value):
            one, other = (torch.as_tensor(getattr(s, field.name)).cpu() for s in (got[name], value))
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    ranges: dict[str, Any] = {"n_samples": (60, 80), "n_neighbors": (8, 10), "n_basis": (5, 6)}
    one, other = (lfm.sensitivity(m(x), m(y), **ranges) for m in (lambda x: x.to("cuda"), lambda x: x))
    assert repr(one) == repr(other)


def test_distortion() -> None:
    x, y = clusters(80)
    labels = torch.arange(80) % 6

    def run(m: Move) -> Any:
        a, b = basis_of(m(x)), basis_of(m(y))
        found = lfm.distortion(lfm.paired_map(a, b), b)
        mask = m(labels == 2)
        return found.per_sample, found.per_class(m(labels)), found.worst(5), found.share(mask), found.auc(mask)

    both(run)


# ---- numbers of rows, labels and times from the CPU


def test_row_numbers_may_come_from_the_cpu() -> None:
    x, y = clusters(80)
    rows, labels, times = torch.arange(0, 80, 9), torch.arange(80) % 6, torch.tensor([1.0, 2.0])
    pairs = torch.stack([rows, rows], 1)

    def run(m: Move) -> Any:
        a, b = m(x), m(y)
        laplacian, basis = lfm.build_graph(a).laplacian(), basis_of(a)
        found = [descriptors.anchor_distances(a, rows), descriptors.geodesic_distances(a, rows)]
        found += [descriptors.label_indicators(labels, basis=basis, dtype=torch.float64)]
        found += [descriptors.heat_diffusion(source, rows, times=times) for source in (basis, laplacian)]
        found += [descriptors.wave_kernel_signature(basis, landmarks=rows.numpy())]
        found += [lfm.mean_reciprocal_rank(a, b, targets=labels), relative_representations(a, rows)]
        found += [baselines.relative_representation(a, rows), baselines.relative_similarity(a, b, anchors=rows)]
        found += [lfm.fit_translator(a, b, pairs=pairs, weights=1.0 + rows)]
        found += [lfm.align(a, a, anchors=pairs, labels=(labels, labels)).idx_yx]
        lost, mask = lfm.distortion(a, b, n_basis=6), labels == 2
        return found, lost.per_class(labels), lost.share(mask), lost.auc(mask.numpy())

    both(run)


def test_samples_that_are_not_finite() -> None:
    x, y = clusters(80)
    x[3], y[[5, 70], 2] = torch.nan, torch.inf
    with pytest.warns(lfm.LFMWarning, match=r"3 of 80 samples .* x \(row 3\), y \(row 5, 70\)"):
        both(lambda m: lfm.similarity(m(x), m(y), nonfinite="drop"))
    with pytest.warns(lfm.LFMWarning, match="3 of 80 samples"):
        found, wanted = (
            lfm.compare({"x": p, "y": q}, nonfinite="drop") for p, q in ((x.to("cuda"), y.to("cuda")), (x, y))
        )
    torch.testing.assert_close(found.matrix("heat"), wanted.matrix("heat"), atol=1e-5, rtol=0)


# ---- alignment and translation


@pytest.mark.parametrize("method", ["auto", "descriptors", "coupling"])
def test_alignments(method: Any) -> None:
    x = draw(90, 5)
    order = torch.randperm(90, generator=torch.Generator().manual_seed(1))
    few = torch.stack([order[:10], torch.arange(10)], 1)
    y = (x @ torch.linalg.qr(draw(5, 5, seed=2)).Q)[order]
    anchors = torch.stack([order[:6], torch.arange(6)], 1)
    labels = torch.arange(90) // 15

    def run(m: Move) -> Any:
        known: list[dict[str, Any]] = [{"anchors": m(anchors)}, {"labels": (m(labels), m(labels[order]))}]
        known += [{"descriptors": (m(x[:, :2]), m(x[order, :2]))}]
        known += [{"anchors": m(few)}, *([] if method == "descriptors" else [{}])]
        found = [lfm.align(m(x), m(y), method=method, **given) for given in known]
        return [[one.idx_yx, one.idx_xy, one.pairs, one.translator, one.fmap] for one in found]

    both(run, atol=1e-4)


@pytest.mark.parametrize("kind", ["orthogonal", "linear", "affine", "ridge"])
@pytest.mark.parametrize("robust", [False, True])
def test_translators(kind: Any, robust: bool, tmp_path: Path) -> None:
    x, y = clusters(80)
    pairs = torch.stack([torch.arange(40), torch.arange(40)], 1)

    def run(m: Move) -> Any:
        translators = [fit(m(x), m(y), kind=kind, robust=robust, **given) for given in ({}, {"pairs": m(pairs)})]
        translators.append(fit(m(x), m(y), kind=kind, weights=m(draw(80, seed=5).square())))
        translators[0].save(tmp_path / "t.safetensors")
        loaded = Translator.load(tmp_path / "t.safetensors").to(translators[0].matrix.device)
        return translators, loaded, loaded(m(x)), loaded.inverse()(m(y))

    fit = lfm.fit_translator
    both(run)


def test_stitched_models_and_retrieval() -> None:
    x, y = clusters(80)
    encoder, head = nn.Linear(6, 6).double(), nn.Linear(6, 3).double()
    targets = torch.arange(80).flip(0)

    def run(m: Move) -> Any:
        model = lfm.stitch(encoder, head, lfm.fit_translator(x, y)).to(m(x).device)
        translated = model(m(x))
        model.cpu()
        ranks = [lfm.mean_reciprocal_rank(m(x), m(y)), lfm.mean_reciprocal_rank(m(x), m(y), targets=m(targets))]
        return translated, ranks, retrieve(m(x), m(y), n_neighbors=4), relative_representations(m(x), m(targets[:7]))

    both(run)


# ---- descriptors


def test_descriptors() -> None:
    x, labels, anchors = clusters(90)[0], torch.arange(90) % 6, torch.tensor([3, 40, 77])

    def run(m: Move) -> Any:
        graph = lfm.build_graph(m(x), n_neighbors=9)
        basis, at = lfm.spectral_basis(graph, n_basis=7), m(anchors)
        found = [descriptors.anchor_distances(m(x), at, kernel=kernel) for kernel in (False, True)]
        found += [descriptors.geodesic_distances(m(x), at, n_neighbors=9), descriptors.farthest_points(m(x), 5)]
        found += [descriptors.label_indicators(m(labels), classes=classes) for classes in (None, torch.arange(3))]
        found.append(descriptors.label_indicators(m(labels), basis=basis, dtype=torch.float64))
        for source in (basis, graph.laplacian()):
            times = None if source is basis else m(torch.tensor([0.5, 2.0], dtype=torch.float64))
            found.append(descriptors.heat_diffusion(source, at, times=times))
        found += [descriptors.heat_times(basis), descriptors.normalize(m(draw(90, 3)), basis)]
        for landmarks in (None, at):
            found.append(descriptors.heat_kernel_signature(basis, landmarks=landmarks))
            found.append(descriptors.wave_kernel_signature(basis, landmarks=landmarks))
        return found

    both(run)


# ---- networks


class Network(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 8), nn.Dropout(0.3))
        self.append(nn.Linear(8, 3))


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.mix = nn.Embedding(30, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.mix(self.words(input_ids), src_key_padding_mask=attention_mask == 0)


def test_extraction(tmp_path: Path) -> None:
    x = draw(90, 6, dtype=torch.float32)
    model, images = Network().eval(), nn.Sequential(nn.Conv2d(2, 5, 3), nn.ReLU())

    def run(m: Move) -> Any:
        moved, pictures = model.to(m(x).device), images.to(m(x).device)
        found = [lfm.extract(moved, m(x), layers=["0", "3"], batch_size=32, store=m(x).device)]
        found.append(lfm.extract(moved, x.split(40), layers=["3"], store=m(x).device, dtype=torch.float64))
        space = draw(10, 2, 7, 7, dtype=torch.float32)
        options: dict[str, Any] = {"layers": ["0"], "store": m(x).device}
        return [*found, *(lfm.extract(pictures, m(space), pooling=how, **options) for how in ("mean", "flatten"))]  # type: ignore[arg-type]

    both(run)
    moved = lfm.extract(model.cpu(), x, layers=["0"], device="cuda", store="cpu")
    assert type(moved["0"]) is Tensor
    assert next(model.parameters()).device.type == "cpu"
    kept = lfm.extract(model, x, layers=["0"], device="cuda", store=tmp_path / "kept")
    torch.testing.assert_close(kept["0"], moved["0"])


@pytest.mark.parametrize("pooling", ["mean", "cls", "last"])
def test_extraction_of_tokens(pooling: Any) -> None:
    words, mask = torch.arange(36).view(6, 6) % 30, torch.ones(6, 6, dtype=torch.int64).tril(2)
    model = Words().eval()

    def run(m: Move) -> Any:
        data = {"input_ids": words, "attention_mask": mask}
        moved = model.to(m(words).device)
        return lfm.extract(moved, data, layers=["mix"], pooling=pooling, batch_size=4, store=m(words).device)

    both(run)


@needs("matplotlib")
@pytest.mark.parametrize(("background", "reference"), [(False, "previous"), (True, "initial"), (None, "previous")])
def test_monitor(background: bool | None, reference: str, tmp_path: Path) -> None:
    probe = draw(80, 6, seed=7, dtype=torch.float32)

    def run(m: Move) -> Any:
        torch.manual_seed(0)
        model = Network().to(m(probe).device)
        options: dict[str, Any] = {"layers": ["0", "3"], "n_basis": 8, "reference": reference, "directory": tmp_path}
        options["measures"] = ("heat", "linear_cka")
        monitor = Monitor(model, m(probe), background=background, **options)
        for step in range(3):
            monitor.measure(step=step)
            with torch.no_grad():
                for weight in model.parameters():
                    weight += 0.1 * weight.sin()
        monitor.flush()
        again = Monitor(model, m(probe), background=False, **options)
        again.load_state_dict(monitor.state_dict())
        again.measure(step=7)
        matrix = again.layer_matrix("heat")
        assert matrix is not None
        assert matrix.shape == (2, 2)
        again.save()
        return [(point.scores, point.failures) for point in again.history], again.chance

    both(run, atol=1e-3)


def test_comparison() -> None:
    points = {f"m{k}": {"a": draw(70, 5, seed=k), "b": draw(70, 6, seed=9) + 0.1 * k} for k in range(3)}
    every = tuple(MEASURES)

    def run(m: Move) -> lfm.Comparison:
        moved = {name: {layer: m(x) for layer, x in layers.items()} for name, layers in points.items()}
        return lfm.compare(moved, measures=every, n_neighbors=10, n_basis=6)

    wanted, got = run(lambda x: x), run(lambda x: x.to("cuda"))
    for measure in every:
        torch.testing.assert_close(got.matrix(measure), wanted.matrix(measure), atol=1e-5, rtol=1e-5)


def test_comparison_of_models() -> None:
    networks = {str(width): nn.Sequential(nn.Linear(6, width), nn.Tanh()) for width in (5, 9)}
    found = [
        lfm.compare(Models(networks, draw(70, 6, dtype=torch.float32), layers="1", device=device), n_basis=6)
        for device in ("cpu", "cuda")
    ]
    for measure in found[0].measures:
        torch.testing.assert_close(found[1].matrix(measure), found[0].matrix(measure), atol=1e-4, rtol=0)


def test_torchmetrics() -> None:
    need("torchmetrics")
    from lfm_torch.integrations.torchmetrics import LFMSimilarity

    x, y = clusters(80)

    def run(m: Move) -> Any:
        metric = LFMSimilarity(["heat", "linear_cka"], n_basis=8).to(m(x).device)
        for part in torch.arange(80).split(40):
            metric.update(m(x[part]), m(y[part]))
        return metric.compute()

    both(run)


def test_comparison_of_checkpoints(tmp_path: Path) -> None:
    model, probe = Network(), draw(70, 6, dtype=torch.float32)
    for k in range(3):
        torch.manual_seed(k)
        torch.save(Network().state_dict(), tmp_path / f"{k}.pt")
    found = []
    for device in ("cpu", "cuda"):
        checkpoints = lfm.Checkpoints(sorted(tmp_path.glob("*.pt")), model, probe, layers=["0", "3"], device=device)
        found.append(lfm.compare(checkpoints, n_neighbors=10, n_basis=6))
    for measure in found[0].measures:
        torch.testing.assert_close(found[1].matrix(measure), found[0].matrix(measure), atol=1e-4, rtol=0)


def test_without_room_on_the_gpu_the_cpu_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {f"m{k}": draw(70, 5, seed=k) for k in range(3)}
    moved = {name: x.to("cuda") for name, x in points.items()}
    options: dict[str, Any] = {"measures": ("heat", "rbf_cka", "rsa"), "n_neighbors": 10, "n_basis": 6}
    wanted = lfm.compare(points, **options)
    whole, values = bases.representation_basis, pieces._block_values

    def no_basis(x: Tensor, **options: Any) -> lfm.Basis:
        if x.is_cuda:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(x, **options)

    def no_values(job: Any, task: Any) -> Any:
        if job.device != "cpu":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values(job, task)

    def no_batch(graph: Any, **options: Any) -> lfm.Basis:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(pieces, "_block_values", no_values)
    for missing in ((), (no_basis, no_batch)):
        if missing:
            monkeypatch.setattr(bases, "representation_basis", missing[0])
            monkeypatch.setattr(bases, "spectral_basis", missing[1])
        got = lfm.compare(moved, **options)
        for measure in got.measures:
            torch.testing.assert_close(got.matrix(measure), wanted.matrix(measure), atol=1e-5, rtol=1e-5)


NETWORK = """
import torch

def network():
    return torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))

def probe():
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(0))
"""


@needs(*CLI)
def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "pretended.py").write_text(NETWORK)
    for k in range(2):
        torch.manual_seed(k)
        torch.save(nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).state_dict(), f"{k}.pt")
    given = ["--model", "pretended:network", "--data", "pretended:probe", "--layers", "0", "2", "--device"]
    small = ["--n-neighbors", "8", "--n-basis", "5"]
    for device in ("cpu", "cuda"):
        assert main(["compare", "0.pt", "1.pt", *given, device, *small, "--out", device, "--store", f"c{device}"]) == 0
        assert main(["compare", "0.pt", "1.pt", *given, device, *small, "--store", f"d{device}", "--dry-run"]) == 0
        assert main(["extract", "0.pt", *given, device, "--out", f"{device}.npz"]) == 0
    with np.load("cpu.npz") as wanted, np.load("cuda.npz") as got:
        assert set(wanted) == set(got)
        for name in wanted:
            np.testing.assert_allclose(got[name], wanted[name], atol=1e-6)
    capsys.readouterr()


def test_build_info() -> None:
    assert lfm.build_info().cuda_devices == ("Pretended (9.0)",)
