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
from cuda_emulator.translate import translate
from torch import Tensor
from torch.utils import cpp_extension

from lfm_torch.ops import OPERATORS
from lfm_torch.ops.graph import SYMMETRIZATIONS
from lfm_torch.ops.knn import METRICS

SOURCES = Path(__file__).parents[1] / "csrc"
EMULATOR = Path(__file__).parent / "cuda_emulator"
pytestmark = pytest.mark.slow

# lists so short that a few hundred columns take several chunks, overflow, and are sorted in global memory; whole point
# sets in flight, or one panel of rows at a time
SMALL = {"kListSlots": "256", "kFewPanels": "1", "kResultSlots": "16", "kSharedBytes": "1024"}
KNN_VARIANTS = {"mirrored": SMALL, "panels": {**SMALL, "kWorkspaceBytes": "1"}}


def load(folder: Path, namespace: str, names: tuple[str, ...], constants: dict[str, str]) -> None:
    """Compile the operators of the files ``names`` and register them for CPU tensors under ``namespace``."""
    compiler = shutil.which("g++")
    if compiler is None or platform.machine() != "x86_64" or not SOURCES.is_dir():
        pytest.skip("the emulator needs g++ on x86-64 and the sources beside the tests")
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


@pytest.fixture(scope="module", params=KNN_VARIANTS)
def knn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    namespace = f"lfm_emulated_{request.param}"
    load(tmp_path_factory.mktemp(namespace), namespace, ("knn_cuda",), KNN_VARIANTS[request.param])
    return namespace


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> str:
    load(tmp_path_factory.mktemp("lfm_emulated"), "lfm_emulated", ("graph_cuda", "laplacian_cuda"), {})
    return "lfm_emulated"


@pytest.fixture(params=["ascending", "descending", "random"])
def order(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Order in which threads run between barriers, and whether asynchronous copies are made early or late."""
    number = ["ascending", "descending", "random"].index(request.param)
    monkeypatch.setenv("EMULATOR_ORDER", str(number))
    monkeypatch.setenv("EMULATOR_EARLY_COPIES", str(number % 2))


def redirect(monkeypatch: pytest.MonkeyPatch, namespace: str) -> None:
    """Let the helpers of the GPU tests call the emulated kernels."""

    def call(name: str, *args: Any) -> tuple[Tensor, ...]:
        results = getattr(getattr(torch.ops, namespace), name)(*args)
        return (results,) if isinstance(results, Tensor) else tuple(results)

    monkeypatch.setattr(cuda, "call", call)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("metric", METRICS)
def test_knn(knn: str, order: None, metric: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return cuda.randn(generator, *shape, dtype=dtype)

    cuda.check_knn(randn(1, 1, 1), randn(1, 1, 1), 1, metric)
    cuda.check_knn(randn(2, 131, 9), None, 130, metric)
    cuda.check_knn(randn(1, 520, 6), None, 7, metric)
    cuda.check_knn(randn(2, 20, 33), randn(2, 700, 33), 30, metric)
    cuda.check_knn(randn(1, 5, 3), randn(1, 600, 3), 600, metric)
    cuda.check_knn(randn(1, 150, 20) * 1e-2 + 1e4, None, 9, metric)
    cuda.check_knn(randn(1, 90, 5) * 1e-20, None, 9, metric)
    cuda.check_knn(randn(1, 90, 5) * 1e20, None, 9, metric)


@pytest.mark.parametrize("dtype", cuda.DTYPES)
def test_knn_ties(knn: str, order: None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, knn)
    generator = torch.Generator().manual_seed(0)
    for metric in ("euclidean", "inner_product"):
        cuda.check_knn(cuda.randn(generator, 1, 20, 5, dtype=dtype).repeat(1, 15, 1), None, 40, metric)
        cuda.check_knn(torch.randint(0, 3, (1, 300, 3), generator=generator).to(dtype), None, 33, metric)
    cuda.check_knn(torch.ones(1, 270, 2, dtype=dtype), None, 5, "euclidean")
    clusters = cuda.randn(generator, 1, 280, 4, dtype=dtype) * 1e-3
    clusters[:, ::2] += 1e3
    cuda.check_knn(clusters, None, 9, "euclidean")
    broken = cuda.randn(generator, 1, 300, 4, dtype=dtype)
    broken[0, 3], broken[0, 9, 2] = torch.nan, torch.inf
    found, wanted = cuda.call("knn", broken, None, 5, "euclidean")[0], cuda.twin("knn", broken, None, 5, "euclidean")[0]
    good = torch.tensor([i for i in range(300) if i not in (3, 9)])
    assert torch.equal(found[0, good], wanted[0, good])


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("m", [1, 3, 8, 37, 64, 132, 261])
def test_product(others: str, order: None, dtype: torch.dtype, m: int, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    generator = torch.Generator().manual_seed(0)
    for n, k in ((2, 1), (50, 33), (61, 7)):
        rowptr, col, weight, diagonal, left, right, x, z = cuda.product_inputs(generator, n, k, m, dtype)
        shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(n, m)
        for block, other in ((x, None), (x, z), (shifted, z)):
            args = (rowptr, col, weight, diagonal, left, right, block, other, -0.7, 0.3, 1.5)
            cuda.check_close(
                cuda.call("laplacian_product", *args)[0], cuda.twin_in_float64("laplacian_product", *args)[0]
            )
        for block in (x, shifted):
            args = (rowptr, col, left, right, z, block)
            cuda.check_close(cuda.call("edge_products", *args)[0], cuda.twin_in_float64("edge_products", *args)[0])


@pytest.mark.parametrize("dtype", cuda.DTYPES)
@pytest.mark.parametrize("mode", SYMMETRIZATIONS)
def test_graph(others: str, order: None, dtype: torch.dtype, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    redirect(monkeypatch, others)
    generator = torch.Generator().manual_seed(0)
    for b, n, k in ((1, 2, 1), (3, 17, 16), (2, 120, 3), (2, 5, 0)):
        cuda.check_graph(generator, dtype, mode, b, n, k)
