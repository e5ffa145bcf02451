"""Eigenpairs of the Laplacian against float32 ARPACK and torch.lobpcg at the same residual; warm starts; batches.

50 smallest pairs to a residual of 1e-5 for n = 10,000 with 300 neighbours and n = 20,000 with 30; a warm start from the
basis of the same graph before its weights changed by 5% (normal, independent, symmetric); 32 pairs of 32 graphs with
n = 1,024. ARPACK gets I - L and looks for the largest, the form it is fastest in. Answers are checked first, against
eigenvalues in float64. torch.lobpcg, by far the slowest, runs once. ``--case`` measures one part and keeps the rows of
the others.

On a GPU n = 100,000 with 300 neighbours and n = 20,000 with 30, and 64 graphs with n = 4,096. There answers are checked
on the device, in float64 and from the weights of the graph alone, and cupyx takes the place of ARPACK.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import harness
import numpy as np
import scipy.sparse as sp
import torch
from bench_laplacian import torch_csr
from scipy.linalg import eigvalsh
from scipy.sparse.linalg import eigsh
from torch import Tensor

import lfm_torch as lfm

TOL = 1e-5
# on a GPU: seconds after which torch.lobpcg is stopped as far as it is, and steps of Lanczos that cupyx may take
LOBPCG_SECONDS, LANCZOS_STEPS = 12.0, 4000

Pairs = tuple[Tensor, Tensor]


def arpack(smooth: sp.csr_matrix, m: int, tol: float = TOL) -> tuple[np.ndarray, np.ndarray]:
    """The m smallest pairs of L from ``smooth = I - L``, whose largest ARPACK finds fastest.

    The start is fixed: ARPACK draws its own anew each time, and at a tolerance of 1e-5 in float32 one start in some
    20,000 skips an eigenvalue (n = 600, 16 pairs).
    """
    start = np.random.default_rng(0).uniform(-1, 1, smooth.shape[0]).astype(smooth.dtype)
    evals, evecs = eigsh(smooth, k=m, which="LA", tol=tol, v0=start)
    order = np.argsort(-evals)
    return 1 - evals[order], evecs[:, order]


def smooth_of(laplacian: sp.csr_matrix, dtype: type[np.floating] = np.float32) -> sp.csr_matrix:
    return (sp.identity(laplacian.shape[0], dtype=dtype, format="csr") - laplacian).tocsr().astype(dtype)


def oracle(laplacian: sp.csr_matrix, m: int) -> np.ndarray:
    """The m smallest eigenvalues in float64: LAPACK's while a dense matrix is quick, ARPACK's to 1e-10 beyond."""
    if laplacian.shape[0] <= 2000:
        return eigvalsh(laplacian.toarray().astype(np.float64), subset_by_index=(0, m - 1))
    return arpack(smooth_of(laplacian, np.float64), m, tol=1e-10)[0]


def perturbed(graph: lfm.Graph, size: float) -> lfm.Graph:
    rows = torch.repeat_interleave(torch.arange(graph.n_nodes, device=graph.col.device), graph.rowptr.diff())
    col = graph.col.long()
    keys, place = torch.unique(torch.minimum(rows, col) * graph.n_nodes + torch.maximum(rows, col), return_inverse=True)
    change = 1 + size * torch.randn(keys.numel(), generator=torch.Generator().manual_seed(1))
    weight = graph.weight * change.clamp_min(0.1).to(graph.weight.device)[place]
    return lfm.Graph(graph.rowptr, graph.col, weight, graph.n_nodes)


def check(laplacian: sp.csr_matrix, evals: np.ndarray, evecs: np.ndarray, wanted: np.ndarray, tol: float) -> float:
    double = laplacian.astype(np.float64)
    evecs = evecs.astype(np.float64)
    residual = float(np.linalg.norm(double @ evecs - evecs * evals, axis=0).max())
    assert residual <= tol, residual
    assert float(np.abs(evals - wanted).max()) <= 1e-4
    return residual


def single(n: int, k: int, m: int, repeats: int) -> Iterator[harness.Row]:
    points = torch.randn(n, 64, generator=torch.Generator().manual_seed(0))
    graph = lfm.build_graph(points, n_neighbors=k)
    near = perturbed(graph, 0.05)
    csr, near_csr = (one.laplacian().to_scipy().astype(np.float32) for one in (graph, near))
    smooth = smooth_of(csr)
    wanted, near_wanted = oracle(csr, m), oracle(near_csr, m)
    cold = lfm.spectral_basis(graph, n_basis=m)
    solvers: dict[str, Callable[[], Any]] = {
        "lfm_torch (auto)": lambda: lfm.spectral_basis(graph, n_basis=m),
        "lfm_torch, warm start": lambda: lfm.spectral_basis(near, n_basis=m, warm_start=cold),
        "lfm_torch, perturbed graph, cold": lambda: lfm.spectral_basis(near, n_basis=m),
        "lfm_torch (lobpcg)": lambda: lfm.spectral_basis(graph, n_basis=m, solver="lobpcg"),
        "scipy eigsh, float32": lambda: arpack(smooth, m),
    }
    residuals = {}
    for name, solve in solvers.items():
        matrix, reference = (near_csr, near_wanted) if "warm" in name or "perturbed" in name else (csr, wanted)
        found = solve()
        evals, evecs = found if isinstance(found, tuple) else (found.evals.numpy(), found.evecs.numpy())
        residuals[name] = check(matrix, evals, evecs, reference, 1.2 * TOL)
    seconds = harness.interleaved(solvers, repeats, calls=1)
    ours = harness.median(seconds["lfm_torch (auto)"])

    def row(name: str, spent: float) -> harness.Row:
        size = {"what": name, "n": n, "n_neighbors": k, "n_basis": m}
        return size | {"seconds": spent, "residual": residuals[name], "times slower than auto": spent / ours}

    yield from (row(name, harness.median(times)) for name, times in seconds.items())
    spent, (evals, evecs) = harness.once(torch_lobpcg(graph, m))
    residuals["torch.lobpcg"] = check(csr, evals.numpy(), evecs.numpy(), wanted, 1e-2)
    yield row("torch.lobpcg", spent)


def batched(b: int, n: int, m: int, repeats: int) -> Iterator[harness.Row]:
    points = torch.randn(b, n, 16, generator=torch.Generator().manual_seed(0))
    graph = lfm.build_graph(points, n_neighbors=30)
    whole = graph.laplacian().to_scipy().astype(np.float32)
    blocks = [whole[i * n : (i + 1) * n, i * n : (i + 1) * n].tocsr() for i in range(b)]
    basis = lfm.spectral_basis(graph, n_basis=m)
    smooth = [smooth_of(block) for block in blocks]
    for i, block in enumerate(blocks):
        check(block, basis.evals[i].numpy(), basis.evecs[i].numpy(), oracle(block, m), 1.2 * TOL)
    seconds = harness.interleaved(
        {
            "lfm_torch (auto)": lambda: lfm.spectral_basis(graph, n_basis=m),
            "loop of scipy eigsh, float32": lambda: [arpack(block, m) for block in smooth],
        },
        repeats,
        calls=1,
    )
    ours = harness.median(seconds["lfm_torch (auto)"])
    for name, times in seconds.items():
        yield {
            "what": f"{b} graphs: {name}",
            "n": n,
            "n_neighbors": 30,
            "n_basis": m,
            "seconds": harness.median(times),
            "times slower than auto": harness.median(times) / ours,
        }


def errors_of(graph: lfm.Graph, evals: Tensor, evecs: Tensor) -> harness.Row:
    """How far pairs ``[..., m]``, ``[..., n, m]`` are from what they should be, in float64 where they are.

    The Laplacian is made anew of the weights alone, degrees and all, and torch multiplies by it.
    """
    total = graph.rowptr.numel() - 1
    values, vectors = evals.double(), evecs.double()
    parts = (graph.rowptr, graph.col.long(), graph.weight.double())
    weights = torch.sparse_csr_tensor(*parts, (total, total), check_invariants=False)
    degree = weights @ vectors.new_ones(total, 1)
    root = torch.where(degree > 0, degree, torch.inf).rsqrt()
    flat = vectors.reshape(total, -1)
    image = ((degree > 0) * flat - root * (weights @ (root * flat))).view(evecs.shape)
    identity = torch.eye(evecs.shape[-1], dtype=torch.float64, device=evecs.device)
    return {
        "residual": float((image - vectors * values.unsqueeze(-2)).norm(dim=-2).max()),
        "from orthonormal": float((vectors.mT @ vectors - identity).abs().max()),
        "out of order by": float((-values.diff(dim=-1)).clamp_min(0).max()),
    }


def check_on_device(graph: lfm.Graph, evals: Tensor, evecs: Tensor, references: list[Tensor]) -> harness.Row:
    """The errors of pairs, which must be small; of the last graphs also the values, which must be the references'."""
    errors = errors_of(graph, evals, evecs)
    assert errors["residual"] <= 1.2 * TOL, errors
    assert errors["from orthonormal"] <= 1e-4, errors
    assert errors["out of order by"] <= 1e-6, errors
    for wanted in references:
        last = evals.view(-1, evals.shape[-1])[-wanted.numel() // evals.shape[-1] :]
        worst = float((last.double() - wanted.double().view_as(last)).abs().max())
        assert worst <= 1e-4, f"eigenvalues differ by {worst}"
    return errors


def torch_lobpcg(graph: lfm.Graph, m: int, limit: float = float("inf")) -> Callable[[], Pairs]:
    """The solve, which gives the pairs that it has after so many seconds at the latest."""
    laplacian = torch_csr(graph.laplacian())
    start = torch.randn(graph.n_nodes, m, generator=torch.Generator().manual_seed(0)).to(laplacian.device)

    def solve() -> Pairs:
        end = time.perf_counter() + limit

        def stop(worker: Any) -> None:
            harness.synchronize()
            worker.bvars["force_stop"] = time.perf_counter() > end

        torch.manual_seed(0)
        # its tolerance is relative to the norms of A and x: this one ends at residuals of 1e-5 to 1e-4
        return torch.lobpcg(laplacian, X=start, largest=False, tol=1e-6, niter=200, tracker=stop)

    return solve


def cupyx_eigsh(graph: lfm.Graph, m: int) -> Callable[[], Pairs]:
    """The solve, in the form that ARPACK gets; the matrix lies in torch's memory."""
    import cupy
    from cupyx.scipy.sparse import csr_matrix
    from cupyx.scipy.sparse.linalg import eigsh

    _, left, right = graph.laplacian().scalings
    rows = torch.repeat_interleave(torch.arange(graph.n_nodes, device=left.device), graph.rowptr.diff())
    values = left[rows] * graph.weight * right[graph.col.long()]
    parts = tuple(cupy.from_dlpack(part) for part in (values, graph.col, graph.rowptr.int()))
    smooth = csr_matrix(parts, shape=(graph.n_nodes, graph.n_nodes))

    def solve() -> Pairs:
        found = eigsh(smooth, k=m, which="LA", tol=TOL, maxiter=LANCZOS_STEPS)
        evals, evecs = (torch.from_dlpack(part) for part in found)
        order = evals.argsort(descending=True)
        return 1 - evals[order], evecs[:, order]

    solve()  # it compiles its kernels at the first call
    return solve


def ours_on_device(
    size: harness.Row,
    solvers: dict[str, tuple[lfm.Graph, Callable[[], lfm.Basis]]],
    references: dict[int, list[Tensor]],
    repeats: int,
) -> Iterator[harness.Row]:
    """Check each solver, also against those before it on the same graph; time those that are right, in turns."""
    found = {
        name: answer(graph, solve, references.setdefault(id(graph), [])) for name, (graph, solve) in solvers.items()
    }
    yield from ({"what": name, **size, **row} for name, row in found.items() if "error" in row)
    right = {name: solvers[name][1] for name, row in found.items() if "error" not in row}
    for name, times in harness.interleaved(right, repeats, device="cuda").items():
        row = {"what": name, **size, "seconds": harness.median(times), **found[name]}
        yield row | harness.calibration(times)


def answer(graph: lfm.Graph, solve: Callable[[], lfm.Basis], known: list[Tensor]) -> harness.Row:
    """How good the answer of a solver is, which is known from here on; what failed does not keep the others back."""
    try:
        basis = solve()
        errors = check_on_device(graph, basis.evals, basis.evecs, known)
    except Exception as error:
        return {"error": harness.failure(error)}
    known.append(basis.evals)
    return errors | {"solver": basis.solver, "steps": basis.iterations}


def peer_on_device(
    name: str, size: harness.Row, graphs: list[lfm.Graph], make: Callable[[lfm.Graph], Callable[[], Pairs]], share: int
) -> harness.Row:
    """One run of a peer over some graphs, one of ``share``; how good its answer is stands beside its time."""
    row = {"what": name, **size}
    try:
        solves = [make(graph) for graph in graphs]
        spent, found = harness.once(lambda: [solve() for solve in solves])
        errors = [errors_of(graph, *pairs) for graph, pairs in zip(graphs, found, strict=True)]
        return row | {"seconds": spent * share} | {key: max(e[key] for e in errors) for key in errors[0]}
    except Exception as error:
        return row | {"error": harness.failure(error)}


def no_cupy(size: harness.Row) -> harness.Row:
    return {"what": "cupyx eigsh", **size, "note": "cupy is not installed"}


def single_on_device(n: int, k: int, m: int, repeats: int, device: str) -> Iterator[harness.Row]:
    points = torch.randn(n, 64, generator=torch.Generator().manual_seed(0)).to(device)
    graph = lfm.build_graph(points, n_neighbors=k)
    near = perturbed(graph, 0.05)
    size = {"n": n, "n_neighbors": k, "n_basis": m}

    @functools.cache
    def cold() -> lfm.Basis:
        return lfm.spectral_basis(graph, n_basis=m)

    solvers: dict[str, tuple[lfm.Graph, Callable[[], lfm.Basis]]] = {
        "lfm_torch (auto)": (graph, lambda: lfm.spectral_basis(graph, n_basis=m)),
        "lfm_torch (lobpcg)": (graph, lambda: lfm.spectral_basis(graph, n_basis=m, solver="lobpcg")),
        "lfm_torch (krylov)": (graph, lambda: lfm.spectral_basis(graph, n_basis=m, solver="krylov")),
        "lfm_torch, perturbed graph, cold": (near, lambda: lfm.spectral_basis(near, n_basis=m)),
        "lfm_torch, warm start": (near, lambda: lfm.spectral_basis(near, n_basis=m, warm_start=cold())),
    }
    yield from ours_on_device(size, solvers, {}, repeats)
    if find_spec("cupy") is None:
        yield no_cupy(size)
    else:
        yield peer_on_device("cupyx eigsh", size, [graph], lambda one: cupyx_eigsh(one, m), 1)
    name = f"torch.lobpcg, at most {LOBPCG_SECONDS:.0f} s"
    yield peer_on_device(name, size, [graph], lambda one: torch_lobpcg(one, m, LOBPCG_SECONDS), 1)


def batched_on_device(b: int, n: int, m: int, repeats: int, device: str) -> Iterator[harness.Row]:
    points = torch.randn(b, n, 16, generator=torch.Generator().manual_seed(0)).to(device)
    graph = lfm.build_graph(points, n_neighbors=30)
    size = {"graphs": b, "n": n, "n_neighbors": 30, "n_basis": m}
    graphs = graph.unbatch()
    # all values of one graph: a pair that the solvers miss alike would not show between them
    exact = torch.linalg.eigvalsh(graphs[-1].to(torch.float64).laplacian().to_dense())[:m]
    solvers: dict[str, tuple[lfm.Graph, Callable[[], lfm.Basis]]] = {
        "lfm_torch (auto)": (graph, lambda: lfm.spectral_basis(graph, n_basis=m)),
        "lfm_torch (krylov)": (graph, lambda: lfm.spectral_basis(graph, n_basis=m, solver="krylov")),
    }
    yield from ours_on_device(size, solvers, {id(graph): [exact]}, repeats)
    some = graphs[: max(1, b // 8)]  # graphs of one size cost the same

    def alone(one: lfm.Graph) -> Callable[[], Pairs]:
        def solve() -> Pairs:
            basis = lfm.spectral_basis(one, n_basis=m)
            return basis.evals, basis.evecs

        return solve

    share = b // len(some)
    yield peer_on_device(f"lfm_torch, one by one, from {len(some)}", size, some, alone, share)
    if find_spec("cupy") is None:
        yield no_cupy(size)
    else:
        name = f"cupyx eigsh, one by one, from {len(some)}"
        yield peer_on_device(name, size, some, lambda one: cupyx_eigsh(one, m), share)


def cases(device: str, quick: bool, repeats: int) -> dict[str, Iterator[harness.Row]]:
    """The parts of the benchmark; nothing runs before its rows are asked for."""
    if device == "cpu":
        if quick:
            return {"sparse": single(1500, 20, 20, repeats), "batch": batched(4, 600, 16, 1)}
        return {
            "dense": single(10_000, 300, 50, repeats),
            "sparse": single(20_000, 30, 50, repeats),
            "batch": batched(32, 1024, 32, repeats),
        }
    if quick:
        return {
            "sparse": single_on_device(1500, 20, 20, repeats, device),
            "batch": batched_on_device(4, 600, 16, repeats, device),
        }
    return {
        "sparse": single_on_device(20_000, 30, 50, repeats, device),
        "batch": batched_on_device(64, 4096, 32, repeats, device),
        "dense": single_on_device(100_000, 300, 50, repeats, device),
    }


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0], cases=("dense", "sparse", "batch"))
    with harness.Record("basis", args=args, packages=("scipy",)) as record:
        for case, rows in cases(args.device, args.quick, args.repeats).items():
            if args.case in (None, case):
                record.measure(case, rows, case=case)


if __name__ == "__main__":
    main()
