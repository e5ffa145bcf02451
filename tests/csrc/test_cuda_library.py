"""The CUDA kernels: that the library registers all of them (no GPU needed), and what they compute (marked gpu)."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
from oracles import TOLERANCES
from torch import Tensor

import lfm_torch
from lfm_torch.ops import OPERATORS
from lfm_torch.ops.graphs import SYMMETRIZATIONS
from lfm_torch.ops.knn import METRICS

# "cpu" rehearses the tests without a GPU, on the CPU's kernels: that they themselves are right
DEVICE = torch.device(os.environ.get("LFM_TORCH_GPU_TESTS_ON", "cuda"))
DTYPES = [pytest.param(dtype, id=str(dtype).removeprefix("torch.")) for dtype in (torch.float32, torch.float64)]

T = TypeVar("T", bound=Callable[..., Any])


def on_gpu(test: T) -> T:
    """Mark a test or a class of tests: gpu, and skipped without one."""
    skip = pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no CUDA device")
    return pytest.mark.gpu(skip(test))


# streams, graphs and gigabytes cannot be rehearsed
on_gpu_alone = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


# what only a CUDA build of torch provides; the library is loaded, none of its kernels is called
STUB = """
extern "C" {
int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }
int torch_c10_cuda_check_msg(int, const char*, const char*, unsigned, bool, char**) { return 1; }
void torch_c10_cuda_free_error_msg(char*) {}
}
"""

# the schemas alone, without the twins that the package would register for CUDA
LOAD = """
import ctypes, json, sys
import torch
stub, library, schemas = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
ctypes.CDLL(stub, mode=ctypes.RTLD_GLOBAL)
definitions = torch.library.Library("lfm_torch", "DEF")
for name, schema in schemas.items():
    definitions.define(name + schema)
