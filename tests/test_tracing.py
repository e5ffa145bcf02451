"""Programs that are traced: torch.compile without a graph break, torch.export, and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import lfm_torch as lfm
from lfm_torch.graphs import sets
from lfm_torch.integrations import pyg
from lfm_torch.spectral import traced

N = 50
Function = Callable[[Tensor, Tensor], Any]

pytestmark = pytest.mark.filterwarnings("ignore:.*rows.* are zero")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def points() -> Tensor:
    """A space with a dead sample, whose place may not depend on being looked at."""
    x = randn(N, 5)
    x[3] = 0
    return x


SETS = torch.tensor([0] * 20 + [1] * 3 + [2] * (N - 23))
TARGET = randn(N, 7, seed=1).tanh()
# two components: which eigenvector of 0 comes first is then a choice
APART = torch.cat([randn(N // 2, 5), randn(N - N // 2, 5, seed=2) + 100])

# name: the function of points and one more tensor, and that tensor
WITHOUT_GRADIENT: dict[str, tuple[Function, Tensor]] = {
    "knn": (lambda x, y: tuple(lfm.knn(x, y, n_neighbors=4)), randn(20, 5, seed=3)),
    "knn of sets": (lambda x, sets: tuple(lfm.knn(x, n_neighbors=4, metric="angular", batch=sets)), SETS),
    "pyg.knn_graph": (lambda x, _: pyg.knn_graph(x, 4, loop=True), SETS),
    "pyg.knn_graph of sets": (lambda x, sets: pyg.knn_graph(x, 4, sets, cosine=True), SETS),
}
WITH_GRADIENT: dict[str, tuple[Function, Tensor]] = {
    "knn": (lambda x, y: lfm.knn(x, y, n_neighbors=4, metric="cosine").distances, randn(20, 5, seed=3)),
    "build_graph": (lambda x, _: lfm.build_graph(x).weight.square(), SETS),
    "build_graph of sets": (lambda x, sets: lfm.build_graph(x, n_neighbors=2, batch=sets).weight.square(), SETS),
    "Dirichlet": (lambda x, target: lfm.losses.DirichletAlignmentLoss(n_basis=6)(x, target), TARGET),
    "LFM": (
        lambda x, y: lfm.losses.LFMAlignmentLoss(n_basis=6, n_neighbors=5, metric="euclidean", reading="lfm")(x + y, x),
        APART,
    ),
}


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()


def compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def with_gradient(function: Function, other: Tensor) -> tuple[Tensor, Tensor]:
    x = points().requires_grad_()
    value = function(x, other)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    return value.detach(), gradient


@pytest.mark.parametrize("name", WITHOUT_GRADIENT)
def test_compiled_without_a_break(name: str) -> None:
    function, other = WITHOUT_GRADIENT[name]
    torch.testing.assert_close(compiled(function)(points(), other), function(points(), other), atol=0, rtol=0)


@pytest.mark.parametrize("name", WITH_GRADIENT)
def test_compiled_with_its_gradient(name: str) -> None:
    function, other = WITH_GRADIENT[name]
    found, wanted = with_gradient(compiled(function), other), with_gradient(function, other)
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-5)


def test_one_program_for_batches_of_any_size() -> None:
    anyhow = compiled(lambda x: lfm.build_graph(x).weight, dynamic=True)
    for n in (N, 40, 30):
        x = randn(n, 5)
        torch.testing.assert_close(anyhow(x), lfm.build_graph(x).weight, atol=0, rtol=0)


def test_compiled_inside_autocast() -> None:
    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            basis = lfm.spectral_basis(lfm.build_graph(x), n_basis=4)
            return lfm.paired_map(basis, basis).C

    x = randn(N, 5)
    torch.testing.assert_close(compiled(step)(x), step(x), atol=1e-6, rtol=1e-5)


class Calling(nn.Module):
    """A function as torch.export takes it."""

    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor, other: Tensor) -> Any:
        return self.function(x, other)


@pytest.mark.parametrize("name", [*WITHOUT_GRADIENT, "build_graph"])
def test_exported(name: str) -> None:
    function, other = (WITH_GRADIENT | WITHOUT_GRADIENT)[name]
    exported = torch.export.export(Calling(function), (points(), other)).module()
    torch.testing.assert_close(exported(points(), other), function(points(), other), atol=0, rtol=0)


@pytest.mark.parametrize("name", [*WITHOUT_GRADIENT, *WITH_GRADIENT])
def test_fake_tensors_have_the_sizes_of_real_ones(name: str) -> None:
    function, other = (WITH_GRADIENT | WITHOUT_GRADIENT)[name]
    real = function(points(), other)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fake = function(*(mode.from_tensor(x, static_shapes=True) for x in (points(), other)))
    for a, b in zip(*((value,) if isinstance(value, Tensor) else value for value in (fake, real)), strict=True):
        assert isinstance(a, FakeTensor)
        assert (a.dtype, a.device, a.dim()) == (b.dtype, b.device, b.dim())
        # how many edges there are is a matter of the values
        sizes = zip(a.shape, b.shape, strict=True)
        assert all(not isinstance(size, int) or size == wanted for size, wanted in sizes)


def test_on_the_meta_device() -> None:
    indices, distances = lfm.knn(randn(N, 5).to("meta"), n_neighbors=4, metric="angular")
    assert (indices.shape, distances.shape) == ((N, 4), (N, 4))


def test_what_cannot_be_known_is_refused() -> None:
    warm = lfm.spectral_basis(lfm.build_graph(randn(N, 5)), n_basis=4)
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        x, sets = mode.from_tensor(randn(N, 5), static_shapes=True), mode.from_tensor(SETS, static_shapes=True)
        with pytest.raises(ValueError, match=r"n_neighbors must be given with batch where torch\.compile"):
            lfm.build_graph(x, batch=sets)
        with pytest.raises(ValueError, match=r"warm_start and generator must be None where torch\.compile"):
            lfm.spectral_basis(lfm.build_graph(x), n_basis=4, warm_start=warm)
        with pytest.raises(ValueError, match=r"memory_budget must be a number of bytes where torch\.compile"):
            lfm.knn(x, n_neighbors=4, memory_budget=0.5)


def test_what_the_solver_has_to_say_comes_when_it_runs() -> None:
    few = compiled(lambda x: lfm.spectral_basis(lfm.build_graph(x), n_basis=4, solver="lobpcg", max_iterations=1).evals)
    with pytest.warns(lfm.LFMWarning, match=r"spectral_basis: .* eigenpairs did not reach"):
        few(randn(300, 5))


def test_opcheck_of_the_operators_of_traced_programs() -> None:
    graph = lfm.build_graph(randn(N, 5).double())
    matrix = (graph.rowptr, graph.col, graph.weight.requires_grad_(), N, [], "symmetric")
    torch.library.opcheck(traced._basis, (*matrix, 5, "auto", 1e-8, None, True))
    torch.library.opcheck(sets._traced_offsets, (SETS, N, "batch"))
