"""Eigenpairs of the Laplacian against float32 ARPACK and torch.lobpcg at the same residual; warm starts; batches.

50 smallest pairs to a residual of 1e-5 for n = 10,000 with 300 neighbours and n = 20,000 with 30; a warm start from the
basis of the same graph before its weights changed by 5% (normal, independent, symmetric); 32 pairs of 32 graphs with
n = 1,024. ARPACK gets I - L and looks for the largest, the form it is fastest in. Every answer is checked first.
torch.lobpcg, by far the slowest, runs once. ``--case`` measures one part and keeps the rows of the others.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import harness
import numpy as np
import scipy.sparse as sp
import torch
from scipy.sparse.linalg import eigsh

import lfm_torch as lfm

TOL = 1e-5


def arpack(laplacian: sp.csr_matrix, m: int) -> tuple[np.ndarray, np.ndarray]:
    smooth = (sp.identity(laplacian.shape[0], dtype=np.float32, format="csr") - laplacian).tocsr().astype(np.float32)
    evals, evecs = eigsh(smooth, k=m, which="LA", tol=TOL)
    order = np.argsort(-evals)
    return 1 - evals[order], evecs[:, order]


def perturbed(graph: lfm.Graph, size: float) -> lfm.Graph:
    rows = torch.repeat_interleave(torch.arange(graph.n_nodes), graph.rowptr.diff().cpu())
    col = graph.col.long().cpu()
    keys, place = torch.unique(torch.minimum(rows, col) * graph.n_nodes + torch.maximum(rows, col), return_inverse=True)
    change = 1 + size * torch.randn(keys.numel(), generator=torch.Generator().manual_seed(1))
    weight = graph.weight * change.clamp_min(0.1)[place].to(graph.weight.device)
    return lfm.Graph(graph.rowptr, graph.col, weight, graph.n_nodes)


def check(laplacian: sp.csr_matrix, evals: np.ndarray, evecs: np.ndarray, wanted: np.ndarray, tol: float) -> float:
    double = laplacian.astype(np.float64)
    evecs = evecs.astype(np.float64)
    residual = float(np.linalg.norm(double @ evecs - evecs * evals, axis=0).max())
    assert residual <= tol, residual
    assert float(np.abs(evals - wanted).max()) <= 1e-4
    return residual


def single(n: int, k: int, m: int, repeats: int) -> list[dict[str, Any]]:
    points = torch.randn(n, 64, generator=torch.Generator().manual_seed(0))
    graph = lfm.build_graph(points, n_neighbors=k)
    near = perturbed(graph, 0.05)
    csr = graph.laplacian().to_scipy().astype(np.float32)
    tensor = graph.laplacian().to_torch_csr()
    cold = lfm.spectral_basis(graph, n_basis=m)
    wanted = arpack(csr, m)
    start = torch.randn(n, m, generator=torch.Generator().manual_seed(0))

    def torch_lobpcg() -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        # its tolerance is relative to the norms of A and x: this one ends at residuals of 1e-5 to 1e-4
        return torch.lobpcg(tensor, X=start, largest=False, tol=1e-6, niter=200)

    solvers: dict[str, Callable[[], Any]] = {
        "lfm_torch (auto)": lambda: lfm.spectral_basis(graph, n_basis=m),
        "lfm_torch, warm start": lambda: lfm.spectral_basis(near, n_basis=m, warm_start=cold),
        "lfm_torch, perturbed graph, cold": lambda: lfm.spectral_basis(near, n_basis=m),
        "lfm_torch (lobpcg)": lambda: lfm.spectral_basis(graph, n_basis=m, solver="lobpcg"),
        "scipy eigsh, float32": lambda: arpack(csr, m),
    }
    residuals = {}
    for name, solve in solvers.items():
        matrix = near.laplacian().to_scipy() if "warm" in name or "perturbed" in name else csr
        found = solve()
        evals, evecs = found if isinstance(found, tuple) else (found.evals.numpy(), found.evecs.numpy())
        reference = wanted[0] if matrix is csr else lfm.spectral_basis(near, n_basis=m).evals.numpy()
        residuals[name] = check(matrix, evals, evecs, reference, 1.2 * TOL)
    seconds = harness.interleaved(solvers, repeats, calls=1)
    begin = time.perf_counter()
    evals, evecs = torch_lobpcg()
    peer = {"torch.lobpcg": [time.perf_counter() - begin]}
    residuals["torch.lobpcg"] = check(csr, evals.numpy(), evecs.numpy(), wanted[0], 1e-2)
    ours = harness.median(seconds["lfm_torch (auto)"])
    return [
        {
            "what": name,
            "n": n,
            "n_neighbors": k,
            "n_basis": m,
            "seconds": harness.median(times),
            "residual": residuals[name],
            "times slower than auto": harness.median(times) / ours,
        }
        for name, times in (seconds | peer).items()
    ]


def batched(b: int, n: int, m: int, repeats: int) -> list[dict[str, Any]]:
    points = torch.randn(b, n, 16, generator=torch.Generator().manual_seed(0))
    graph = lfm.build_graph(points, n_neighbors=30)
    whole = graph.laplacian().to_scipy().astype(np.float32)
    blocks = [whole[i * n : (i + 1) * n, i * n : (i + 1) * n].tocsr() for i in range(b)]
    basis = lfm.spectral_basis(graph, n_basis=m)
    for i, block in enumerate(blocks):
        check(block, basis.evals[i].numpy(), basis.evecs[i].numpy(), arpack(block, m)[0], 1.2 * TOL)
    seconds = harness.interleaved(
        {
            "lfm_torch (auto)": lambda: lfm.spectral_basis(graph, n_basis=m),
            "loop of scipy eigsh, float32": lambda: [arpack(block, m) for block in blocks],
        },
        repeats,
        calls=1,
    )
    ours = harness.median(seconds["lfm_torch (auto)"])
    return [
        {
            "what": f"{b} graphs: {name}",
            "n": n,
            "n_neighbors": 30,
            "n_basis": m,
            "seconds": harness.median(times),
            "times slower than auto": harness.median(times) / ours,
        }
        for name, times in seconds.items()
    ]


CASES: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "dense": lambda repeats: single(10_000, 300, 50, repeats),
    "sparse": lambda repeats: single(20_000, 30, 50, repeats),
    "batch": lambda repeats: batched(32, 1024, 32, repeats),
}


def others(case: str) -> list[dict[str, Any]]:
    """Rows of the other cases in the results so far."""
    path = harness.RESULTS / "basis.json"
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return [row for row in rows if row["case"] != case]


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0], cases=tuple(CASES))
    if args.quick:
        rows = single(1500, 20, 20, args.repeats) + batched(4, 600, 16, 1)
    elif args.case is None:
        rows = [{"case": case} | row for case, run in CASES.items() for row in run(args.repeats)]
    else:
        rows = others(args.case) + [{"case": args.case} | row for row in CASES[args.case](args.repeats)]
    harness.write("basis" + ("-quick" if args.quick else ""), rows, packages=("scipy",))


if __name__ == "__main__":
    main()
