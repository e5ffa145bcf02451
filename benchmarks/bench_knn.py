"""Exact neighbours and the graph made of them, against what people use today.

Peers: faiss IndexFlat (normalised rows and inner products for "angular"), a chunked matmul with topk, scikit-learn's
brute force, and for many small sets a loop over cdist with topk; for the graph SciPy. The k-th distances of all are
compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.graph import graph_from_neighbors

CHUNK = 1024  # rows of the matmul peer: the fastest of 256 to 4096 here


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def faiss_flat(x: Tensor, k: int, metric: str) -> Tensor:
    """Distances [n, k]; faiss finds the point itself too, which is left out of the k + 1. On the GPU faiss-gpu."""
    import faiss

    points = (unit(x) if metric == "angular" else x).cpu().numpy()
    index = faiss.IndexFlatIP(points.shape[1]) if metric == "angular" else faiss.IndexFlatL2(points.shape[1])
    if x.is_cuda:
        index = faiss.index_cpu_to_gpu(faiss.StandardGpuResources(), x.device.index or 0, index)
    index.add(points)
    found = torch.from_numpy(index.search(points, k + 1)[0])[:, 1:]
    return ((2 - 2 * found) if metric == "angular" else found).clamp_min(0).sqrt().to(x.device)


def torch_cluster_knn(x: Tensor, k: int, metric: str) -> Tensor:
    from torch_cluster import knn_graph

    neighbor, point = knn_graph(x, k, loop=False)
    return (x[neighbor] - x[point]).norm(dim=1).view(len(x), k).sort(dim=1).values


def matmul_topk(x: Tensor, k: int, metric: str) -> Tensor:
    points = unit(x) if metric == "angular" else x
    squares = points.square().sum(1)
    parts = []
    for start in range(0, len(points), CHUNK):
        rows = points[start : start + CHUNK]
        tile = torch.addmm(squares.unsqueeze(0), rows, points.T, alpha=-2)
        tile.diagonal(offset=start).fill_(torch.inf)
        values = torch.topk(tile, k, largest=False).values + squares[start : start + CHUNK].unsqueeze(1)
        parts.append(values.clamp_min(0).sqrt())
    return torch.cat(parts)


def cdist_loop(x: Tensor, k: int, metric: str) -> Tensor:
    parts = []
    for points in x:
        tile = torch.cdist(points, points)
        tile.fill_diagonal_(torch.inf)
        parts.append(torch.topk(tile, k, largest=False).values)
    return torch.stack(parts)


def sklearn_brute(x: Tensor, k: int, metric: str) -> Tensor:
    from sklearn.neighbors import NearestNeighbors

    points = unit(x) if metric == "angular" else x
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(points.numpy())
    return torch.from_numpy(search.kneighbors()[0])


def ours(x: Tensor, k: int, metric: str) -> Tensor:
    return lfm.knn(x, n_neighbors=k, metric=metric).distances


def search_rows(
    shape: tuple[int, ...], k: int, metric: str, peers: dict[str, Callable[..., Tensor]], repeats: int, device: str
) -> list[dict[str, Any]]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    exact = ours(x, k, metric)
    for name, peer in peers.items():
        found = peer(x, k, metric)
        worst = float((found - exact).abs().max() / exact.max())
        assert worst < 1e-4, (name, worst)
    contenders = {"lfm_torch": ours} | peers
    calls = {name: lambda f=f: f(x, k, metric) for name, f in contenders.items()}
    seconds = harness.interleaved(calls, repeats, calls=1 if len(shape) == 3 else 0)
    size = {"what": "knn", "shape": "x".join(map(str, shape)), "n_neighbors": k, "metric": metric}
    return [
        {
            **size,
            "who": name,
            "seconds": harness.median(times),
            "lfm_torch is faster by": harness.ratio(seconds, name, "lfm_torch"),
        }
        for name, times in seconds.items()
    ]


def scipy_graph(indices: np.ndarray, distances: np.ndarray) -> tuple[Any, np.ndarray]:
    import scipy.sparse as sp

    n, k = indices.shape
    weights = np.exp(-4 * (distances / distances[:, -1:]) ** 2)
    directed = sp.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    graph = ((directed + directed.T) / 2).tocsr()
    return graph, np.asarray(graph.sum(1)).ravel()


def graph_rows(n: int, d: int, k: int, repeats: int, device: str) -> list[dict[str, Any]]:
    """Weights, symmetrisation and degrees from neighbours already found; the search itself for comparison."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0)).to(device)
    neighbors = lfm.knn(x, n_neighbors=k, metric="angular")
    arrays = neighbors.indices.cpu().numpy(), neighbors.distances.cpu().numpy()

    def assemble() -> tuple[lfm.Graph, Tensor]:
        graph = graph_from_neighbors(neighbors, metric="angular")
        return graph, graph.degree

    graph, degree = assemble()
    wanted, wanted_degree = scipy_graph(*arrays)
    wanted.sort_indices()
    assert np.array_equal(graph.col.cpu().numpy(), wanted.indices)
    np.testing.assert_allclose(graph.weight.cpu().numpy(), wanted.data, rtol=1e-5)
    np.testing.assert_allclose(degree.cpu().numpy(), wanted_degree, rtol=1e-5)
    seconds = harness.interleaved(
        {
            "lfm_torch": assemble,
            "scipy": lambda: scipy_graph(*arrays),
            "lfm_torch search": lambda: lfm.knn(x, n_neighbors=k, metric="angular"),
        },
        repeats,
        calls=1,
    )
    return [
        {
            "what": "graph",
            "shape": f"{n}x{d}",
            "n_neighbors": k,
            "metric": "angular",
            "who": name,
            "seconds": harness.median(times),
            "lfm_torch is faster by": harness.ratio(seconds, name, "lfm_torch"),
        }
        for name, times in seconds.items()
    ]


def faiss_runs_on(device: str) -> bool:
    if find_spec("faiss") is None:
        return False
    import faiss

    return device == "cpu" or hasattr(faiss, "StandardGpuResources")


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    small, device = args.quick, args.device

    def rows_of(shape: tuple[int, ...], k: int, metric: str, peers: dict[str, Callable[..., Tensor]]) -> None:
        rows.extend(search_rows(shape, k, metric, peers, args.repeats, device))

    large: dict[str, Callable[..., Tensor]] = {"matmul + topk": matmul_topk}
    if faiss_runs_on(device):
        large = {"faiss": faiss_flat} | large
    others: dict[str, Callable[..., Tensor]] = {}
    if device == "cpu":
        others["scikit-learn"] = sklearn_brute
    elif find_spec("torch_cluster") is not None:
        others["torch_cluster"] = torch_cluster_knn
    rows: list[dict[str, Any]] = []
    n = 2000 if small else 20_000
    for metric in ("euclidean", "angular"):
        rows_of((n, 512), 300, metric, large)
    rows_of((n, 64), 30, "euclidean", large | others)
    sets = 4 if small else 64
    rows_of((sets, 1024, 128), 15, "euclidean", {"cdist + topk loop": cdist_loop})
    if device == "cuda" and not small:
        rows_of((100_000, 768), 300, "euclidean", large)
        rows_of((1_000_000, 128), 30, "euclidean", {})  # no peer ends in the time there is
    if device == "cpu" or find_spec("scipy") is not None:
        rows += graph_rows(n, 512, 300, args.repeats, device)
    harness.write("knn", rows, args=args, packages=("faiss-cpu", "scikit-learn", "scipy"))


if __name__ == "__main__":
    main()
