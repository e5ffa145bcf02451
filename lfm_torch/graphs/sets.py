"""Sets of unequal size in one tensor: the offsets where each begins and ends."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import IndexLike


def set_offsets(name: str, batch: IndexLike, n: int) -> Tensor:
    """Return the int64 offsets ``[s + 1]``, on the CPU, of a PyG-style batch vector ``[n]`` or of offsets.

    Raises:
        TypeError: not integers.
        ValueError: neither ``n`` ascending numbers of sets, nor offsets ascending from 0 to ``n``.
    """
    values = _checks.as_integers(name, batch, torch.device("cpu"))
    if not _checks.has_values(values):
        offsets: Tensor = _traced_offsets(values, n, name)
        return offsets
    wanted = f"the set of each of the {n} rows, ascending, or offsets ascending from 0 to {n}"
    if values.dim() != 1 or values.numel() == 0 or bool((values.diff() < 0).any()) or int(values[0]) < 0:
        raise ValueError(f"{name} must be {wanted}, got shape {list(values.shape)}, or values out of order")
    if int(values[0]) == 0 and int(values[-1]) == n:
        return values
    if values.numel() != n:
        raise ValueError(f"{name} must be {wanted}, got {values.numel()} values from {values[0]} to {values[-1]}")
    counts = torch.bincount(values)
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


@torch.library.custom_op("lfm_torch_traced::set_offsets", mutates_args=())
def _traced_offsets(batch: Tensor, n: int, name: str) -> Tensor:
    """:func:`set_offsets` when what was traced runs: how many sets there are is known then."""
    return set_offsets(name, batch, n).clone()


Offsets = tuple[Tensor, Tensor | None]


@_traced_offsets.register_fake
def _(batch: Tensor, n: int, name: str) -> Tensor:
    return batch.new_empty(torch.library.get_ctx().new_dynamic_size())
