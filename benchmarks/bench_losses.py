"""Alignment losses, forward and backward: the exact one, the Dirichlet energy, and linear CKA beside them.

A batch of 512 samples; on a GPU also one of 2,048, wider.
"""

from __future__ import annotations

from collections.abc import Iterator

import harness
import torch

from lfm_torch.baselines import linear_cka
from lfm_torch.losses import DirichletAlignmentLoss, LFMAlignmentLoss


def rows_of(n: int, d: int, m: int, turns: int, device: str) -> Iterator[harness.Row]:
    generator = torch.Generator().manual_seed(0)
    # ten clusters, as classes make them
    labels = torch.randint(10, (n,), generator=generator)
    z = torch.randn(10, 64, generator=generator)[labels] * 0.7 + torch.randn(n, 64, generator=generator)
    x = (z @ torch.randn(64, d, generator=generator) / 8).to(device).requires_grad_()
    target = z.tanh().to(device)
    exact, dirichlet = LFMAlignmentLoss(n_basis=m), DirichletAlignmentLoss(n_basis=m)
    basis = exact.target_basis(target)
    contenders = {
        "exact": lambda: exact(x, target).backward(),
        "exact, basis of the target given": lambda: exact(x, basis).backward(),
        "Dirichlet": lambda: dirichlet(x, target).backward(),
        "Dirichlet, basis of the target given": lambda: dirichlet(x, basis).backward(),
        "linear CKA": lambda: (1 - linear_cka(x, target)).backward(),
    }
    seconds = harness.interleaved(contenders, turns, device=device)
    for name, times in seconds.items():
        row: harness.Row = {"what": name, "milliseconds": 1e3 * harness.median(times), "n": n, "d": d, "n_basis": m}
        if name == "Dirichlet, basis of the target given":
            row["times cheaper than exact"] = harness.ratio(seconds, "exact, basis of the target given", name)
        yield row | harness.calibration(times)


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    sizes = [(512, 128, 32)] + ([(2048, 512, 50)] if args.device == "cuda" else [])
    with harness.Record("losses", args=args) as record:
        for n, d, m in [(128, 32, 8)] if args.quick else sizes:
            record.measure(f"n = {n}", rows_of(n, d, m, 4 * args.repeats, args.device))


if __name__ == "__main__":
    main()
