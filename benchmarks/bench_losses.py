"""Alignment losses, forward and backward: the exact one, the Dirichlet energy, and linear CKA beside them."""

from __future__ import annotations

import harness
import torch

from lfm_torch.baselines import linear_cka
from lfm_torch.losses import DirichletAlignmentLoss, LFMAlignmentLoss


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    n, d, m = (128, 32, 8) if args.quick else (512, 128, 32)
    generator = torch.Generator().manual_seed(0)
    # ten clusters, as classes make them
    labels = torch.randint(10, (n,), generator=generator)
    z = torch.randn(10, 64, generator=generator)[labels] * 0.7 + torch.randn(n, 64, generator=generator)
    x = (z @ torch.randn(64, d, generator=generator) / 8).to(args.device).requires_grad_()
    target = z.tanh().to(args.device)
    exact, dirichlet = LFMAlignmentLoss(n_basis=m), DirichletAlignmentLoss(n_basis=m)
    basis = exact.target_basis(target)
    contenders = {
        "exact": lambda: exact(x, target).backward(),
        "exact, basis of the target given": lambda: exact(x, basis).backward(),
        "Dirichlet": lambda: dirichlet(x, target).backward(),
        "Dirichlet, basis of the target given": lambda: dirichlet(x, basis).backward(),
        "linear CKA": lambda: (1 - linear_cka(x, target)).backward(),
    }
    seconds = harness.interleaved(contenders, 4 * args.repeats)
    rows = [
        {"what": name, "milliseconds": 1e3 * harness.median(times), "n": n, "d": d, "n_basis": m}
        for name, times in seconds.items()
    ]
    rows[3]["times cheaper than exact"] = harness.ratio(
        seconds, "exact, basis of the target given", "Dirichlet, basis of the target given"
    )
    harness.write("losses", rows, args=args)


if __name__ == "__main__":
    main()
