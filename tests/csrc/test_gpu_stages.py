"""The stages above the operators on a GPU, against float64 on the CPU, and sizes that need 64-bit offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import test_cuda_library as cuda
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.losses import DirichletAlignmentLoss, LFMAlignmentLoss
from lfm_torch.ops import OPERATORS

DEVICE = cuda.DEVICE
fresh, poison = cuda.fresh, cuda.poison  # the fixtures of the operators' tests


def spaces(fresh: torch.Generator, n: int, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Two views of six clusters, with a gap after six eigenvalues, so that answers do not hang on rounding.

    In the first the clusters are components of the graph, whose vectors are known; only the second, in which they
    touch, has a solver do something.
    """
    z = 0.3 * torch.randn(*batch, n, 6, generator=fresh) + 3 * torch.eye(6)[torch.arange(n) % 6]
    x = z @ torch.linalg.qr(torch.randn(6, 6, generator=fresh)).Q
    return x, (z + 0.2 * torch.randn(*batch, n, 6, generator=fresh)).tanh()


@cuda.on_gpu
@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("solver", ["auto", "lobpcg", "krylov", "dense"])
@pytest.mark.parametrize("n_basis", [6, 11])
def test_spectral_basis(fresh: torch.Generator, dtype: torch.dtype, solver: str, n_basis: int) -> None:
    for batch, n in (((), 301), ((1,), 130), ((3,), 257), ((), 700)):
        for view, x in enumerate(spaces(fresh, n, batch)):
            graph = lfm.build_graph(x.to(DEVICE, dtype), n_neighbors=15)
            basis = lfm.spectral_basis(graph, n_basis=n_basis, solver=solver)  # type: ignore[arg-type]
            if solver in ("lobpcg", "krylov") and (view == 1 or n_basis > 6):
                assert basis.iterations > 0
            check_basis(graph, basis, n_basis, 1e-5 if dtype == torch.float32 else 1e-8)


def check_basis(graph: lfm.Graph, basis: lfm.Basis, m: int, tol: float) -> None:
    """Eigenvalues, residuals and orthonormality against a dense float64 decomposition on the CPU."""
    L = graph.to("cpu").to(torch.float64).laplacian().to_dense()
    wanted = torch.linalg.eigvalsh(L)[..., :m]
    evals, evecs = basis.evals.double().cpu(), basis.evecs.double().cpu()
    torch.testing.assert_close(evals, wanted, atol=tol, rtol=0)
    residual = (L @ evecs - evecs * evals.unsqueeze(-2)).norm(dim=-2)
    assert float(residual.max()) < 10 * tol
    identity = torch.eye(m, dtype=torch.float64).expand(*evals.shape[:-1], m, m)
    torch.testing.assert_close(evecs.mT @ evecs, identity, atol=10 * tol, rtol=0)


@cuda.on_gpu
@pytest.mark.parametrize("batch", [(), (1,), (4,)])
def test_similarity(fresh: torch.Generator, batch: tuple[int, ...]) -> None:
    x, y = spaces(fresh, 203, batch)
    options: Any = {"n_neighbors": 15, "n_basis": 6, "measures": ("lfm", "overlap", "heat", "linear_cka")}
    got = lfm.similarity(x.to(DEVICE), y.to(DEVICE), batched=bool(batch), **options)
    wanted = lfm.similarity(x.double(), y.double(), batched=bool(batch), **options)
    for name, value in wanted.items():
        assert got[name].device.type == DEVICE.type
        torch.testing.assert_close(got[name].double().cpu(), value, atol=1e-3, rtol=0, msg=name)


@cuda.on_gpu
@pytest.mark.parametrize("make", [LFMAlignmentLoss, DirichletAlignmentLoss])
def test_losses_and_their_gradients(
    fresh: torch.Generator, make: Callable[..., LFMAlignmentLoss | DirichletAlignmentLoss]
) -> None:
    (_, points), (_, target) = (spaces(fresh, 120) for _ in range(2))
    values, gradients = [], []
    for device, dtype in ((torch.device("cpu"), torch.float64), (DEVICE, torch.float64), (DEVICE, torch.float32)):
        x = points.to(device, dtype).requires_grad_()
        value = make(n_basis=6, n_neighbors=12)(x, target.to(device, dtype))
        gradients.append(torch.autograd.grad(value, x)[0].double().cpu())
        values.append(value.detach().double().cpu())
    largest = float(gradients[0].abs().max())
    for value, gradient, tol in zip(values[1:], gradients[1:], (1e-6, 2e-2), strict=True):
        torch.testing.assert_close(value, values[0], atol=tol, rtol=tol)
        torch.testing.assert_close(gradient, gradients[0], atol=tol * largest, rtol=0)


