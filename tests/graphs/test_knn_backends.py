"""Other backends, ragged batches, memory budgets, and the forms that graphs are exchanged in."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from extras import need, needs
from processes import environment

import lfm_torch as lfm
from lfm_torch.graphs.search import ApproximateNeighbors
from lfm_torch.graphs.sets import set_offsets
from lfm_torch.integrations.pyg import from_pyg, from_torch_sparse, knn_graph, to_pyg, to_torch_sparse
from lfm_torch.ops._extension import SIMD_LEVELS
from lfm_torch.ops.knn import METRICS, nearest_neighbors


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("with_y", [False, True])
def test_faiss_finds_the_exact_neighbours(metric: str, with_y: bool) -> None:
    need("faiss")
    x = torch.randn(2, 200, 12)
    y = torch.randn(2, 150, 12) if with_y else None
    ours, theirs = (
        lfm.knn(x, y, n_neighbors=9, metric=metric),
        lfm.knn(x, y, n_neighbors=9, metric=metric, backend="faiss"),
    )
    torch.testing.assert_close(theirs.distances, ours.distances, rtol=1e-5, atol=1e-5)
    assert (theirs.indices == ours.indices).double().mean() > 0.99


@pytest.mark.parametrize("backend", ["faiss_ivf", "faiss_hnsw"])
def test_an_approximate_backend_tells_its_recall(backend: str) -> None:
    need("faiss")
    x = torch.randn(1500, 16)
    exact, found = lfm.knn(x, n_neighbors=10), lfm.knn(x, n_neighbors=10, backend=backend)
    assert isinstance(found, ApproximateNeighbors)
    hits = torch.stack([torch.isin(a, b).double().mean() for a, b in zip(exact.indices, found.indices, strict=True)])
    assert found.recall == pytest.approx(float(hits.mean()), abs=0.1)
    assert found.recall > 0.3
    assert not bool((found.indices == torch.arange(1500).unsqueeze(1)).any())
    if backend == "faiss_ivf":
        assert found.recall < 1  # a tenth of the cells is not all


@pytest.mark.parametrize("backend", ["faiss", "faiss_hnsw", "torch_cluster"])
def test_rows_of_zeros_have_their_place_in_other_packages(backend: Any) -> None:
    need("torch_cluster" if backend == "torch_cluster" else "faiss")
    x = torch.randn(200, 12).abs()  # no angle above 90 degrees: those to rows of zeros are the largest
    x[::40] = 0
    with pytest.warns(lfm.LFMWarning, match="5 of 200 rows are zero"):
        found = lfm.knn(x, n_neighbors=9, metric="angular", backend=backend)
    assert found.indices[40].tolist() == list(range(9))
    assert found.indices[0].tolist() == list(range(1, 10))
    torch.testing.assert_close(found.distances[::40], torch.full((5, 9), 2**0.5))
    others = torch.arange(200) % 40 != 0
    assert not bool((found.indices[others] % 40 == 0).any())
    assert backend != "faiss_hnsw" or found.recall > 0.5  # type: ignore[attr-defined]


def test_faiss_leaves_a_point_out_by_identity() -> None:
    need("faiss")
    x = torch.randn(5, 3).repeat(8, 1)
    found = lfm.knn(x, n_neighbors=3, backend="faiss")
    assert not bool((found.indices == torch.arange(40).unsqueeze(1)).any())
    assert bool((found.distances == 0).all())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(10, 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    monkeypatch.delitem(sys.modules, "lfm_torch.integrations.faiss", raising=False)
    with pytest.raises(ImportError, match=r'pip install "lfm-torch\[faiss\]"'):
        lfm.knn(x, n_neighbors=2, backend="faiss")
    for name in ("torch_cluster", "torch_sparse", "torch_geometric.data"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r'pip install "lfm-torch\[pyg\]"'):
        lfm.knn(x, n_neighbors=2, backend="torch_cluster")
    for convert in (to_torch_sparse, to_pyg):
        with pytest.raises(ImportError, match=r'pip install "lfm-torch\[pyg\]"'):
            convert(lfm.build_graph(x, n_neighbors=2))


def cluster_like(x: torch.Tensor, y: torch.Tensor, k: int, cosine: bool = False) -> torch.Tensor:
    """What torch_cluster.knn returns: rows of y, and columns of x, nearest first."""
    found = lfm.knn(y, x, n_neighbors=k, metric="cosine" if cosine else "euclidean", backend="reference").indices
    return torch.stack([torch.arange(len(y)).repeat_interleave(k), found.flatten()])


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "angular"])
def test_torch_cluster_backend(metric: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("torch_cluster") is None:  # its answer, where the package itself is not installed
        monkeypatch.setitem(sys.modules, "torch_cluster", stand_in("torch_cluster", knn=cluster_like))
    x, y = torch.randn(40, 5, dtype=torch.float64), torch.randn(30, 5, dtype=torch.float64)
    for other in (None, y):
        ours = lfm.knn(x, other, n_neighbors=7, metric=metric)
        theirs = lfm.knn(x, other, n_neighbors=7, metric=metric, backend="torch_cluster")
        assert torch.equal(ours.indices, theirs.indices)
        torch.testing.assert_close(ours.distances, theirs.distances)
    with pytest.raises(ValueError, match="metric must be a distance"):
        lfm.knn(x, n_neighbors=7, metric="inner_product", backend="torch_cluster")


def stand_in(name: str, **content: Any) -> ModuleType:
    module = ModuleType(name)
    module.__dict__.update(content)
    return module


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_ragged_batch_equals_one_set_after_the_other(metric: str, backend: str) -> None:
    sizes, others = [5, 0, 1, 70, 300], [9, 4, 0, 2, 60]
    offsets, y_offsets = (torch.tensor([0, *np.cumsum(s)]) for s in (sizes, others))
    batch, batch_y = (torch.repeat_interleave(torch.arange(5), torch.tensor(s)) for s in (sizes, others))
    x, y = torch.randn(sum(sizes), 7), torch.randn(sum(others), 7)
    for database, wheres in ((None, [(offsets, None), (batch, None)]), (y, [(offsets, y_offsets), (batch, batch_y)])):
        for where, where_y in wheres:
            found = lfm.knn(x, database, n_neighbors=10, metric=metric, batch=where, batch_y=where_y, backend=backend)
            for s in range(5):
                rows = slice(offsets[s], offsets[s + 1])
                first = offsets[s] if database is None else y_offsets[s]
                most = sizes[s] - 1 if database is None else others[s]
                k = max(0, min(10, most))
                assert bool((found.indices[rows, k:] == -1).all())
                assert bool(found.distances[rows, k:].isinf().all())
                if k and sizes[s]:
                    part = None if database is None else y[y_offsets[s] : y_offsets[s + 1]]
                    one = lfm.knn(x[rows], part, n_neighbors=k, metric=metric)
                    assert torch.equal(found.indices[rows, :k], one.indices + first)
                    assert torch.equal(found.distances[rows, :k], one.distances)


@pytest.mark.parametrize("metric", METRICS)
def test_ragged_gradient(metric: str) -> None:
    x = torch.randn(9, 3, dtype=torch.float64, requires_grad=True)
    batch = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])

    def distances(x: torch.Tensor) -> torch.Tensor:
        found = lfm.knn(x, n_neighbors=3, metric=metric, batch=batch)
        return found.distances[found.indices >= 0]

    assert torch.autograd.gradcheck(distances, (x,))


def test_offsets_of_batch_vectors() -> None:
    assert set_offsets("batch", torch.tensor([0, 0, 2, 2, 2]), 5).tolist() == [0, 2, 2, 5]
    assert set_offsets("batch", torch.tensor([0, 2, 2, 5]), 5).tolist() == [0, 2, 2, 5]
    with pytest.raises(TypeError, match=r"batch must be integers, got torch.float32"):
        set_offsets("batch", torch.zeros(5), 5)
    for wrong in ([1, 0, 0, 0, 0], [0, 0, 0, 0], [-1, 0, 0, 0, 0], []):
        with pytest.raises(ValueError, match="batch must be the set of each of the 5 rows"):
            set_offsets("batch", torch.tensor(wrong, dtype=torch.int64), 5)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch": torch.zeros(10, dtype=torch.int64), "y": torch.randn(10, 3)}, ValueError, "batch_y with y"),
        ({"batch": torch.zeros(10, dtype=torch.int64), "backend": "faiss"}, ValueError, "where batch is given"),
        ({"memory_budget": 1000}, ValueError, "memory_budget must be at least"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be positive"),
        ({"memory_budget": "1G"}, TypeError, "memory_budget must be a number"),
        ({"backend": "fais"}, ValueError, "did you mean 'faiss'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lfm.knn(torch.randn(10, 3), n_neighbors=2, **arguments)


@pytest.mark.parametrize("metric", METRICS)
def test_a_budget_changes_the_way_but_not_the_result(metric: str) -> None:
    x = torch.randn(6000, 10)
    # the least it takes: what the points need, and every thread of this machine
    least = 6000 * (2 * 10 + 50) + (8 << 20) * torch.get_num_threads()
    ample, tight = (lfm.knn(x, n_neighbors=120, metric=metric, memory_budget=b) for b in (least + (1 << 30), least))
    assert torch.equal(ample.indices, tight.indices)
    assert torch.equal(ample.distances, tight.distances)


POINTS = {
    "normal": lambda x: x,
    "of few large features": lambda x: x**7,
    "of all sizes": lambda x: x * torch.logspace(-6, 6, x.shape[1]).unsqueeze(1),
    "in tight clusters": lambda x: x.abs().mul(3).floor() + 1e-3 * x,
    "far from the origin": lambda x: 1e4 + 1e-2 * x,
    # in units of the largest feature over 127 all that is cut off has the sign of what is left: the bound is met
    "cut off alike": lambda x: torch.cat((127 + 0 * x[..., :1], (60.45 + 0.02 * x[..., 1:]) * x[:, :1, 1:].sign()), -1),
    "mostly alike": lambda x: torch.where(torch.arange(x.shape[1]).unsqueeze(1) % 5 > 0, x[:, :1], x),
}


@pytest.mark.parametrize("points", POINTS)
@pytest.mark.parametrize("metric", ["euclidean", "angular", "inner_product"])
def test_a_first_look_in_eight_bits_loses_nothing(points: str, metric: str) -> None:
    """The budget of the other search has no room for it; that way is held against the oracles on smaller sets."""
    x = POINTS[points](torch.randn(1, 4300, 203))
    for y in (None, POINTS[points](torch.randn(1, 4101, 203))):
        looked, plain = (nearest_neighbors(x, y, 9, metric, budget) for budget in (1 << 30, 1 << 20))
        assert torch.equal(looked[0], plain[0])
        assert torch.equal(looked[1], plain[1])


LEVEL = """
import torch, lfm_torch as lfm
for dtype in (torch.float32, torch.float64):
    for n, d, k in ((700, 37, 60), (150, 301, 5), (40, 3, 39)):
        x, y = torch.randn(n, d, dtype=dtype), torch.randn(n + 3, d, dtype=dtype)
        for metric in ("euclidean", "angular", "inner_product"):
            for other in (None, y):
                ours = lfm.knn(x, other, n_neighbors=k, metric=metric, backend="native")
                twin = lfm.knn(x, other, n_neighbors=k, metric=metric, backend="reference")
                torch.testing.assert_close(ours.distances, twin.distances)
                assert (ours.indices == twin.indices).double().mean() > 0.999
    graph = lfm.build_graph(x, n_neighbors=5)
    wanted = graph.to_torch_csr().to_dense() @ y[:n].sin()
    found = y[:n].sin() * graph.degree.unsqueeze(1) - graph.laplacian("unnormalized") @ y[:n].sin()
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
"""


@pytest.mark.parametrize("level", SIMD_LEVELS)
def test_the_code_for_other_machines(level: str) -> None:
    """Every level up to that of this machine, whatever it would choose by itself."""
    if not lfm.build_info().cpu_kernels:
        pytest.skip("the compiled kernels are not there")
    command = [sys.executable, "-c", LEVEL]
    run = subprocess.run(command, env=environment(LFM_TORCH_SIMD=level), capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


PEAK = """
import resource, torch, lfm_torch as lfm
torch.set_num_threads(2)
n, d, k = 30_000, {d}, 100
x = torch.randn(n, d)
lfm.knn(x[:3000], n_neighbors=k)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = lfm.knn(x, n_neighbors=k, memory_budget={budget})
print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) - 12 * n * k)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss has other units elsewhere")
@pytest.mark.parametrize(("d", "budget"), [(128, 1 << 30), (128, 40 << 20), (256, 1 << 30)])
def test_peak_memory_is_as_the_docstring_says(d: int, budget: int) -> None:
    n, k = 30_000, 100
    code = PEAK.format(d=d, budget=budget)
    run = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    lists = int(n * 8 * (1.5 * k + 10 * k**0.5 + 64)) if budget == 1 << 30 else 0
    points = 2 * d + 50 if d == 128 else 5 * d + 64  # with a first look
    assert int(run.stdout) < n * points + lists + 2 * (10 << 20)