has_kernel = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key("lfm_torch::" + name, "CUDA")
before = [name for name in schemas if has_kernel(name)]
torch.ops.load_library(library)
print(json.dumps([before, [name for name in schemas if not has_kernel(name)]]))
"""


def test_library_registers_every_operator(tmp_path: Path) -> None:
    found = sorted(Path(lfm_torch.__file__).parent.glob("_cuda*.so"))
    if not found:
        pytest.skip("no CUDA library is built beside the package")
    if torch.version.cuda is not None:
        pytest.skip("this torch has CUDA and loads the library itself")
    compiler = shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler for the stub of torch's CUDA symbols")
    source, stub = tmp_path / "stub.cpp", tmp_path / "stub.so"
    source.write_text(STUB)
    subprocess.run([compiler, "-shared", "-fPIC", str(source), "-o", str(stub)], check=True)
    schemas = json.dumps({name: operator.schema for name, operator in OPERATORS.items() if not operator.twin_on_gpu})
    command = [sys.executable, "-c", LOAD, str(stub), str(found[-1]), schemas]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    before, missing = json.loads(result.stdout)
    assert before == []
    assert missing == []


@pytest.fixture
def fresh() -> torch.Generator:
    """Other inputs in every run; the seed stands in the captured output of a failure."""
    seed = random.SystemRandom().randrange(2**31)
    print(f"seed {seed}")
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def poison(request: pytest.FixtureRequest) -> None:
    """Leave NaN in the memory that the allocator hands out next: what a kernel does not write shows."""
    if request.node.get_closest_marker("gpu") is not None and DEVICE.type == "cuda" and torch.cuda.is_available():
        sizes = (1 << 27, *[1 << 17] * 64, *[1 << 10] * 64)
        blocks = [torch.full((size,), torch.nan, device=DEVICE) for size in sizes]
        del blocks


def to_device(value: Any, device: torch.device | None = None) -> Any:
    return value.to(device or DEVICE) if isinstance(value, Tensor) else value


def on_device(name: str, args: tuple[Any, ...], device: torch.device | None = None) -> list[Any]:
    """The arguments of an operator, on the GPU but for offsets and coefficients, which stay on the CPU by contract."""
    names = [argument.name for argument in getattr(torch.ops.lfm_torch, name).default._schema.arguments]
    return [a if names[i].endswith(("offsets", "coefficients")) else to_device(a, device) for i, a in enumerate(args)]


def call(name: str, *args: Any) -> tuple[Tensor, ...]:
    """Run the kernel on the GPU with inputs and results on the CPU."""
    results = OPERATORS[name].compiled(*on_device(name, args))
    return tuple(r.cpu() for r in ((results,) if isinstance(results, Tensor) else results))


def twin(name: str, *args: Any) -> tuple[Tensor, ...]:
    results = OPERATORS[name].reference(*args)
    return (results,) if isinstance(results, Tensor) else tuple(results)


def twin_in_float64(name: str, *args: Any) -> tuple[Tensor, ...]:
    return twin(name, *(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args))


def randn(fresh: torch.Generator, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=fresh, dtype=torch.float64).to(dtype)


def check_close(got: Tensor, wanted: Tensor, dtype: torch.dtype | None = None) -> None:
    """Floating-point values to the tolerance of ``dtype``, relative to the largest of them; integers exactly.

    ``dtype`` is that of the inputs where results have more digits than they, by default that of the results.
    """
    if not got.is_floating_point():
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
        return
    largest = float(wanted.abs().max()) if wanted.numel() else 0.0
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=TOLERANCES[dtype or got.dtype]["rtol"] * largest)


def neighbor_lists(fresh: torch.Generator, b: int, n: int, k: int) -> Tensor:
    order = torch.rand(b, n, n, generator=fresh)
    order.diagonal(dim1=1, dim2=2).fill_(2.0)
    return order.argsort(dim=2)[..., :k].contiguous()


def check_knn(x: Tensor, y: Tensor | None, k: int, metric: str) -> None:
    """Values as the twin rounds them; another order only among values that rounding cannot tell apart."""
    indices, distances = call("knn", x, y, k, metric)
    wanted_indices, wanted = twin("knn", x, y, k, metric)
    m = x.shape[1] if y is None else y.shape[1]
    assert indices.dtype == torch.int64
    assert distances.dtype == x.dtype
    assert bool(((indices >= 0) & (indices < m)).all())
    assert bool((indices.sort(dim=-1).values.diff(dim=-1) > 0).all())
    if y is None:
        assert bool((indices != torch.arange(m).view(1, m, 1)).all())
    eps = torch.finfo(x.dtype).eps
    tolerance = 8 * eps * wanted.double().abs()
    if metric in ("angular", "cosine"):
        # unit rows carry an error of 2^-53 each, in whatever order their norms are summed
        tolerance += 1e-15 * ((2 * wanted.double()).sqrt() if metric == "cosine" else 1.0) + 1e-30
    elif metric == "inner_product":
        # terms of a product cancel: float64 errors are relative to the lengths
        lengths = (x if y is None else y).double().norm(dim=-1)
        others = lengths.gather(1, wanted_indices.flatten(1)).view(wanted.shape)
        tolerance += 2e-15 * x.double().norm(dim=-1, keepdim=True) * others + 1e-44
    finite = wanted.isfinite()
    assert torch.equal(distances[~finite], wanted[~finite])
    assert bool(((distances - wanted).abs() <= tolerance)[finite].all())
    if x.dtype == torch.float32 and metric in ("euclidean", "inner_product"):
        # float64 sums in two orders round to two float32 values about once in 10^8
        assert int((distances != wanted).sum()) <= 2 + distances.numel() // 10**6
        assert int((indices != wanted_indices).sum()) <= 4 + indices.numel() // 10**6


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", list(OPERATORS))
def test_sample_inputs(name: str, dtype: torch.dtype) -> None:
    check_sample_inputs(name, dtype)


def check_sample_inputs(name: str, dtype: torch.dtype) -> None:
    """All sample inputs of an operator against its twin in float64."""
    for args in OPERATORS[name].sample_inputs(torch.device("cpu"), dtype):
        if name == "knn":
            check_knn(*args[:4])
            continue
        if name == "knn_ragged":  # near ties may differ in order: the values only, of which some are infinite
            got, wanted = call(name, *args)[1], twin(name, *args)[1]
            torch.testing.assert_close(got, wanted, **TOLERANCES[dtype])
            continue
        for got, wanted in zip(call(name, *args), twin_in_float64(name, *args), strict=True):
            if name == "batched_eigh" and got.dim() == 3:
                # the signs of eigenvectors are the choice of the library
                got = got * (got.double() * wanted).sum(1, keepdim=True).sign().to(got)
            check_close(got, wanted, dtype)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
class TestKnn:
    @pytest.mark.parametrize(("b", "n", "d"), [(1, 2, 1), (1, 131, 3), (3, 257, 17), (1, 513, 64), (3, 100, 200)])
    def test_self(self, fresh: torch.Generator, metric: str, dtype: torch.dtype, b: int, n: int, d: int) -> None:
        x = randn(fresh, b, n, d, dtype=dtype)
        for k in sorted({1, min(2, n - 1), n // 3 + 1, n - 1} & set(range(1, n))):
            check_knn(x, None, k, metric)

    def test_database(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        for b, n, m, d, k in ((1, 1, 1, 1, 1), (3, 33, 129, 5, 129), (1, 200, 5000, 16, 10), (2, 7, 1030, 9, 300)):
            check_knn(randn(fresh, b, n, d, dtype=dtype), randn(fresh, b, m, d, dtype=dtype), k, metric)

    def test_many_neighbors(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        check_knn(randn(fresh, 1, 150, 12, dtype=dtype), randn(fresh, 1, 3000, 12, dtype=dtype), 1200, metric)
        check_knn(randn(fresh, 1, 20, 12, dtype=dtype), randn(fresh, 1, 2200, 12, dtype=dtype), 2200, metric)
        check_knn(randn(fresh, 1, 1100, 5, dtype=dtype), None, 1025, metric)

    def test_many_columns(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        check_knn(randn(fresh, 1, 70, 24, dtype=dtype), randn(fresh, 1, 50_000, 24, dtype=dtype), 30, metric)

    @pytest.mark.parametrize("scale", [1e-20, 1e20])
    def test_scale(self, fresh: torch.Generator, metric: str, dtype: torch.dtype, scale: float) -> None:
        check_knn(randn(fresh, 1, 300, 8, dtype=dtype) * scale, None, 20, metric)

    def test_offset(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        check_knn(randn(fresh, 1, 700, 32, dtype=dtype) * 1e-2 + 1e4, None, 15, metric)

    def test_tensor_cores(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        """Sizes at which columns after the first are multiplied in TF32, also where its bounds let too many pass."""
        check_knn(randn(fresh, 1, 3000, 96, dtype=dtype), None, 40, metric)
        check_knn(randn(fresh, 1, 131, 200, dtype=dtype), randn(fresh, 1, 4001, 200, dtype=dtype), 7, metric)
        check_knn(randn(fresh, 2, 2500, 33, dtype=dtype) * 1e-2 + 1e4, None, 15, metric)
        clusters = randn(fresh, 1, 3000, 64, dtype=dtype) * 1e-3
        clusters += randn(fresh, 1, 30, 64, dtype=dtype).repeat(1, 100, 1)
        check_knn(clusters, None, 20, metric)

    def test_run_to_run(self, fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
        x = randn(fresh, 2, 1500, 24, dtype=dtype)
        first = call("knn", x, None, 40, metric)
        for _ in range(3):
            assert all(torch.equal(a, b) for a, b in zip(first, call("knn", x, None, 40, metric), strict=True))


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
class TestKnnTies:
    """Ties and near ties, where a list of candidates overflows and the row is searched over all columns."""

    def test_duplicates(self, fresh: torch.Generator, dtype: torch.dtype) -> None:
        x = randn(fresh, 1, 60, 6, dtype=dtype).repeat(1, 60, 1)
        check_knn(x, None, 100, "euclidean")
        check_knn(x, None, 100, "inner_product")

    def test_grid(self, fresh: torch.Generator, dtype: torch.dtype) -> None:
        x = torch.randint(0, 3, (1, 4000, 4), generator=fresh).to(dtype)
        check_knn(x, None, 33, "euclidean")
        check_knn(x, None, 33, "inner_product")

    def test_equal_points(self, dtype: torch.dtype) -> None:
        for value in (0.0, 1.0):
            x = torch.full((1, 3000, 3), value, dtype=dtype)
            indices, distances = call("knn", x, None, 5, "euclidean")
            assert bool((distances == 0).all())
            assert torch.equal(indices[0, 100:], torch.arange(5).expand(2900, 5))

    def test_distant_clusters(self, fresh: torch.Generator, dtype: torch.dtype) -> None:
        x = randn(fresh, 1, 5000, 4, dtype=dtype) * 1e-3
        x[:, ::2] += 1e3
        check_knn(x, None, 9, "euclidean")

    def test_sorted_points(self, fresh: torch.Generator, dtype: torch.dtype) -> None:
        check_knn(randn(fresh, 1, 6000, 2, dtype=dtype).sort(dim=1).values, None, 12, "euclidean")

    def test_values_that_are_not_numbers(self, fresh: torch.Generator, dtype: torch.dtype) -> None:
        x = randn(fresh, 1, 2500, 4, dtype=dtype)
        x[0, 3], x[0, 9, 2] = torch.nan, torch.inf
        indices, _ = call("knn", x, None, 5, "euclidean")
        assert bool(((indices >= 0) & (indices < 2500)).all())
        good = torch.tensor([i for i in range(2500) if i not in (3, 9)])
        assert torch.equal(indices[0, good], twin("knn", x, None, 5, "euclidean")[0][0, good])


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_knn_of_ragged_sets(fresh: torch.Generator, metric: str, dtype: torch.dtype) -> None:
    for sizes, k in (((5,), 4), ((3, 0, 1, 300, 131), 12), ((0, 0), 2), ((40, 1, 2), 60)):
        check_ragged(fresh, dtype, metric, sizes, k)


def check_ragged(fresh: torch.Generator, dtype: torch.dtype, metric: str, sizes: tuple[int, ...], k: int) -> None:
    """Each set as if it were alone, its rows filled up with -1; the second set starts off any multiple of 16 bytes."""
    starts = torch.tensor([0, *sizes]).cumsum(0)
    x = randn(fresh, int(starts[-1]), 3, dtype=dtype)
    indices, distances = call("knn_ragged", x, None, starts, None, k, metric, 0)
    assert indices.shape == distances.shape == (len(x), k)
    none = -torch.inf if metric == "inner_product" else torch.inf
    for begin, end in zip(starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        found = min(k, end - begin - 1) if end > begin else 0
        assert bool((indices[begin:end, max(found, 0) :] == -1).all())
        assert bool((distances[begin:end, max(found, 0) :] == none).all())
        if found > 0:
            wanted_indices, wanted = call("knn", x[begin:end].unsqueeze(0), None, found, metric, 0)
            assert torch.equal(indices[begin:end, :found], begin + wanted_indices[0])
            assert torch.equal(distances[begin:end, :found], wanted[0])


def product_inputs(fresh: torch.Generator, n: int, k: int, m: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    weights = torch.rand(1, n, k, generator=fresh, dtype=torch.float64).to(dtype)
    rowptr, col, weight = twin("symmetrize_edges", neighbor_lists(fresh, 1, n, k), weights, "mean")
    scalings = [torch.rand(n, generator=fresh, dtype=torch.float64).to(dtype) for _ in range(3)]
    return rowptr, col, weight, *scalings, randn(fresh, n, m, dtype=dtype), randn(fresh, n, m, dtype=dtype)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 3, 4, 8, 12, 16, 31, 37, 64, 128, 132, 260, 261])
def test_product_and_edge_gradient(fresh: torch.Generator, dtype: torch.dtype, m: int) -> None:
    for n, k in ((40, 5), (300, 33), (515, 200)):
        check_product(fresh, dtype, n, k, m)


def check_product(fresh: torch.Generator, dtype: torch.dtype, n: int, k: int, m: int) -> None:
    """The product and the gradient of its edges: aligned and not, with z and without."""
    rowptr, col, weight, diagonal, left, right, x, z = product_inputs(fresh, n, k, m, dtype)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, m)  # not aligned to 16 bytes
    for block, other in ((x, None), (x, z), (shifted, z)):
        args = (rowptr, col, weight, diagonal, left, right, block, other, -0.7, 0.3, 1.5)
        (got,), (wanted,) = call("laplacian_product", *args), twin_in_float64("laplacian_product", *args)
        check_close(got, wanted)
    args = (rowptr, col, left, right, z, shifted)
    (got,), (wanted,) = call("edge_products", *args), twin_in_float64("edge_products", *args)
    check_close(got, wanted)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("m", [1, 4, 8, 31, 64, 136, 261])
def test_product_of_half_stored_blocks(fresh: torch.Generator, dtype: torch.dtype, m: int) -> None:
    for n, k in ((40, 5), (300, 33)):
        check_half_product(fresh, dtype, n, k, m)


def check_half_product(fresh: torch.Generator, dtype: torch.dtype, n: int, k: int, m: int) -> None:
    """Sums in float32, one rounding at the end: aligned and not, with z and without."""
    *graph, x, z = product_inputs(fresh, n, k, m, torch.float32)
    x, z = x.to(dtype), z.to(dtype)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, m)
    for block, other in ((x, None), (shifted, z)):
        args = (*graph, block, other, -0.7, 0.3, 1.5)
        (got,), (wanted,) = call("laplacian_product", *args), twin_in_float64("laplacian_product", *args)
        assert got.dtype == dtype
        allowed = torch.finfo(dtype).eps / 2 * wanted.abs() + 1e-5 * wanted.abs().max()
        assert bool(((got.double() - wanted).abs() <= allowed).all())


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", SYMMETRIZATIONS)
@pytest.mark.parametrize(("b", "n", "k"), [(1, 2, 1), (4, 17, 16), (3, 301, 3), (1, 900, 120), (3, 5, 0), (0, 5, 2)])
def test_graph(fresh: torch.Generator, dtype: torch.dtype, mode: str, b: int, n: int, k: int) -> None:
    check_graph(fresh, dtype, mode, b, n, k)


def check_graph(fresh: torch.Generator, dtype: torch.dtype, mode: str, b: int, n: int, k: int) -> None:
    """All three graph operators, bit for bit: they add at most two numbers."""
    indices = neighbor_lists(fresh, b, n, k)
    weights = torch.randint(0, 3, (b, n, k), generator=fresh).to(dtype)  # equal weights and zeros
    rowptr, col, weight = call("symmetrize_edges", indices, weights, mode)
    if indices.numel() == 0:
        assert torch.equal(rowptr, torch.zeros(b * n + 1, dtype=torch.int64))
        assert col.numel() == weight.numel() == 0
        return
    for got, wanted in zip((rowptr, col, weight), twin("symmetrize_edges", indices, weights, mode), strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
    grad = randn(fresh, weight.numel(), dtype=dtype)
    args = (indices, weights, rowptr, col, grad, mode)
    assert torch.equal(call("symmetrize_edges_backward", *args)[0], twin("symmetrize_edges_backward", *args)[0])
    assert torch.equal(call("connected_components", rowptr, col)[0], twin("connected_components", rowptr, col)[0])


@on_gpu
@pytest.mark.parametrize("kept", [1.0, 0.8])
def test_components_of_long_paths(fresh: torch.Generator, kept: float) -> None:
    n = 20_000
    order = torch.randperm(n, generator=fresh)
    edges = torch.stack([order[:-1], order[1:]])[:, torch.rand(n - 1, generator=fresh) < kept]
    row, column = torch.cat([edges, edges.flip(0)], dim=1)
    row, column = (value[(row * n + column).argsort()] for value in (row, column))
    rowptr = torch.cat([torch.zeros(1, dtype=torch.int64), torch.bincount(row, minlength=n).cumsum(0)])
    # number the pieces of the path along it, then by their smallest node
    starts = torch.ones(n, dtype=torch.int64).index_fill_(0, edges[1], 0)[order]
    piece = torch.empty(n, dtype=torch.int64).index_copy_(0, order, starts.cumsum(0) - 1)
    smallest = torch.full((int(starts.sum()),), n).scatter_reduce(0, piece, torch.arange(n), "amin")
    wanted = torch.unique(smallest[piece], return_inverse=True)[1]
    assert torch.equal(call("connected_components", rowptr, column.int())[0], wanted)


def stream_cases(fresh: torch.Generator) -> Iterator[tuple[str, tuple[Any, ...]]]:
    yield "knn", (randn(fresh, 1, 2000, 32, dtype=torch.float32), None, 20, "euclidean")
    rowptr, col, weight, diagonal, left, right, x, z = product_inputs(fresh, 2000, 30, 64, torch.float32)
    yield "laplacian_product", (rowptr, col, weight, diagonal, left, right, x, z, 1.0, 0.5, -1.0)
    yield "edge_products", (rowptr, col, left, right, x, z)
    yield "connected_components", (rowptr, col)
    indices, weights = neighbor_lists(fresh, 1, 2000, 30), torch.rand(1, 2000, 30, generator=fresh)
    yield "symmetrize_edges", (indices, weights, "union")
    yield "symmetrize_edges_backward", (indices, weights, *twin("symmetrize_edges", indices, weights, "union"), "union")
    yield "geodesics", (rowptr, col, weight, torch.randint(0, 2000, (1, 17), generator=fresh))
    factors = [randn(fresh, *shape, dtype=torch.float32) for shape in ((1, 5, 50), (6, 1, 50)) * 2]
    yield "map_energies", (randn(fresh, 6, 50, 5, 50, dtype=torch.float32), *factors, 1)
    points, offsets = randn(fresh, 900, 16, dtype=torch.float32), torch.tensor([0, 300, 301, 900])
    yield "knn_ragged", (points, None, offsets, None, 10, "euclidean")


@on_gpu_alone
@on_gpu
def test_streams_and_runs(fresh: torch.Generator) -> None:
    for name, args in stream_cases(fresh):
        expected = call(name, *args)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            moved = on_device(name, args)
            torch.cuda._sleep(20_000_000)  # work on the wrong stream would run before its inputs are there
            late = [a + 0 if isinstance(a, Tensor) and a.is_cuda else a for a in moved]
            for _ in range(2):
                results = OPERATORS[name].compiled(*late)
        stream.synchronize()
        for got, wanted in zip((results,) if isinstance(results, Tensor) else results, expected, strict=True):
            assert torch.equal(got.cpu(), wanted), name


@on_gpu_alone
@on_gpu
@pytest.mark.parametrize(
    "name", ["laplacian_product", "edge_products", "connected_components", "knn", "knn_ragged", "map_energies"]
)
def test_cuda_graph(fresh: torch.Generator, name: str) -> None:
    """What reads nothing back (not symmetrize_edges and geodesics) is captured once, replayed on other values."""
    args = on_device(name, dict(stream_cases(fresh))[name])
    compiled = OPERATORS[name].compiled
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        compiled(*args)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = compiled(*args)
    results = (results,) if isinstance(results, Tensor) else results
    for _ in range(2):
        for a in args:
            if isinstance(a, Tensor) and a.is_floating_point():
                a.copy_(torch.rand(a.shape, generator=fresh))
        graph.replay()
        expected = compiled(*args)
        for got, wanted in zip(results, (expected,) if isinstance(expected, Tensor) else expected, strict=True):
            assert torch.equal(got, wanted)


@on_gpu_alone
@on_gpu
def test_another_device_than_the_current_one(fresh: torch.Generator) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one CUDA device")
    for name, args in stream_cases(fresh):
        results = OPERATORS[name].compiled(*on_device(name, args, torch.device("cuda:1")))
        for got, wanted in zip((results,) if isinstance(results, Tensor) else results, call(name, *args), strict=True):
            assert got.device == torch.device("cuda:1")
            assert torch.equal(got.cpu(), wanted)
    assert torch.cuda.current_device() == 0


@on_gpu
@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((torch.zeros(4, 2), None, 1, "euclidean"), "x must have 3 dimensions"),
        ((torch.zeros(1, 4, 2), None, 4, "euclidean"), "n_neighbors must be between 1 and 3"),
        ((torch.zeros(1, 4, 2), None, 1, "manhattan"), "metric must be one of"),
        ((torch.zeros(1, 4, 2), torch.zeros(1, 4, 3), 1, "euclidean"), "y must have 2 entries in dimension 2"),
        ((torch.zeros(1, 4, 2).int(), None, 1, "euclidean"), "x must be float32 or float64"),
    ],
)
def test_direct_calls_are_checked(args: tuple[Any, ...], message: str) -> None:
    with pytest.raises(RuntimeError, match=message):
        call("knn", *args)


@on_gpu
def test_a_wrong_index_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 2\), got 7"):
        call("symmetrize_edges", torch.tensor([[[1], [7]]]), torch.ones(1, 2, 1), "mean")


@on_gpu
def test_a_source_that_is_no_node_is_refused() -> None:
    check_wrong_source()


def check_wrong_source() -> None:
    rowptr, col, length = torch.arange(7), torch.tensor([1, 0, 2, 4, 3, 5]).int(), torch.ones(6)
    for wrong in (3, -1):
        with pytest.raises(RuntimeError, match=rf"sources must lie in \[0, 3\), got {wrong}"):
            call("geodesics", rowptr, col, length, torch.tensor([[0, 2], [wrong, 1]]))


@on_gpu
def test_empty_inputs() -> None:
    assert [r.shape for r in call("knn", torch.zeros(0, 5, 3), None, 2, "euclidean")] == [(0, 5, 2), (0, 5, 2)]
    assert call("knn", torch.zeros(2, 0, 3), torch.zeros(2, 4, 3), 2, "cosine")[0].shape == (2, 0, 2)
    none, start, block = torch.zeros(0), torch.zeros(1, dtype=torch.int64), torch.zeros(0, 4)
    args = (start, none.int(), none, none, none, none, block, None, 1.0, 0.0, 0.0)
    assert call("laplacian_product", *args)[0].shape == (0, 4)
    assert call("edge_products", start, none.int(), none, none, block, block)[0].shape == (0,)
    assert call("connected_components", start, none.int())[0].shape == (0,)


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("b", "n", "k", "p"), [(1, 2, 1, 1), (3, 70, 2, 5), (1, 900, 3, 40), (2, 300, 90, 17)])
def test_geodesics(fresh: torch.Generator, dtype: torch.dtype, b: int, n: int, k: int, p: int) -> None:
    check_geodesics(fresh, dtype, b, n, k, p)


def check_geodesics(fresh: torch.Generator, dtype: torch.dtype, b: int, n: int, k: int, p: int) -> None:
    """Bit for bit: the smallest rounded path sum is one number. Few neighbours leave parts that are not reached."""
    lengths = torch.rand(b, n, k, generator=fresh, dtype=torch.float64).to(dtype)
    rowptr, col, length = twin("symmetrize_edges", neighbor_lists(fresh, b, n, k), lengths, "union")
    args = (rowptr, col, length, torch.randint(0, n, (b, p), generator=fresh))
    assert torch.equal(call("geodesics", *args)[0], twin("geodesics", *args)[0])