@cuda.on_gpu
@pytest.mark.parametrize("count", [0, 3])
def test_align(fresh: torch.Generator, count: int) -> None:
    x = torch.randn(300, 8, generator=fresh)
    order = torch.randperm(300, generator=fresh)
    y = (x @ torch.linalg.qr(torch.randn(8, 8, generator=fresh)).Q + 2)[order]
    anchors = torch.stack([order[:count], torch.arange(count)], 1).to(DEVICE) if count else None
    alignment = lfm.align(x.to(DEVICE), y.to(DEVICE), anchors=anchors)
    assert torch.equal(alignment.idx_yx.cpu(), order)
    torch.testing.assert_close(alignment.translator(x.to(DEVICE)).cpu()[order], y, atol=1e-3, rtol=0)


@cuda.on_gpu
def test_heat_and_inputs_that_are_not_contiguous(fresh: torch.Generator) -> None:
    x = torch.randn(140, 14, generator=fresh, dtype=torch.float64)
    wide = x.to(DEVICE).repeat_interleave(2, 1)
    laplacian = lfm.build_graph(wide[:, ::2], n_neighbors=9).laplacian()
    functions = torch.randn(5, 140, generator=fresh, dtype=torch.float64)
    got = laplacian.heat(functions.to(DEVICE).mT, time=0.7).cpu()
    dense = lfm.build_graph(x, n_neighbors=9).laplacian().to_dense()
    torch.testing.assert_close(
        got.view(140, 5), torch.linalg.matrix_exp(-0.7 * dense) @ functions.mT, atol=1e-4, rtol=0
    )


@cuda.on_gpu_alone
@cuda.on_gpu
def test_a_stage_runs_on_the_current_stream(fresh: torch.Generator) -> None:
    x, y = (points.to(DEVICE) for points in spaces(fresh, 400))
    wanted = lfm.similarity(x, y, n_basis=6)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(20_000_000)
        got = lfm.similarity(x + 0, y + 0, n_basis=6)
    stream.synchronize()
    for name, value in wanted.items():
        assert torch.equal(got[name], value), name


def need_gigabytes(count: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 1e9
    if free < count:
        pytest.skip(f"needs {count} GB of GPU memory, {free:.0f} are free")


@cuda.on_gpu_alone
@cuda.on_gpu
class TestMoreThan2To31Elements:
    """The last rows, where an offset of 32 bits would have wrapped around."""

    def test_product(self, fresh: torch.Generator) -> None:
        need_gigabytes(16)
        n, m = (1 << 20) + 3, 2056  # a ring
        node = torch.arange(n, device=DEVICE)
        col = torch.stack([(node - 1) % n, (node + 1) % n], 1).sort(1).values.flatten().int()
        x = torch.randint(-8, 8, (n, m), device=DEVICE, dtype=torch.float16)  # sums of these are exact
        ones = torch.ones(n, device=DEVICE)
        args = (torch.arange(0, 2 * n + 1, 2, device=DEVICE), col, torch.ones(2 * n, device=DEVICE), ones, ones, ones)
        y = OPERATORS["laplacian_product"].compiled(*args, x, None, 1.0, 0.0, 0.0)
        for row in (-1, -2, -1000):
            assert torch.equal(y[row], x[row] - x[row - 1] - x[(row + 1) % n if row != -1 else 0])

    def test_knn(self, fresh: torch.Generator) -> None:
        need_gigabytes(32)
        m, d = (1 << 20) + 5, 2056
        database = torch.randn(1, m, d, device=DEVICE)
        wanted = torch.tensor([m - 1, 0, m - 77, m // 2], device=DEVICE)
        indices, distances = OPERATORS["knn"].compiled(database[:, wanted].contiguous(), database, 1, "euclidean")
        assert torch.equal(indices.flatten(), wanted)
        assert bool((distances == 0).all())

    def test_map_energies(self, fresh: torch.Generator) -> None:
        need_gigabytes(16)
        a, b, m = 5800, 150, 50
        C = torch.randn(a, m, b, m, device=DEVICE)
        factors = [torch.randn(*shape, device=DEVICE) for shape in ((1, b, m), (a, 1, m)) * 2]
        got = OPERATORS["map_energies"].compiled(C, *factors, 1)[-1, -1]
        last = (C[-1:, :, -1:], factors[0][:, -1:], factors[1][-1:], factors[2][:, -1:], factors[3][-1:])
        (wanted,) = cuda.twin_in_float64("map_energies", *(part.cpu() for part in last), 1)
        torch.testing.assert_close(got.cpu().double(), wanted.flatten(), rtol=1e-4, atol=1e-2)

    def test_geodesics(self, fresh: torch.Generator) -> None:
        need_gigabytes(16)
        n, p = (1 << 20) + 1, 2056  # without edges: a source reaches itself
        none = torch.zeros(0, device=DEVICE)
        sources = torch.arange(n - p, n, device=DEVICE).unsqueeze(0)
        rowptr = torch.zeros(n + 1, dtype=torch.int64, device=DEVICE)
        distances = OPERATORS["geodesics"].compiled(rowptr, none.int(), none, sources)
        wanted = torch.full((p, p), torch.inf, device=DEVICE).fill_diagonal_(0)
        assert torch.equal(distances[0, -p:], wanted)
        assert bool(distances[0, : n - p].isinf().all())
