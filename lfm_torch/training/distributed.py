"""One answer on all ranks: work done on rank zero and handed to the others, errors included."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from lfm_torch import _checks

T = TypeVar("T")


def world_size() -> int:
    """Number of ranks; 1 where torch.distributed is not in use."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def is_rank_zero() -> bool:
    """Tell whether this process does the work that is done once."""
    return world_size() == 1 or dist.get_rank() == 0


def from_rank_zero(work: Callable[[], T]) -> T:
    """Return on every rank what ``work`` gave on rank zero, bit for bit; every rank must call.

    Raises:
        Exception: what ``work`` raised, on rank zero.
        RuntimeError: the same as text, on the others, so that none waits for a rank that is gone.
    """
    if world_size() == 1:
        return work()
    failure: Exception | None = None
    box: list[Any] = [None]
    if is_rank_zero():
        try:
            box = [(work(), None)]
        except Exception as error:
            failure, box = error, [(None, _checks.one_line(error, typed=True))]
    dist.broadcast_object_list(box, src=0)
    if failure is not None:
        raise failure
    value, reason = box[0]
    if reason is not None:
        raise RuntimeError(f"rank 0 failed: {reason}")
    result: T = value
    return result
