"""Samples with a NaN or an infinity, left out of all representations so that rows still pair: ``nonfinite="drop"``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import warn

Nonfinite = Literal["raise", "drop"]
NONFINITE = ("raise", "drop")
# of what is said, so many representations and rows by name
_NAMED = 4


def check_nonfinite(nonfinite: str, *, batched: bool | None = None) -> None:
    """Raise ValueError unless it is one of the two, and no batch, whose entries would lose different samples."""
    _checks.check_choice("nonfinite", nonfinite, NONFINITE)
    if batched and nonfinite == "drop":
        raise ValueError("nonfinite must be 'raise' where batched=True (entries would lose different samples)")


def rows_not_finite(x: Tensor) -> list[int]:
    """Numbers of the rows of ``x [n, d]`` that hold a NaN or an infinity."""
    rows: list[int] = (~x.detach().isfinite().all(1)).nonzero().flatten().tolist()
    return rows


def is_lost(n: int, rows: Sequence[int]) -> bool:
    """Whether a representation has lost more than half of its ``n`` rows: of no use itself, it costs others none."""
    return 2 * len(rows) > n


def rows_to_leave_out(n: int, found: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """Decide on the rows to leave out everywhere, from those of ``n`` that are not finite in each representation.

    One that :func:`is_lost` has no say.

    Raises:
        ValueError: fewer than 3 rows would be left.

    Warns:
        LFMWarning: rows are left out; how many, and where they come from.
    """
    counted = {name: rows for name, rows in found.items() if rows and not is_lost(n, rows)}
    rows = sorted(set().union(*counted.values()))
    if not rows:
        return ()
    where = _listed([f"{name} (row {_listed(lost)})" for name, lost in counted.items()])
    if n - len(rows) < _checks.FEWEST_ROWS:
        got = f"{n - len(rows)}: not finite in {where}"
        raise ValueError(f"nonfinite='drop' must leave at least {_checks.FEWEST_ROWS} of {n} samples, got {got}")
    warn(f"{len(rows)} of {n} samples are left out everywhere, not finite in {where}")
    return tuple(rows)


def without_rows(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Return the other rows of ``x [n, ...]``."""
    if not rows:
        return x
    kept = torch.ones(len(x), dtype=torch.bool, device="cpu")
    kept[list(rows)] = False
    return x[kept.to(x.device)]


def finite_pair(x: object, y: object) -> tuple[Tensor, Tensor]:
    """Leave out of both what is not finite in one of them; two that do not pair are returned as they are."""
    x, y = _checks.check_floating("x", x), _checks.check_floating("y", y)
    if x.dim() != 2 or x.shape[:-1] != y.shape[:-1]:
        return x, y
    rows = rows_to_leave_out(len(x), {"x": rows_not_finite(x), "y": rows_not_finite(y)})
    return without_rows(x, rows), without_rows(y, rows)


def _listed(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:_NAMED])) + (f" and {len(things) - _NAMED} more" if len(things) > _NAMED else "")
