"""The map solve against SciPy's L-BFGS on the same energy; a large solve; geodesics; alignment without anchors.

L-BFGS gets the energy and its exact gradient in float64, without autograd, from zero (tol as by default); ours must not
end higher. Geodesics: SciPy's Dijkstra on the same graph, the same distances.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator

import harness
import numpy as np
import torch
from scipy.optimize import minimize
from scipy.sparse.csgraph import dijkstra

import lfm_torch as lfm
from lfm_torch.maps.solve import laplacian_mask, multiplication_operators
from lfm_torch.ops import geodesics

LAPLACIAN, COMMUTATIVITY, RIDGE = 1e-2, 1e-1, 1e-6


def spaces(
    n: int, m: int, p: int, dtype: torch.dtype, device: str
) -> tuple[lfm.Basis, lfm.Basis, torch.Tensor, torch.Tensor]:
    """A noisy rotated copy with distances to p common anchors."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 8, generator=generator, dtype=dtype)
    y = x @ torch.linalg.qr(torch.randn(8, 8, generator=generator, dtype=dtype)).Q
    y = y + 0.1 * torch.randn(n, 8, generator=generator, dtype=dtype)
    x, y = x.to(device), y.to(device)
    basis_x, basis_y = (lfm.spectral_basis(lfm.build_graph(z), n_basis=m) for z in (x, y))
    rows = torch.arange(p, device=device)
    return basis_x, basis_y, *(lfm.descriptors.anchor_distances(z, rows) for z in (x, y))


class Energy:
    """The documented energy in NumPy, for L-BFGS."""

    def __init__(self, basis_x: lfm.Basis, basis_y: lfm.Basis, f_x: torch.Tensor, f_y: torch.Tensor) -> None:
        f_x, f_y = f_x / f_x.norm(dim=0), f_y / f_y.norm(dim=0)
        self.p, self.m_x, self.m_y = f_x.shape[1], basis_x.n_basis, basis_y.n_basis
        self.A, self.B = basis_x.project(f_x).cpu().numpy(), basis_y.project(f_y).cpu().numpy()
        self.penalty = (LAPLACIAN * laplacian_mask(basis_x.evals, basis_y.evals).cpu().numpy() + RIDGE) / self.m_x
        self.S_x = multiplication_operators(basis_x, f_x).cpu().numpy()
        self.S_y = multiplication_operators(basis_y, f_y).cpu().numpy()

    def __call__(self, flat: np.ndarray) -> tuple[float, np.ndarray]:
        C = flat.reshape(self.m_y, self.m_x)
        data = C @ self.A - self.B
        gaps = self.S_y @ C - C @ self.S_x
        scale = COMMUTATIVITY / (self.m_x * self.p)
        value = (data**2).sum() / self.p + (self.penalty * C**2).sum() + scale * (gaps**2).sum()
        gradient = 2 * (data @ self.A.T / self.p + self.penalty * C)
        gradient += 2 * scale * ((self.S_y @ gaps).sum(0) - (gaps @ self.S_x).sum(0))
        return value, gradient.ravel()


def solve_rows(repeats: int, device: str, m: int, p: int) -> Iterator[harness.Row]:
    basis_x, basis_y, f_x, f_y = spaces(1000, m, p, torch.float64, device)
    energy = Energy(basis_x, basis_y, f_x, f_y)

    def ours() -> torch.Tensor:
        fmap = lfm.functional_map(
            basis_x, basis_y, f_x, f_y, laplacian_weight=LAPLACIAN, commutativity_weight=COMMUTATIVITY
        )
        return fmap.C

    def peer() -> np.ndarray:
        # the operators are made inside: both start from bases and descriptors
        fresh = Energy(basis_x, basis_y, f_x, f_y)
        return minimize(
            fresh, np.zeros(m * m), jac=True, method="L-BFGS-B", options={"maxiter": 10_000, "maxfun": 10**6}
        ).x

    ends = [energy(ours().cpu().numpy().ravel())[0], energy(peer())[0]]
    assert ends[0] <= ends[1], ends
    seconds = harness.interleaved({"lfm_torch": ours, "scipy L-BFGS": peer}, repeats, device=device)
    size = {"size": f"{m} x {m}, {p} descriptors"}
    for (name, times), end in zip(seconds.items(), ends, strict=True):
        row: harness.Row = {"what": f"map, {name}", **size, "seconds": harness.median(times), "energy": end}
        if name == "lfm_torch":
            row["times faster than peer"] = harness.ratio(seconds, "scipy L-BFGS", "lfm_torch")
        yield row | harness.calibration(times)


