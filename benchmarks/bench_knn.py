"""Exact neighbours and the graph made of them, against what people use today.

Peers: faiss IndexFlat (normalised rows and inner products for "angular"), a chunked matmul with topk, scikit-learn's
brute force, and for many small sets a loop over cdist with topk; for the graph SciPy. The k-th distances of all are
compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import faiss
import harness
import numpy as np
import scipy.sparse as sp
import torch
from sklearn.neighbors import NearestNeighbors
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.graph import graph_from_neighbors

CHUNK = 1024  # rows of the matmul peer: the fastest of 256 to 4096 here


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def faiss_flat(x: Tensor, k: int, metric: str) -> Tensor:
    """Distances [n, k]; faiss finds the point itself too, which is left out of the k + 1."""
    points = (unit(x) if metric == "angular" else x).numpy()
    index = faiss.IndexFlatIP(points.shape[1]) if metric == "angular" else faiss.IndexFlatL2(points.shape[1])
    index.add(points)
    found = torch.from_numpy(index.search(points, k + 1)[0])[:, 1:]
    return ((2 - 2 * found) if metric == "angular" else found).clamp_min(0).sqrt()


def matmul_topk(x: Tensor, k: int, metric: str) -> Tensor:
    points = unit(x) if metric == "angular" else x
    squares = points.square().sum(1)
    parts = []
    for start in range(0, len(points), CHUNK):
        rows = points[start : start + CHUNK]
        tile = torch.addmm(squares.unsqueeze(0), rows, points.T, alpha=-2)
        tile[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = torch.inf
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
    points = unit(x) if metric == "angular" else x
    search = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(points.numpy())
    return torch.from_numpy(search.kneighbors()[0])


def ours(x: Tensor, k: int, metric: str) -> Tensor:
    return lfm.knn(x, n_neighbors=k, metric=metric).distances


def search_rows(
    shape: tuple[int, ...], k: int, metric: str, peers: dict[str, Callable[..., Tensor]], repeats: int
) -> list[dict[str, Any]]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    exact = ours(x, k, metric)
    for name, peer in peers.items():
        found = peer(x, k, metric)
        worst = float((found - exact).abs().max() / exact.max())
        assert worst < 1e-4, (name, worst)
    contenders = {"lfm_torch": ours} | peers
    seconds = harness.interleaved({name: lambda f=f: f(x, k, metric) for name, f in contenders.items()}, repeats)
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


def scipy_graph(indices: np.ndarray, distances: np.ndarray) -> tuple[sp.csr_matrix, np.ndarray]:
    n, k = indices.shape
    weights = np.exp(-4 * (distances / distances[:, -1:]) ** 2)
    directed = sp.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    graph = ((directed + directed.T) / 2).tocsr()
    return graph, np.asarray(graph.sum(1)).ravel()


def graph_rows(n: int, d: int, k: int, repeats: int) -> list[dict[str, Any]]:
    """Weights, symmetrisation and degrees from neighbours already found; the search itself for comparison."""
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    neighbors = lfm.knn(x, n_neighbors=k, metric="angular")
    arrays = neighbors.indices.numpy(), neighbors.distances.numpy()

    def assemble() -> tuple[lfm.Graph, Tensor]:
        graph = graph_from_neighbors(neighbors, metric="angular")
        return graph, graph.degree

    graph, degree = assemble()
    wanted, wanted_degree = scipy_graph(*arrays)
    wanted.sort_indices()
    assert np.array_equal(graph.col.numpy(), wanted.indices)
    np.testing.assert_allclose(graph.weight.numpy(), wanted.data, rtol=1e-5)
    np.testing.assert_allclose(degree.numpy(), wanted_degree, rtol=1e-5)
    seconds = harness.interleaved(
        {
            "lfm_torch": assemble,
            "scipy": lambda: scipy_graph(*arrays),
            "lfm_torch search": lambda: lfm.knn(x, n_neighbors=k, metric="angular"),
        },
        repeats,
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


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    small = args.quick
    large = {"faiss": faiss_flat, "matmul + topk": matmul_topk}
    rows = []
    n = 2000 if small else 20_000
    for metric in ("euclidean", "angular"):
        rows += search_rows((n, 512), 300, metric, large, args.repeats)
    rows += search_rows((n, 64), 30, "euclidean", large | {"scikit-learn": sklearn_brute}, args.repeats)
    sets = 4 if small else 64
    rows += search_rows((sets, 1024, 128), 15, "euclidean", {"cdist + topk loop": cdist_loop}, args.repeats)
    rows += graph_rows(n, 512, 300, args.repeats)
    packages = ("faiss-cpu", "scikit-learn", "scipy")
    harness.write("knn" + ("-quick" if small else ""), rows, packages=packages)


if __name__ == "__main__":
    main()
