"""Checks that the callbacks share: they fail when they are made, not hours into a training."""

from __future__ import annotations

from importlib.util import find_spec

from lfm_torch import _checks


def check_figures(figures: bool) -> None:
    """Raise ImportError where figures are wanted and matplotlib is missing."""
    if figures and find_spec("matplotlib") is None:
        raise ImportError('figures need matplotlib: pip install "lfm-torch[cli]", or pass figures=False')


def check_intervals(every_n_epochs: int | None, every_n_steps: int | None) -> tuple[int | None, int | None]:
    """Return the intervals; without any, every epoch.

    Raises:
        ValueError: both given, or not positive.
    """
    if every_n_epochs is not None and every_n_steps is not None:
        raise ValueError(f"every_n_epochs or every_n_steps must be None, got {every_n_epochs} and {every_n_steps}")
    for name, value in (("every_n_epochs", every_n_epochs), ("every_n_steps", every_n_steps)):
        if value is not None:
            _checks.check_range(name, value, 1, 2**62, "a positive interval")
    return (1, None) if every_n_steps is None and every_n_epochs is None else (every_n_epochs, every_n_steps)
