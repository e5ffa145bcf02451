"""The Laplacian product against torch CSR (MKL, cuSPARSE) and SciPy CSR, and the fused recurrence against the product.

Graphs of n = 10,000 with 300 neighbours and n = 20,000 with 30, 64 columns in float32; narrower blocks and half storage
beside them. On a GPU also n = 100,000 with 300 neighbours.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch

import lfm_torch as lfm


def rows_of(n: int, k: int, columns: int, repeats: int, device: torch.device) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(n, 64, generator=generator).to(device)
    laplacian = lfm.build_graph(points, n_neighbors=k).laplacian()
    x, z = (torch.randn(n, columns, generator=generator).to(device) for _ in range(2))
    csr = laplacian.to_torch_csr()
    wanted = csr.double() @ x.double()
    for name, got, tol in (
        ("product", laplacian @ x, 2e-6),
        ("torch CSR", csr @ x, 2e-6),
        ("bfloat16", (laplacian @ x.bfloat16()).float(), 2e-2),
    ):
        error = float((got - wanted).abs().max() / wanted.abs().max())
        assert error < tol, (name, error)
    fused = laplacian.apply(x, z, a=0.5, b=-0.25, c=2.0)
    torch.testing.assert_close(fused.double(), 0.5 * wanted - 0.25 * x + 2.0 * z, rtol=1e-5, atol=1e-5)

    half = x.bfloat16()
    contenders: dict[str, Callable[[], Any]] = {
        "product": lambda: laplacian @ x,
        "fused recurrence": lambda: laplacian.apply(x, z, a=0.5, b=-0.25, c=2.0),
        "product, bfloat16 storage": lambda: laplacian @ half,
        "torch CSR": lambda: csr @ x,
    }
    if device.type == "cpu":
        scipy, array = laplacian.to_scipy(), x.numpy()
        contenders["scipy CSR"] = lambda: scipy @ array
    seconds = harness.interleaved(contenders, repeats, calls=10)
    flops = 2 * laplacian.graph.col.numel() * columns
    return [
        {
            "what": name,
            "n": n,
            "n_neighbors": k,
            "columns": columns,
            "ms": 1e3 * harness.median(times),
            "GFLOP/s": flops / harness.median(times) / 1e9,
            "time of ours / this": 1 / harness.ratio(seconds, name, "product"),
            "times slower than ours": harness.ratio(seconds, name, "product"),
        }
        for name, times in seconds.items()
    ]


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    device = torch.device(args.device)
    sizes = [(10_000, 300), (20_000, 30)] + ([(100_000, 300)] if device.type == "cuda" else [])
    rows = []
    for n, k in [(1000, 20)] if args.quick else sizes:
        for columns in (64, 16, 8, 1):
            rows += rows_of(n, k, columns, args.repeats, device)
    harness.write("laplacian", rows, args=args, packages=("scipy",))


if __name__ == "__main__":
    main()