def test_knn_graph_as_torch_cluster_has_it() -> None:
    x = torch.randn(60, 4)
    batch = torch.repeat_interleave(torch.arange(3), torch.tensor([40, 17, 3]))
    for loop in (False, True):
        for cosine in (False, True):
            edges = knn_graph(x, 5, batch=batch, loop=loop, cosine=cosine)
            assert torch.equal(edges.flip(0), knn_graph(x, 5, batch, loop, "target_to_source", cosine))
            neighbor, center = edges
            assert bool((center.diff() >= 0).all())
            assert torch.equal(batch[neighbor], batch[center])
            wanted = [min(5, size - (not loop)) for size in (40, 17, 3) for _ in range(size)]
            assert torch.bincount(center).tolist() == wanted
            assert bool((neighbor == center).any()) == loop
            points = x / x.norm(dim=1, keepdim=True) if cosine else x
            # as torch_cluster: the k (+ 1) nearest of all, the point itself among them
            table = torch.cdist(points.double(), points.double())
            table[batch.unsqueeze(0) != batch.unsqueeze(1)] = torch.inf
            nearest = table.topk(6, largest=False).indices
            for i in (0, 20, 45, 58):
                mine = neighbor[center == i]
                theirs = nearest[i, : 5 if loop else 6][: len(mine) + (not loop)]
                assert mine.tolist() == (theirs if loop else theirs[1:]).tolist()
    assert torch.equal(knn_graph(x, 5, batch, batch_size=3), knn_graph(x, 5, batch))
    with pytest.raises(ValueError, match="batch_size must be at least 3, the sets of batch, got 2"):
        knn_graph(x, 5, batch, batch_size=2)
    assert knn_graph(x, 1, loop=True).tolist() == [list(range(60))] * 2
    assert knn_graph(x[:1], 3).shape == (2, 0)
    assert knn_graph(torch.randn(300, 2), k=250).shape == (2, 300 * 250)


