"""How much memory there is, and how much of it bases may take while pairs are compared."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from lfm_torch.comparison.jobs.sizes import shown_size

# what a few blocks, tables and figures take beside bases and matrices
_OVERHEAD = 256 * 2**20
_SMALLEST_CACHE = 32 * 2**20


def available_bytes() -> int:
    """Bytes that a new program could take without swapping."""
    info = Path("/proc/meminfo")
    if info.exists():
        for line in info.read_text("utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4 * 2**30


def resident_bytes() -> int:
    """Bytes that this process takes now; where the system does not say, the most it has taken."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text("utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def cache_bytes(budget: int | None, *, reserved: int) -> int:
    """Return the bytes for stored pieces held in memory.

    Args:
        budget: Bytes for the whole process; None for half of what is available.
        reserved: Bytes that matrices and results will take.

    Raises:
        ValueError: the budget is too small for what must be held.
    """
    used = resident_bytes()
    left = (available_bytes() // 2 if budget is None else budget - used) - reserved - _OVERHEAD
    if left < _SMALLEST_CACHE:
        if budget is None:
            return _SMALLEST_CACHE
        needed = used + reserved + _OVERHEAD + _SMALLEST_CACHE
        raise ValueError(
            f"memory_budget must be at least {shown_size(needed)} here ({shown_size(used)} in use, "
            f"{shown_size(reserved)} for the matrices), got {shown_size(budget)}"
        )
    return left


def workers(budget: int | None, each: int) -> int:
    """Return how many pieces of work that take ``each`` bytes may go on side by side, at least one."""
    left = available_bytes() // 2 if budget is None else budget - resident_bytes() - _OVERHEAD
    return max(1, left // max(each + _SMALLEST_CACHE, 1))
