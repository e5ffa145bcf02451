"""What tests compare of a terminal."""

from __future__ import annotations


def unwrapped(text: str) -> str:
    """What was printed, wherever the width of the terminal broke its lines."""
    return " ".join(text.split())
