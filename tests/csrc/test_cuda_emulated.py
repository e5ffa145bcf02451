"""The CUDA kernels, run without a GPU: compiled for the CPU, a block as fibers (cuda_emulator/emulator.h).

It shows wrong logic, missing barriers, misaligned and, with LFM_TORCH_SANITIZE=1 and libasan preloaded, wrong accesses.
It cannot show what only the hardware does: the order of memory between warps, or speed.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import test_cuda_library as cuda
import torch
from checkout import ROOT
from cuda_emulator.translate import translate
from torch import Tensor

from lfm_torch.ops import OPERATORS
from lfm_torch.ops.graphs import SYMMETRIZATIONS
from lfm_torch.ops.knn import METRICS

SOURCES = ROOT / "csrc"
EMULATOR = Path(__file__).parent / "cuda_emulator"
pytestmark = pytest.mark.emulated

# lists so short that a few hundred columns take several chunks, overflow, and are sorted in global memory; room for so
# few rows that up to 768 are in flight at once, "mirrored", and more of them a few panels at a time
SMALL = {
    "kListSlots": "256",
    "kFewPanels": "1",
    "kResultSlots": "16",
    "kSharedBytes": "1024",
    "kWorkspaceBytes": "6 * 128 * (3 * 128 * 8 + 1024)",
}


def load(folder: Path, namespace: str, names: tuple[str, ...], constants: dict[str, str]) -> None:
    """Compile the operators of the files ``names`` and register them for CPU tensors under ``namespace``."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or not SOURCES.is_dir():
        pytest.skip("the emulator needs g++ on x86-64 and the sources beside the tests")
    from torch.utils import cpp_extension  # needs setuptools, which tests elsewhere do without

    translated = translate(SOURCES, folder, namespace, constants)
    files = [EMULATOR / "emulator.cpp", *(file for file in translated if file.stem in names)]
    flags = ["-std=c++17", "-O1", "-march=native", "-ffp-contract=off", "-frounding-math", "-fPIC", "-shared"]
    flags += ["-fvisibility=hidden", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    if os.environ.get("LFM_TORCH_SANITIZE") == "1":
        flags += ["-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
    flags += [f"-I{path}" for path in (folder, EMULATOR, *cpp_extension.include_paths())]
    torch_libraries = [flag for path in cpp_extension.library_paths() for flag in (f"-L{path}", f"-Wl,-rpath,{path}")]
    library = folder / "library.so"
    command = [compiler, *flags, *map(str, files), *torch_libraries, "-ltorch_cpu", "-ltorch", "-o", str(library)]
    subprocess.run(command, check=True)
    definitions = torch.library.Library(namespace, "DEF")
    for name, operator in OPERATORS.items():
        definitions.define(name + operator.schema)
    _kept.append(definitions)
    torch.ops.load_library(str(library))


_kept: list[torch.library.Library] = []


@pytest.fixture(scope="module", params=["tensor", "float"])
def knn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The search with the tensor cores from the fewest features on, and without them."""
    namespace, least = f"lfm_emulated_knn_{request.param}", "8" if request.param == "tensor" else "1 << 30"
    load(tmp_path_factory.mktemp("knn"), namespace, ("knn_cuda",), SMALL | {"kLeastTensorDepth": least})
    return namespace


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    load(
        tmp_path_factory.mktemp("others"),
        "lfm_emulated",
        (
            *("symmetrize_cuda", "symmetrize_backward_cuda", "components_cuda"),
            *("product_cuda", "edge_products_cuda", "recurrence_cuda"),
            *("geodesic_cuda", "energies_cuda"),
        ),
        {},
    )
    return "lfm_emulated"


ORDERS = ("ascending", "descending", "random")


@pytest.fixture
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order in which threads run between barriers, and whether asynchronous copies are made early or late."""
    number = ORDERS.index(request.param)
    monkeypatch.setenv("EMULATOR_ORDER", str(number))
    monkeypatch.setenv("EMULATOR_EARLY_COPIES", str(number % 2))


def redirect(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """Let the helpers of the GPU tests call the emulated kernels."""

    def call(name: str, *args: Any) -> tuple[Tensor, ...]:
        results = getattr(getattr(torch.ops, namespace), name)(*args)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    monkeypatch.setattr(cuda, "call", call)


@pytest.mark.parametrize(
    ("metric", "dtype", "order"),
    [(metric, dtype, "random") for metric in METRICS for dtype in (torch.float32, torch.float64)]
    + [(metric, torch.float32, order) for metric in ("euclidean", "inner_product") for order in ORDERS[:2]],
    indirect=["order"],
)
def test_knn(knn: str, order: None, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return cuda.randn(generator, *shape, dtype=dtype)

    cuda.check_knn(randn(1, 1, 1), randn(1, 1, 1), 1, metric)
    cuda.check_knn(randn(2, 70, 9), None, 69, metric)
    cuda.check_knn(randn(1, 520, 6), None, 5, metric)
    cuda.check_knn(randn(2, 20, 33), randn(2, 700, 33), 30, metric)
    cuda.check_knn(randn(1, 5, 3), randn(1, 600, 3), 600, metric)
    cuda.check_knn(randn(1, 700, 40), None, 3, metric)
    cuda.check_knn(randn(1, 60, 20) * 1e-2 + 1e4, None, 9, metric)
    cuda.check_knn(randn(1, 40, 5) * 1e-20, None, 9, metric)
    cuda.check_knn(randn(1, 40, 5) * 1e20, None, 9, metric)


@pytest.mark.parametrize("order", ["random"], indirect=True)
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_knn_ties(knn: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    generator = torch.Generator().manual_seed(0)
    points = cuda.randn(generator, 1, 20, 5, dtype=dtype)
    for metric in ("euclidean", "inner_product"):
        cuda.check_knn(points, points.repeat(1, 30, 1), 40, metric)
        cuda.check_knn(torch.randint(0, 3, (1, 140, 3), generator=generator).to(dtype), None, 33, metric)
    cuda.check_knn(torch.ones(1, 10, 2, dtype=dtype), torch.ones(1, 400, 2, dtype=dtype), 5, "euclidean")
    clusters = cuda.randn(generator, 1, 400, 4, dtype=dtype) * 1e-3
    clusters[:, ::2] += 1e3
    cuda.check_knn(clusters[:, :30].contiguous(), clusters, 9, "euclidean")


@pytest.mark.parametrize("order", ["random"], indirect=True)
def test_knn_of_many_rows(knn: str, order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    cuda.check_knn(torch.randn(1, 900, 3), None, 2, "euclidean")


@pytest.mark.parametrize("order", ["random"], indirect=True)
def test_knn_of_values_that_are_not_numbers(knn: str, order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    x = torch.randn(1, 150, 4)
    x[0, 3], x[0, 9, 2] = torch.nan, torch.inf
    found, wanted = cuda.call("knn", x, None, 5, "euclidean")[0], cuda.twin("knn", x, None, 5, "euclidean")[0]
    good = torch.tensor([i for i in range(150) if i not in (3, 9)])
    assert torch.equal(found[0, good], wanted[0, good])


@pytest.mark.parametrize("order", ["random"], indirect=True)
def test_knn_of_ragged_sets(knn: str, order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    for metric in ("euclidean", "inner_product"):
        cuda.check_ragged(torch.Generator().manual_seed(0), torch.float32, metric, (3, 0, 1, 140, 7), 9)


@pytest.mark.parametrize("order", ORDERS, indirect=True)
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_product(others: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    generator = torch.Generator().manual_seed(0)
    for n, k, m in ((2, 1, 1), (40, 33, 3), (31, 7, 8), (30, 9, 37), (40, 33, 64), (12, 5, 132), (9, 8, 261)):
        rowptr, col, weight, diagonal, left, right, x, z = cuda.product_inputs(generator, n, k, m, dtype)
        shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, m)
        for block, other in ((x, None), (shifted, z)):
            args = (rowptr, col, weight, diagonal, left, right, block, other, -0.7, 0.3, 1.5)
            cuda.check_close(
                cuda.call("laplacian_product", *args)[0], cuda.twin_in_float64("laplacian_product", *args)[0]
            )
        for block in (x, shifted):
            args = (rowptr, col, left, right, z, block)
            cuda.check_close(cuda.call("edge_products", *args)[0], cuda.twin_in_float64("edge_products", *args)[0])


@pytest.mark.parametrize("order", ["random"], indirect=True)
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_recurrence(others: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    for args in OPERATORS["laplacian_recurrence"].sample_inputs(torch.device("cpu"), dtype):
        if len(args[0]) < 500:
            found, wanted = (
                cuda.call("laplacian_recurrence", *args)[0],
                cuda.twin_in_float64("laplacian_recurrence", *args)[0],
            )
            cuda.check_close(found, wanted)


@pytest.mark.parametrize("order", ["random"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_product_of_half_stored_blocks(
    others: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    redirect(monkeypatch, others)
    for n, k, m in ((2, 1, 1), (40, 33, 8), (31, 7, 37), (12, 5, 136)):
        cuda.check_half_product(torch.Generator().manual_seed(0), dtype, n, k, m)


@pytest.mark.parametrize("order", ORDERS, indirect=True)
@pytest.mark.parametrize("mode", SYMMETRIZATIONS)
def test_graph(others: str, order: None, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    generator = torch.Generator().manual_seed(0)
    for b, n, k in ((1, 2, 1), (3, 17, 16), (2, 120, 3), (2, 5, 0)):
        for dtype in (torch.float32, torch.float64):
            cuda.check_graph(generator, dtype, mode, b, n, k)


@pytest.mark.parametrize("order", ORDERS, indirect=True)
def test_geodesics(others: str, order: None, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    generator = torch.Generator().manual_seed(0)
    for b, n, k, p in ((1, 2, 1, 1), (2, 40, 2, 3), (1, 60, 3, 15), (2, 30, 9, 37)):
        for dtype in (torch.float32, torch.float64):
            cuda.check_geodesics(generator, dtype, b, n, k, p)
    cuda.check_wrong_source()


@pytest.mark.parametrize("order", ORDERS, indirect=True)
@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_map_energies(others: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    for args in OPERATORS["map_energies"].sample_inputs(torch.device("cpu"), dtype):
        cuda.check_close(cuda.call("map_energies", *args)[0], cuda.twin_in_float64("map_energies", *args)[0])
    # maps too large for shared memory are read where they lie
    generator = torch.Generator().manual_seed(0)
    C = 0.1 * cuda.randn(generator, 2, 90, 2, 140, dtype=dtype)
    factors = [cuda.randn(generator, *shape, dtype=dtype) for shape in ((1, 2, 140), (2, 1, 90)) * 2]
    for skip in (0, 3):
        args = (C, *factors, skip)
        cuda.check_close(cuda.call("map_energies", *args)[0], cuda.twin_in_float64("map_energies", *args)[0])
