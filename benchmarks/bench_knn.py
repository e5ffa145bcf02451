"""Exact neighbours and the graph made of them, against what people use today.

Peers: faiss IndexFlat (normalised rows and inner products for "angular"), a chunked matmul with topk, scikit-learn's
brute force, and for many small sets a loop over cdist with topk; for the graph SciPy. The k-th distances of all are
compared before anything is timed. On a GPU also larger sets, and the matmul in TF32, whose answer is another: how far
off it is stands beside its time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import harness
import numpy as np
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.graphs.graph import graph_from_neighbors

CHUNK = 1024  # rows of the matmul peer: the fastest of 256 to 4096 here
CHUNK_ON_GPU = 4096  # products large enough to fill it, and 1.6 GB where there are 100,000 columns
INEXACT = "matmul in TF32 + topk"


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
    chunk = CHUNK_ON_GPU if x.is_cuda else CHUNK
    parts = []
    for start in range(0, len(points), chunk):
        rows = points[start : start + chunk]
        tile = torch.addmm(squares.unsqueeze(0), rows, points.T, alpha=-2)
        tile.diagonal(offset=start).fill_(torch.inf)
        values = torch.topk(tile, k, largest=False).values + squares[start : start + chunk].unsqueeze(1)
        parts.append(values.clamp_min(0).sqrt())
    return torch.cat(parts)


def matmul_tf32_topk(x: Tensor, k: int, metric: str) -> Tensor:
    with harness.tf32():
        return matmul_topk(x, k, metric)


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
) -> Iterator[harness.Row]:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    worst = differences(x, k, metric, peers) if peers else {"float64, some rows": difference_of_rows(x, k)}
    assert all(value < 1e-4 for name, value in worst.items() if name != INEXACT), worst
    contenders = {"lfm_torch": ours} | peers
    runs = {name: lambda f=f: f(x, k, metric) for name, f in contenders.items()}
    seconds = harness.interleaved(runs, repeats, calls=1 if len(shape) == 3 else 0, device=device)
    size = {"what": "knn", "shape": "x".join(map(str, shape)), "n_neighbors": k, "metric": metric}
    for name, times in seconds.items():
        yield {
            **size,
            "who": name,
            "seconds": harness.median(times),
            "lfm_torch is faster by": harness.ratio(seconds, name, "lfm_torch"),
            **harness.calibration(times),
            **({"not exact, by": worst[name]} if name == INEXACT else {}),
        }


def differences(x: Tensor, k: int, metric: str, peers: dict[str, Callable[..., Tensor]]) -> dict[str, float]:
    """Largest difference of each peer's distances from ours, relative to the largest distance."""
    exact = ours(x, k, metric)
    return {name: float((peer(x, k, metric) - exact).abs().max() / exact.max()) for name, peer in peers.items()}


def difference_of_rows(x: Tensor, k: int, some: int = 64) -> float:
    """The same of some rows from all distances to them in float64, where no peer finds those of all rows."""
    rows = torch.linspace(0, len(x) - 1, some, device=x.device).long()
    double = x.double()
    squares = double.square().sum(1) - 2 * double[rows] @ double.T + double[rows].square().sum(1, keepdim=True)
    squares[torch.arange(some, device=x.device), rows] = torch.inf
    exact = torch.topk(squares, k, largest=False).values.sqrt()
    return float((ours(x, k, "euclidean")[rows] - exact).abs().max() / exact.max())


def scipy_graph(indices: np.ndarray, distances: np.ndarray) -> tuple[Any, np.ndarray]:
    import scipy.sparse as sp

    n, k = indices.shape
    weights = np.exp(-4 * (distances / distances[:, -1:]) ** 2)
    directed = sp.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    graph = ((directed + directed.T) / 2).tocsr()
    return graph, np.asarray(graph.sum(1)).ravel()


def graph_rows(n: int, d: int, k: int, repeats: int, device: str) -> Iterator[harness.Row]:
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
        device=device,
    )
    for name, times in seconds.items():
        yield {
            "what": "graph",
            "shape": f"{n}x{d}",
            "n_neighbors": k,
            "metric": "angular",
            "who": name,
            "seconds": harness.median(times),
            "lfm_torch is faster by": harness.ratio(seconds, name, "lfm_torch"),
            **harness.calibration(times),
        }


def faiss_runs_on(device: str) -> bool:
    if find_spec("faiss") is None:
        return False
    import faiss

    return device == "cpu" or hasattr(faiss, "StandardGpuResources")


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    small, device = args.quick, args.device
    large: dict[str, Callable[..., Tensor]] = {"matmul + topk": matmul_topk}
    if faiss_runs_on(device):
        large = {"faiss": faiss_flat} | large
    if device == "cuda":
        large[INEXACT] = matmul_tf32_topk
    others: dict[str, Callable[..., Tensor]] = {}
    if device == "cpu":
        others["scikit-learn"] = sklearn_brute
    elif find_spec("torch_cluster") is not None:
        others["torch_cluster"] = torch_cluster_knn
    n, sets = (2000, 4) if small else (20_000, 64)
    searches: list[tuple[tuple[int, ...], int, str, dict[str, Callable[..., Tensor]]]] = [
        ((n, 512), 300, "euclidean", large),
        ((n, 512), 300, "angular", large),
        ((n, 64), 30, "euclidean", large | others),
        ((sets, 1024, 128), 15, "euclidean", {"cdist + topk loop": cdist_loop}),
    ]
    if device == "cuda" and not small:
        searches.append(((100_000, 768), 300, "euclidean", large))
    with harness.Record("knn", args=args, packages=("faiss-cpu", "scikit-learn", "scipy")) as record:
        for shape, k, metric, peers in searches:
            record.measure(f"knn {shape}", search_rows(shape, k, metric, peers, args.repeats, device))
        if device == "cpu" or find_spec("scipy") is not None:
            record.measure("graph", graph_rows(n, 512, 300, args.repeats, device))
        if device == "cuda" and not small:  # the longest comes last, and alone: no peer ends in the time there is
            record.measure("knn", search_rows((1_000_000, 128), 30, "euclidean", {}, args.repeats, device))


if __name__ == "__main__":
    main()