def peak(device: str) -> float:
    """GiB that were in use at most: of the process, or of the GPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def large_row(device: str, m: int, p: int) -> Iterator[harness.Row]:
    inputs = spaces(2000, m, p, torch.float32, device)

    def solve() -> lfm.FunctionalMap:
        return lfm.functional_map(*inputs, laplacian_weight=LAPLACIAN, commutativity_weight=COMMUTATIVITY)

    if device == "cuda":
        solve()  # the first one loads kernels and makes handles
        torch.cuda.reset_peak_memory_stats()
    before = peak(device)
    seconds, fmap = harness.once(solve)
    after = peak(device)
    row: harness.Row = {"what": "map, lfm_torch", "size": f"{m} x {m}, {p} descriptors"}
    row |= {"seconds": seconds, "steps": fmap.iterations, "residual": fmap.residual}
    yield row | {"peak GiB": after, "of this, the solve GiB": after - before}


def geodesic_rows(repeats: int, device: str, n: int, k: int, p: int) -> Iterator[harness.Row]:
    x = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).to(device)
    graph = lfm.build_graph(x, n_neighbors=k, metric="euclidean", weights="distance", symmetrize="union")
    sources, matrix = torch.arange(p, device=device), graph.to_scipy()

    def ours() -> torch.Tensor:
        return geodesics(graph.rowptr, graph.col, graph.weight, sources.unsqueeze(0))

    def peer() -> np.ndarray:
        return dijkstra(matrix, directed=True, indices=sources.cpu().numpy())

    np.testing.assert_allclose(ours()[0].T.cpu().numpy(), peer(), rtol=1e-5)
    seconds = harness.interleaved({"lfm_torch": ours, "scipy": peer}, repeats, device=device)
    size = {"size": f"n = {n}, {k} neighbours, {p} sources"}
    for name, times in seconds.items():
        row: harness.Row = {"what": f"geodesics, {name}", **size, "seconds": harness.median(times)}
        if name == "lfm_torch":
            row["times faster than peer"] = harness.ratio(seconds, "scipy", "lfm_torch")
        yield row | harness.calibration(times)


def alignment_row(device: str, n: int, d: int) -> Iterator[harness.Row]:
    generator = torch.Generator().manual_seed(0)
    # a spectrum like that of an embedding, and noise that leaves a tenth of the rows ambiguous
    x = torch.randn(n, d, generator=generator) * torch.logspace(0, -0.8, d)
    order = torch.randperm(n, generator=generator)
    y = x @ torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    y = (y + 0.5 * torch.randn(n, d, generator=generator) * torch.logspace(0, -0.8, d))[order]
    x, y = x.to(device), y.to(device)
    seconds, alignment = harness.once(lambda: lfm.align(x, y, method="coupling"))
    row: harness.Row = {"what": "align, no anchors, lfm_torch", "size": f"n = {n}, d = {d}", "seconds": seconds}
    yield row | {"matched": float((alignment.untrusted.idx_yx.cpu() == order).float().mean())}


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    quick, device = args.quick, args.device
    with harness.Record("maps", args=args, packages=("scipy",)) as record:
        record.measure("map", solve_rows(args.repeats, device, *((20, 10) if quick else (50, 50))))
        record.measure("large map", large_row(device, *((60, 20) if quick else (300, 200))))
        sizes = (500, 20, 5) if quick else (10_000, 50, 20)
        record.measure("geodesics", geodesic_rows(args.repeats, device, *sizes))
        record.measure("align", alignment_row(device, *((300, 20) if quick else (2000, 300))))


if __name__ == "__main__":
    main()
