"""All pairs of many bases, and the chance level of one pair.

Contenders for all pairs: the stacked product with one fused pass (`Maps`), the matrix products that it needs alone, and
a Python loop over pairs with the same formulas; on a GPU the first with products in TF32 as well. Equal answers are
asserted first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import harness
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.measures.map_readings import heat, overlap
from lfm_torch.measures.map_readings import lfm as lfm_reading
from lfm_torch.measures.stacked_maps import HEAT_TIME, Maps

SIDE = 32


def stacked(evecs: Tensor, evals: Tensor, side: int = SIDE) -> Tensor:
    """The three default measures of all pairs x <= y, block by block."""
    count = len(evecs)
    out = evecs.new_zeros(3, count, count)
    for i in range(0, count, side):
        for j in range(i, count, side):
            maps = Maps.between(evecs[i : i + side], evals[i : i + side], evecs[j : j + side], evals[j : j + side])
            values = (lfm_reading(maps, symmetric=True, centered=True), overlap(maps), heat(maps))
            for k, value in enumerate(values):
                out[k, i : i + side, j : j + side] = value.mT
    return out


def products(evecs: Tensor, side: int = SIDE) -> None:
    """The matrix products of the same blocks: the maps, and the two Gram matrices of each."""
    count, m = evecs.shape[:2]
    for i in range(0, count, side):
        for j in range(i, count, side):
            x, y = evecs[i : i + side].flatten(0, 1), evecs[j : j + side].flatten(0, 1)
            C = (y @ x.mT).view(-1, m, len(x) // m, m).transpose(1, 2)
            torch.matmul(C.mT, C)
            torch.matmul(C, C.mT)


def one_pair(evecs_x: Tensor, evals_x: Tensor, evecs_y: Tensor, evals_y: Tensor) -> list[float]:
    """The three measures in plain PyTorch."""
    C = evecs_y @ evecs_x.mT
    rest = C[1:, 1:]
    grams = (rest.mT @ rest, rest @ rest.mT)
    scores = [gram.diagonal().square().sum() / gram.square().sum() for gram in grams]
    heat_x, heat_y = (
        (-0.75 * HEAT_TIME * evals[1:] / evals[min(29, len(C) - 1)]).exp() for evals in (evals_x, evals_y)
    )
    share_x, share_y = (weights.sum() / (evecs_x.shape[1] - 1) ** 0.5 for weights in (heat_x, heat_y))
    own = (heat_x.square().sum() - share_x**2) * (heat_y.square().sum() - share_y**2)
    kernel = (heat_y @ rest.square() @ heat_x - share_x * share_y) / own.sqrt()
    return [float((scores[0] + scores[1]) / 2), float(C.square().sum() / len(C)), float(kernel)]


def in_tf32(evecs: Tensor, evals: Tensor, side: int) -> Tensor:
    """The same on a GPU with products in TF32."""
    with harness.tf32():
        return stacked(evecs, evals, side)


def loop(evecs: Tensor, evals: Tensor, first: int) -> Tensor:
    """All pairs of the first items, one by one."""
    out = evecs.new_zeros(3, first, first)
    for i in range(first):
        for j in range(i, first):
            out[:, i, j] = torch.tensor(one_pair(evecs[i], evals[i], evecs[j], evals[j]))
    return out


def all_pairs(count: int, n: int, m: int, repeats: int, device: str) -> Iterator[harness.Row]:
    on_gpu = device == "cuda"
    side = 128 if on_gpu else SIDE
    generator = torch.Generator().manual_seed(0)
    base = torch.linalg.qr(torch.randn(n, 2 * m, generator=generator).to(device)).Q
    # related subspaces, so that the measures are neither 0 nor 1
    mixed = base @ torch.linalg.qr(torch.randn(count, 2 * m, m, generator=generator)).Q.to(device)
    evecs, evals = mixed.mT.contiguous(), torch.rand(count, m, generator=generator).sort(-1).values.to(device)
    del mixed

    # a loop over all pairs takes minutes: it is timed on some, and pairs of it all cost the same
    first = min(count, 48)
    whole, single = stacked(evecs[:first], evals[:first], 16), loop(evecs, evals, first)
    upper = torch.triu(torch.ones(first, first, dtype=torch.bool, device=device))
    assert torch.allclose(whole[:, upper], single[:, upper], atol=1e-5)
    fmap = FunctionalMap(evecs[1] @ evecs[0].mT, evals[0], evals[1], n_samples=n)
    assert abs(float(lfm.heat_overlap(fmap)) - float(whole[2, 0, 1])) < 1e-5

    contenders: dict[str, Callable[[], Any]] = {
        "all pairs": lambda: stacked(evecs, evals, side),
        "matrix products alone": lambda: products(evecs, side),
        "loop over some pairs": lambda: loop(evecs, evals, first),
    }
    if on_gpu:
        contenders["all pairs, products in TF32"] = lambda: in_tf32(evecs, evals, side)
    seconds = harness.interleaved(contenders, repeats, device=device)
    pairs, some = count * (count + 1) // 2, first * (first + 1) // 2
    share = harness.median(seconds["loop over some pairs"]) / some * pairs
    ours = harness.median(seconds["all pairs"])
    size = {"pairs": pairs, "n": n, "n_basis": m}
    row = {"what": "all pairs", "seconds": ours, **size}
    row["times the products"] = 1 / harness.ratio(seconds, "matrix products alone", "all pairs")
    row["times faster than a loop"] = share / ours
    rows = [
        row,
        {"what": "matrix products alone", "seconds": harness.median(seconds["matrix products alone"]), "pairs": pairs},
        {"what": "Python loop, from some pairs", "seconds": share, "pairs": pairs},
    ]
    if on_gpu:  # pairs cost the same, so that 12,000 bases of this size need not be in memory
        tf32 = harness.median(seconds["all pairs, products in TF32"])
        off = float((in_tf32(evecs[:first], evals[:first], 16) - whole).abs().max())
        rows.append({"what": "all pairs, products in TF32", "seconds": tf32, **size, "not exact, by": off})
        for row in (rows[0], rows[-1]):
            row["seconds for 12,000 bases"] = row["seconds"] / pairs * (12_000 * 12_001 // 2)
    for row, times in zip(rows, seconds.values(), strict=True):
        yield row | harness.calibration(times)


def chance_level(n: int, repeats: int, device: str) -> Iterator[harness.Row]:
    """The chance level of one pair, graphs and bases included."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 64, generator=generator)
    y = x @ torch.randn(64, 64, generator=generator) / 8 + 0.5 * torch.randn(n, 64, generator=generator)
    x, y = x.to(device), y.to(device)
    shuffles = harness.interleaved(
        {
            str(count): lambda count=count: lfm.significance(x, y, n_permutations=count, n_splits=0)
            for count in (2, 10, 100)
        },
        repeats,
        device=device,
    )
    for count, times in shuffles.items():
        row = {"what": f"significance, {count} shuffles", "seconds": harness.median(times), "pairs": 1, "n": n}
        yield row | harness.calibration(times)


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    size = (64, 500, 20) if args.quick else (1500, 10_000, 50) if args.device == "cuda" else (512, 2000, 50)
    with harness.Record("similarity", args=args) as record:
        record.measure("all pairs", all_pairs(*size, args.repeats, args.device))
        record.measure("significance", chance_level(1000 if args.quick else 5000, args.repeats, args.device))


if __name__ == "__main__":
    main()
