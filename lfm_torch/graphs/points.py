"""What points need before their distances are taken: a range that is safe, and no row without an angle unnoticed."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import note

Metric = Literal["euclidean", "cosine", "angular", "inner_product"]


ANGULAR = ("cosine", "angular")


# largest magnitudes of points whose distances, and the products behind them, neither overflow nor vanish
_SAFE = {torch.float32: (2.0**-50, 2.0**50), torch.float64: (2.0**-400, 2.0**500)}


def power_into_range(dtype: torch.dtype, largest: float) -> float:
    """Power of two that divides points of this largest magnitude into a range where distances are safe; mostly 1."""
    low, high = _SAFE[dtype]
    if low <= largest <= high or largest == 0:
        return 1.0
    # no further than needed from above: what is small beside the largest must not vanish
    return 2.0 ** (math.frexp(largest)[1] - (math.frexp(high)[1] if largest > high else 1))


def zero_rows(
    name: str, x: Tensor, offsets: Tensor | None = None, *, alone: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return ``x`` and which of its rows are zero, None where none is.

    Denormal rows of float64 are brought up, exactly: the reciprocal of their length is no number.

    Raises:
        ValueError: where ``alone``, if all rows are zero, or all of a set.
    """
    points = x.detach()
    single = x.dtype == torch.float32
    usable = points.any(-1) if single else (points.abs() >= torch.finfo(x.dtype).tiny).any(-1)
    known = _checks.has_values(x)
    if known and bool(usable.all()):
        return x, None
    zero = ~points.any(-1)
    if not single:
        x = torch.where((usable | zero).unsqueeze(-1), x, x * 2.0**64)
    if not known:  # there may be some
        return x, zero
    if not bool(zero.any()):
        return x, None
    if alone and bool(_whole_sets(zero, offsets).any()):
        raise ValueError(
            f"{name} must have rows that are not zero under the metrics 'cosine' and 'angular', got nothing but zeros "
            "(a collapsed representation)"
        )
    return x, zero


def note_zero_rows(name: str, zero: Tensor | None) -> None:
    """Say how many rows are zero, and what becomes of them."""
    if zero is None or not _checks.has_values(zero):
        return
    rows = "rows" if name == "x" else f"rows of {name}"
    note(
        f"{int(zero.sum())} of {zero.numel()} {rows} are zero and have no angle: they count as orthogonal to all "
        "others; leave them out, or take metric='euclidean', where they are points like others"
    )


def _whole_sets(zero: Tensor, offsets: Tensor | None) -> Tensor:
    """Which sets have no other row; one without rows has not."""
    if offsets is None:
        return zero.all(-1)
    counts = torch.cat([zero.new_zeros(1, dtype=torch.int64), zero.cumsum(0)])[offsets.to(zero.device)].diff()
    return (counts == offsets.diff().to(zero.device)) & (counts > 0)
