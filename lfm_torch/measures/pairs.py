"""All pairs at once, and the same pairs with shuffled rows: how a measure of a pair is taken over many."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch.baselines.points import State, score_inner, score_kernels
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import PointMeasure
from lfm_torch.ops import inner_products

_BLOCK_BYTES = 256 * 2**20
# terms of inner products that are taken in float64 at a time: the same for any number of vectors
_SLICE = 2**18


def stored(state: State, dtype: torch.dtype) -> State:
    """Keep a state in the precision of its representation: float64 is for computing.

    Rounding every entry of a normalised n x n matrix to single precision moves an inner product by about 1e-8 / n.
    """
    return tuple(part.to(dtype) if part.is_floating_point() else part for part in state)


def score_sides(measure: PointMeasure, x: Sequence[State], y: Sequence[State]) -> Tensor:
    """Score of every x against every y, ``[len(x), len(y)]`` float64 on the CPU.

    On the CPU a value depends on its pair alone, to the last bit, whatever other states there are.
    """
    if measure.score in (score_inner, score_kernels):
        return _checks.within(_inner_products([state[0] for state in x], [state[0] for state in y]), *measure.range)
    values = torch.empty(len(x), len(y), dtype=torch.float64, device="cpu")
    for columns in _alike(y):
        for part in _parts(columns, y[columns[0]]):
            stack = tuple(torch.stack(parts) for parts in zip(*(_doubled(y[j]) for j in part), strict=True))
            for i, state in enumerate(x):
                values[i, part] = measure.score(_doubled(state), stack).cpu()
    return values


def _inner_products(x: Sequence[Tensor], y: Sequence[Tensor]) -> Tensor:
    """All inner products in float64, a slice of all vectors at a time: one product, nothing of n x n per pair."""
    flat_x, flat_y = ([vector.flatten() for vector in side] for side in (x, y))
    total = torch.zeros(len(x), len(y), dtype=torch.float64, device=x[0].device)
    for start in range(0, len(flat_x[0]), _SLICE):
        part = slice(start, start + _SLICE)
        rows, columns = (torch.stack([vector[part] for vector in side]).double() for side in (flat_x, flat_y))
        total += inner_products(rows, columns)
    return total.cpu()


def _alike(states: Sequence[State]) -> list[list[int]]:
    """Positions of states of the same shapes."""
    groups: dict[tuple[torch.Size, ...], list[int]] = {}
    for i, state in enumerate(states):
        groups.setdefault(tuple(part.shape for part in state), []).append(i)
    return list(groups.values())


def _parts(positions: list[int], state: State) -> list[list[int]]:
    # no BLAS or LAPACK promises the same bits for one matrix and for a stack of them
    if not state[0].is_cuda:
        return [[position] for position in positions]
    # the states in float64, and as much again for what is made of them
    size = max(1, _BLOCK_BYTES // (16 * sum(part.numel() for part in state)))
    return [positions[start : start + size] for start in range(0, len(positions), size)]


def shuffled_maps(evecs_x: Tensor, evals_x: Tensor, evecs_y: Tensor, evals_y: Tensor, orders: Tensor) -> Maps:
    """Maps from x ``[m_x, n]`` to y ``[m_y, n]`` with the rows of y in other orders ``[P, n]``: readings ``[P, 1]``."""
    size = max(1, _BLOCK_BYTES // (evecs_y.numel() * evecs_y.element_size()))
    # [m_y, P', n] against [n, m_x]: one product for all orders of a block
    C = torch.cat([(evecs_y[:, part] @ evecs_x.mT).transpose(0, 1) for part in torch.split(orders, size)])
    return Maps(C.unsqueeze(2), evals_x.expand(1, 1, -1), evals_y.expand(len(orders), 1, -1), orders.shape[-1])


def shuffled_scores(measure: PointMeasure, a: State, b: State, orders: Tensor) -> Tensor:
    """Scores ``[P]`` of x and y with the rows of y in other orders ``[P, n]``."""
    a = _doubled(a)
    size = max(1, _BLOCK_BYTES // (32 * sum(part.numel() for part in b)))
    scores = [measure.score(a, _doubled(measure.permute(b, part))) for part in torch.split(orders, size)]
    return torch.cat(scores).cpu()


def _doubled(state: State) -> State:
    return tuple(part.double() if part.is_floating_point() else part for part in state)
