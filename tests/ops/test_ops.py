"""The twin law: every registered operator has a kernel that agrees with its twin, a fake kernel and sample inputs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from checkout import ROOT
from oracles import TOLERANCES
from processes import environment

from lfm_torch import ops
from lfm_torch.ops import OPERATORS
from lfm_torch.ops._extension import SIMD_LEVELS
from lfm_torch.ops.knn import knn_reference

CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name in OPERATORS
    for dtype in (torch.float32, torch.float64)
]
# positions of the arguments that gradients flow to
DIFFERENTIABLE = {"laplacian_product": (2, 6, 7), "map_energies": (0, 1, 2, 3, 4), "inner_products": (0, 1)}


def as_tuple(value: Any) -> tuple[torch.Tensor, ...]:
    return (value,) if isinstance(value, torch.Tensor) else tuple(value)


def test_every_schema_of_the_namespace_is_registered() -> None:
    known = {
        name.removeprefix("lfm_torch::")
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("lfm_torch::")
    }
    assert known == set(OPERATORS)


def test_every_operator_has_a_cpu_kernel_listed_in_the_table_of_contents() -> None:
    table = ROOT / "csrc" / "ops.cpp"
    if not table.exists():
        pytest.skip("the sources are not beside the tests")
    assert set(re.findall(r'm\.impl\("(\w+)"', table.read_text())) == set(OPERATORS)


@pytest.mark.parametrize(("name", "dtype"), CASES)
def test_kernel_agrees_with_twin(name: str, dtype: torch.dtype, device: torch.device) -> None:
    operator = OPERATORS[name]
    count = 0
    for args in operator.sample_inputs(device, dtype):
        for got, wanted in zip(as_tuple(operator.compiled(*args)), as_tuple(operator.reference(*args)), strict=True):
            torch.testing.assert_close(got, wanted, **TOLERANCES[dtype])
        count += 1
    assert count >= 3


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_the_code_of_other_machines_agrees_as_well(level: str) -> None:
    """The level is chosen once in a process. Where this machine lacks it the next lower one runs."""
    if not ops.has_native_kernel("knn", torch.device("cpu")):
        pytest.skip("no compiled kernels")
    here = Path(__file__).parents[1]
    tests = [str(here / "ops" / "test_ops.py"), str(here / "graphs" / "test_laplacian.py")]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        *tests,
        "-k",
        "twin or half_storage or alone",
    ]
    result = subprocess.run(
        command, env=environment(LFM_TORCH_SIMD=level), capture_output=True, text=True, check=False, cwd=here.parent
    )
    assert result.returncode == 0, result.stdout[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("name", list(OPERATORS))
def test_opcheck(name: str, device: torch.device) -> None:
    operator = OPERATORS[name]
    for args in list(operator.sample_inputs(device, torch.float64))[:4]:
        args = tuple(
            a.requires_grad_() if isinstance(a, torch.Tensor) and i in DIFFERENTIABLE.get(name, ()) else a
            for i, a in enumerate(args)
        )
        torch.library.opcheck(operator.compiled, args)


@pytest.mark.parametrize("name", list(OPERATORS))
def test_result_does_not_depend_on_threads_or_run(name: str) -> None:
    threads = torch.get_num_threads()
    try:
        for args in OPERATORS[name].sample_inputs(torch.device("cpu"), torch.float32):
            results = []
            for count in (1, 2, 2, 5):
                torch.set_num_threads(count)
                results.append(as_tuple(OPERATORS[name].compiled(*args)))
            for other in results[1:]:
                assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_inner_product_depends_on_its_two_rows_alone(dtype: torch.dtype) -> None:
    if not ops.has_native_kernel("inner_products", torch.device("cpu")):
        pytest.skip("no compiled kernels: the twin is a product of BLAS, which does not promise it")
    generator = torch.Generator().manual_seed(0)
    for a, b, n in ((70, 90, 1000), (1040, 530, 261), (13, 5, 7)):
        x, y = (torch.randn(size, n, generator=generator, dtype=torch.float64).to(dtype) for size in (a, b))
        products = ops.inner_products(x, y)
        assert ops.inner_products(y, x).mT.equal(products)
        for _ in range(20):
            rows, columns = (
                torch.randperm(size, generator=generator)[: int(torch.randint(1, size, (), generator=generator))]
                for size in (a, b)
            )
            assert ops.inner_products(x[rows], y[columns]).equal(products[rows][:, columns])


def test_inner_products_have_the_gradients_of_a_product() -> None:
    x, y = (torch.randn(size, 6, dtype=torch.float64).requires_grad_() for size in (3, 4))
    torch.autograd.gradcheck(ops.inner_products, (x, y))
    torch.autograd.gradgradcheck(ops.inner_products, (x, y))


def test_knn_of_empty_batch() -> None:
    indices, distances = ops.nearest_neighbors(torch.zeros(0, 5, 3), None, 2, "euclidean")
    assert indices.shape == distances.shape == (0, 5, 2)


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
def test_direct_calls_of_the_kernel_are_checked(args: tuple[Any, ...], message: str) -> None:
    if not ops.has_native_kernel("knn", torch.device("cpu")):
        pytest.skip("no compiled kernels")
    with pytest.raises(RuntimeError, match=message):
        OPERATORS["knn"].compiled(*args)


@pytest.mark.parametrize("mode", ["mean", "union", "mutual"])
def test_a_neighbor_named_twice_counts_once(mode: str) -> None:
    """Not what a search returns, but memory must stay what it is: edges are counted before they are written."""
    indices = torch.randint(0, 40, (2, 40, 12), generator=torch.Generator().manual_seed(0))
    weights = torch.ones(2, 40, 12)
    rowptr, col, weight = ops.symmetrize_edges(indices, weights, mode)
    for graph in range(2):
        directed = torch.zeros(40, 40, dtype=torch.bool)
        directed[torch.arange(40).repeat_interleave(12), indices[graph].flatten()] = True
        wanted = directed & directed.T if mode == "mutual" else directed | directed.T
        found = torch.zeros_like(wanted)
        for i in range(40):
            row = slice(int(rowptr[40 * graph + i]), int(rowptr[40 * graph + i + 1]))
            assert bool((col[row].diff() > 0).all())
            found[i, col[row].long() - 40 * graph] = True
            both = directed[i] & directed[:, i]
            assert torch.equal(weight[row], torch.where(both | torch.tensor(mode == "union"), 1.0, 0.5)[wanted[i]])
        assert torch.equal(found, wanted)


def test_a_wrong_index_is_refused_before_it_is_written_through() -> None:
    if not ops.has_native_kernel("symmetrize_edges", torch.device("cpu")):
        pytest.skip("no compiled kernels")
    indices = torch.tensor([[[1], [7]]])
    with pytest.raises(RuntimeError, match=r"indices must lie in \[0, 2\), got 7"):
        ops.symmetrize_edges(indices, torch.ones(1, 2, 1), "mean")


def test_knn_survives_values_that_are_not_numbers() -> None:
    x = torch.randn(1, 30, 4)
    x[0, 3] = torch.nan
    indices, _ = ops.nearest_neighbors(x, None, 5, "euclidean")
    assert bool(((indices >= 0) & (indices < 30)).all())
    good = [i for i in range(30) if i != 3]
    assert torch.equal(indices[0, good], knn_reference(x, None, 5, "euclidean")[0][0, good])


def test_product_is_differentiable_in_all_its_inputs() -> None:
    rowptr, col, weight, *_ = next(
        iter(OPERATORS["laplacian_product"].sample_inputs(torch.device("cpu"), torch.float64))
    )
    n = rowptr.numel() - 1
    dense = torch.zeros(n, n, dtype=torch.float64)
    rows = torch.repeat_interleave(torch.arange(n), rowptr.diff())
    dense[rows, col.long()] = weight
    scalings = [torch.rand(n, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    x, z = (torch.randn(n, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    parameter = dense.clone().requires_grad_()

    def apply(
        w: torch.Tensor, d: torch.Tensor, left: torch.Tensor, right: torch.Tensor, x: torch.Tensor, z: torch.Tensor
    ) -> torch.Tensor:
        symmetric = (w + w.T) / 2  # the operator is defined for symmetric weights
        return ops.laplacian_product(
            rowptr, col, symmetric[rows, col.long()], d, left, right, x, z, a=-0.7, b=0.3, c=2.0
        )

    assert torch.autograd.gradcheck(apply, (parameter, *scalings, x, z), fast_mode=True)


def test_compiles_without_graph_breaks() -> None:
    rowptr, col, weight, diagonal, left, right, x, *_ = next(
        iter(OPERATORS["laplacian_product"].sample_inputs(torch.device("cpu"), torch.float32))
    )

    def twice(x: torch.Tensor) -> torch.Tensor:
        y = ops.laplacian_product(rowptr, col, weight, diagonal, left, right, x)
        return ops.laplacian_product(rowptr, col, weight, diagonal, left, right, y, x, a=2.0, c=-1.0)

    compiled = torch.compile(twice, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), twice(x))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.complex64, torch.uint16])
def test_kernels_name_dtypes_as_torch_does(dtype: torch.dtype) -> None:
    if not ops.has_native_kernel("knn", torch.device("cpu")):
        pytest.skip("no compiled kernels")
    wrong, right = torch.zeros(3, 4, dtype=dtype), torch.zeros(3, 4)
    with pytest.raises(RuntimeError, match=f"^x must be float32 or float64, got {dtype}$"):
        ops.inner_products(wrong, right)
    with pytest.raises(RuntimeError, match=f"^y must have the dtype of x, torch.float32, got {dtype}$"):
        ops.inner_products(right, wrong)