@pytest.mark.parametrize("form", ["torch_csr", pytest.param("scipy", marks=needs("scipy"))])
def test_graph_conversions_there_and_back(form: str) -> None:
    graph = lfm.build_graph(torch.randn(2, 30, 3), n_neighbors=4)
    again = getattr(lfm.Graph, f"from_{form}")(getattr(graph, f"to_{form}")())
    assert torch.equal(again.rowptr, graph.rowptr)
    assert torch.equal(again.col, graph.col)
    assert torch.equal(again.weight, graph.weight)
    assert again.n_nodes == 60
    dense = torch.zeros(60, 60).index_put_(tuple(graph.edge_index), graph.weight)
    assert torch.equal(dense, graph.to_torch_csr().to_dense())


@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.eye(3), TypeError, "must be a floating-point torch.sparse_csr tensor, got torch.strided"),
        (torch.ones(2, 3).to_sparse_csr(), ValueError, r"must have shape \[n, n\], got \[2, 3\]"),
        (torch.tensor([[0.0, 1.0], [2.0, 0.0]]).to_sparse_csr(), ValueError, "must be symmetric"),
        (torch.tensor([[0.0, -1.0], [-1.0, 0.0]]).to_sparse_csr(), ValueError, "not negative"),
        (torch.eye(2).to_sparse_csr(), ValueError, "nothing on the diagonal"),
        (torch.tensor([[0.0, torch.nan], [torch.nan, 0.0]]).to_sparse_csr(), ValueError, "finite"),
        (torch.tensor([[0.0, torch.inf], [torch.inf, 0.0]]).to_sparse_csr(), ValueError, "finite"),
        (torch.tensor([[0, 1j], [1j, 0]]).to_sparse_csr(), TypeError, "of torch.complex64"),
    ],
)
def test_a_matrix_that_is_no_graph(matrix: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        lfm.Graph.from_torch_csr(matrix)


@pytest.mark.parametrize("dtype", ["complex64", "complex128", "int64", "bool"])
def test_scipy_weights_must_be_real_numbers(dtype: str) -> None:
    need("scipy")
    import scipy.sparse as sparse

    with pytest.raises(TypeError, match=f"matrix must be float32 or float64, got {dtype}"):
        lfm.Graph.from_scipy(sparse.csr_matrix([[0, 1], [1, 0]]).astype(dtype))


def test_a_matrix_in_no_order_is_the_graph_that_it_means() -> None:
    """Columns out of order, an entry in two parts, and zeros that are written out."""
    need("scipy")
    import scipy.sparse as sparse

    rowptr, columns = [0, 4, 6, 8], [2, 1, 1, 0, 2, 0, 1, 0]
    values = np.array([1.0, 0.5, 1.5, 0.0, 3.0, 2.0, 3.0, 1.0])
    graph = lfm.Graph.from_scipy(sparse.csr_matrix((values, columns, rowptr), shape=(3, 3)))
    assert graph.col.tolist() == [1, 2, 0, 2, 0, 1]
    assert graph.weight.tolist() == [2, 1, 2, 3, 1, 3]


class StandInSparse(SimpleNamespace):
    """As much of torch_sparse.SparseTensor as the conversions touch, for where it is not installed."""

    def csr(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        return self.rowptr, self.col, self.value

    def size(self, dim: int) -> int:
        return self.sparse_sizes[dim]


@pytest.fixture
def pyg(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages themselves where they are installed, stand-ins elsewhere."""
    for name, content in (
        ("torch_geometric.data", {"Data": SimpleNamespace}),
        ("torch_sparse", {"SparseTensor": StandInSparse}),
    ):
        if importlib.util.find_spec(name.split(".")[0]) is None:
            monkeypatch.setitem(sys.modules, name, stand_in(name, **content))


def test_pyg_data_and_torch_sparse(pyg: None) -> None:
    graph = lfm.build_graph(torch.randn(2, 20, 3), n_neighbors=4)
    data = to_pyg(graph)
    assert torch.equal(data.edge_index, graph.edge_index)
    assert torch.equal(data.edge_weight, graph.weight)
    assert data.batch.tolist() == [0] * 20 + [1] * 20
    sparse = to_torch_sparse(graph)
    back = from_torch_sparse(sparse)
    assert torch.equal(back.rowptr, graph.rowptr)
    assert torch.equal(back.col, graph.col)
    assert torch.equal(back.weight, graph.weight)
    back = from_pyg(data)
    assert torch.equal(back.to_torch_csr().to_dense(), graph.to_torch_csr().to_dense())
    assert back.offsets is not None
    assert back.offsets.tolist() == [0, 20, 40]
    assert torch.equal(to_pyg(back).batch, data.batch)
    data.batch = torch.arange(40) // 39
    with pytest.raises(ValueError, match="an edge between two"):
        from_pyg(data)
    data = to_pyg(lfm.build_graph(torch.randn(9, 3), n_neighbors=2))
    data.edge_weight = None
    assert from_pyg(data).weight.unique().tolist() == [1]


@pytest.mark.parametrize(
    ("loop", "cosine", "flow"), [(False, False, "source_to_target"), (True, True, "target_to_source")]
)
def test_knn_graph_is_that_of_torch_cluster_itself(loop: bool, cosine: bool, flow: Any) -> None:
    cluster = need("torch_cluster")
    x, batch = torch.randn(90, 5), torch.arange(90) // 40
    # it refuses cosine on the CPU: unit rows have the same neighbours
    points = x / x.norm(dim=1, keepdim=True) if cosine else x
    wanted = cluster.knn_graph(points, 6, batch=batch, loop=loop, flow=flow)
    found = knn_graph(x, 6, batch=batch, loop=loop, cosine=cosine, flow=flow)
    assert set(map(tuple, found.T.tolist())) == set(map(tuple, wanted.T.tolist()))
    row = 1 if flow == "source_to_target" else 0
    assert torch.equal(found[row], wanted[row])
