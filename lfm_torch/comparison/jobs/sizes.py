"""Numbers of bytes, read and written as people do."""

from __future__ import annotations

import re

_UNITS = {"": 1, "B": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def parse_size(text: str) -> int:
    """Read a number of bytes such as "2GiB", "500M" or "1.5 GB" (all in powers of 1024).

    Raises:
        ValueError: not of that form, or not positive.

    Example:
        >>> parse_size("2GiB"), parse_size("512M")
        (2147483648, 536870912)
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(?:i?B)?\s*", text, re.IGNORECASE)
    size = 0 if match is None else int(float(match.group(1)) * _UNITS[match.group(2).upper()])
    if size < 1:
        raise ValueError(f"a size must be a positive number of bytes such as 2GiB or 500M, got {text!r}")
    return size


def shown_size(size: float) -> str:
    """Return a number of bytes for people: "1.5 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"
