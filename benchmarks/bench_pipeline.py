"""The default `similarity` against the same steps in scikit-learn and SciPy.

Peer: brute-force neighbours (scikit-learn, float32), symmetrised CSR (SciPy), 50 eigenpairs by ARPACK in float32 with
tol=1e-5 on I - L, largest first (the form ARPACK is fastest in). Both answers are compared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import numpy as np
import scipy.sparse as sp
import torch
from bench_basis import TOL, arpack
from sklearn.neighbors import NearestNeighbors

import lfm_torch as lfm


def peer_basis(x: np.ndarray, k: int, m: int) -> tuple[np.ndarray, np.ndarray, sp.csr_matrix]:
    n = len(x)
    x = x / np.linalg.norm(x, axis=1, keepdims=True)
    distances, indices = NearestNeighbors(n_neighbors=k, algorithm="brute", n_jobs=-1).fit(x).kneighbors()
    weights = np.exp(-4 * (distances / distances[:, -1:]) ** 2)
    directed = sp.csr_matrix((weights.ravel(), indices.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    graph = ((directed + directed.T) / 2).tocsr()
    root = sp.diags(1 / np.sqrt(np.asarray(graph.sum(1)).ravel()))
    smooth = (root @ graph @ root).tocsr().astype(np.float32)
    return *arpack(smooth, m), smooth


def peer_similarity(x: np.ndarray, y: np.ndarray, k: int, m: int) -> dict[str, float]:
    (a, phi_x, _), (b, phi_y, _) = peer_basis(x, k, m), peer_basis(y, k, m)
    c = phi_y.T @ phi_x
    gram = c.T @ c
    heat_x, heat_y = np.exp(-2 * a), np.exp(-2 * b)
    return {
        "lfm_paper": 1 - (np.sum(gram**2) - np.sum(np.diag(gram) ** 2)) / np.sum(gram**2),
        "overlap": np.sum(c**2) / m,
        "heat_raw": heat_y @ c**2 @ heat_x / np.sqrt(np.sum(heat_x**2) * np.sum(heat_y**2)),
    }


def rows_of(n: int, d: int, k: int, m: int, repeats: int, device: str) -> Iterator[harness.Row]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    y = x @ torch.randn(d, d, generator=generator) / d**0.5 + 0.5 * torch.randn(n, d, generator=generator)
    here = [points.to(device) for points in (x, y)]

    ours = lfm.similarity(*here, measures=("lfm_paper", "overlap", "heat_raw"), n_neighbors=k, n_basis=m)
    peer = peer_similarity(x.numpy(), y.numpy(), k, m)
    for name, value in peer.items():
        assert abs(float(ours[name]) - value) < 2e-3, (name, float(ours[name]), value)
    _, evecs, smooth = peer_basis(x.numpy(), k, m)
    residual = np.linalg.norm(smooth @ evecs - evecs * np.sum(evecs * (smooth @ evecs), 0), axis=0).max()
    basis = lfm.spectral_basis(lfm.build_graph(here[0], n_neighbors=k), n_basis=m)
    assert residual <= TOL, residual
    assert float(basis.residuals.max()) <= TOL

    seconds = harness.interleaved(
        {
            "lfm_torch": lambda: lfm.similarity(*here, n_neighbors=k, n_basis=m),
            "sklearn + scipy": lambda: peer_similarity(x.numpy(), y.numpy(), k, m),
        },
        repeats,
        device=device,
    )
    residuals = {"lfm_torch": float(basis.residuals.max()), "sklearn + scipy": float(residual)}
    for name, times in seconds.items():
        row = {"what": name, "seconds": harness.median(times), "n": n, "d": d, "n_neighbors": k, "n_basis": m}
        row["residual"] = residuals[name]
        if name == "lfm_torch":
            row["times faster than peer"] = harness.ratio(seconds, "sklearn + scipy", "lfm_torch")
        yield row | harness.calibration(times)


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    size = (1000, 32, 100, 20) if args.quick else (10_000, 64, 300, 50)
    with harness.Record("pipeline", args=args, packages=("scikit-learn", "scipy")) as record:
        record.measure("similarity", rows_of(*size, args.repeats, args.device))


if __name__ == "__main__":
    main()
