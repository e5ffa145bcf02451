"""The Laplacian product against torch CSR (MKL, cuSPARSE) and SciPy CSR, and the fused recurrence against the product.

Graphs of n = 10,000 with 300 neighbours and n = 20,000 with 30, 64 columns in float32; narrower blocks and half storage
beside them. On a GPU also n = 100,000 with 300 neighbours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from torch import Tensor

import lfm_torch as lfm


def torch_csr(laplacian: lfm.Laplacian) -> Tensor:
    """The Laplacian as a torch CSR tensor; on a GPU with indices of 32 bits, with which cuSPARSE is fastest."""
    csr = laplacian.to_torch_csr()
    if not csr.is_cuda:
        return csr
    pointers, columns = csr.crow_indices().int(), csr.col_indices().int()
    return torch.sparse_csr_tensor(pointers, columns, csr.values(), csr.shape, check_invariants=False)


def rows_of(n: int, k: int, widths: tuple[int, ...], repeats: int, device: str) -> Iterator[harness.Row]:
    generator = torch.Generator().manual_seed(0)
    laplacian = lfm.build_graph(torch.randn(n, 64, generator=generator).to(device), n_neighbors=k).laplacian()
    csr = torch_csr(laplacian)
    double = csr.double()
    scipy = laplacian.to_scipy() if device == "cpu" else None
    for columns in widths:
        x, z = (torch.randn(n, columns, generator=generator).to(device) for _ in range(2))
        check(laplacian, csr, double, x, z)
        half = x.bfloat16()
        contenders: dict[str, Callable[[], Any]] = {
            "product": lambda x=x: laplacian @ x,
            "fused recurrence": lambda x=x, z=z: laplacian.apply(x, z, a=0.5, b=-0.25, c=2.0),
            "product, bfloat16 storage": lambda half=half: laplacian @ half,
            "torch CSR": lambda x=x: csr @ x,
        }
        if scipy is not None:
            array = x.numpy()
            contenders["scipy CSR"] = lambda array=array: scipy @ array
        seconds = harness.interleaved(contenders, repeats, calls=10, device=device)
        flops = 2 * laplacian.graph.col.numel() * columns
        for name, times in seconds.items():
            yield {
                "what": name,
                "n": n,
                "n_neighbors": k,
                "columns": columns,
                "ms": 1e3 * harness.median(times),
                "GFLOP/s": flops / harness.median(times) / 1e9,
                "time of ours / this": 1 / harness.ratio(seconds, name, "product"),
                "times slower than ours": harness.ratio(seconds, name, "product"),
                **harness.calibration(times),
            }


def check(laplacian: lfm.Laplacian, csr: Tensor, double: Tensor, x: Tensor, z: Tensor) -> None:
    """All answers against the product in float64."""
    wanted = double @ x.double()
    for name, got, tol in (
        ("product", laplacian @ x, 2e-6),
        ("torch CSR", csr @ x, 2e-6),
        ("bfloat16", (laplacian @ x.bfloat16()).float(), 2e-2),
    ):
        error = float((got - wanted).abs().max() / wanted.abs().max())
        assert error < tol, (name, error)
    fused = laplacian.apply(x, z, a=0.5, b=-0.25, c=2.0)
    torch.testing.assert_close(fused.double(), 0.5 * wanted - 0.25 * x + 2.0 * z, rtol=1e-5, atol=1e-5)


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    sizes = [(10_000, 300), (20_000, 30)] + ([(100_000, 300)] if args.device == "cuda" else [])
    with harness.Record("laplacian", args=args, packages=("scipy",)) as record:
        for n, k in [(1000, 20)] if args.quick else sizes:
            record.measure(f"n = {n}", rows_of(n, k, (64, 16, 8, 1), args.repeats, args.device))


if __name__ == "__main__":
    main()
