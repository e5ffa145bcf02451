"""The one warning category of the library, so that users can filter or escalate it by name, and how it is given."""

import sys
import warnings


class LFMWarning(UserWarning):
    """A result that is usable but not what was asked for: a solver that did not converge, a slow path taken."""


def warn(message: str) -> None:
    """Give an :class:`LFMWarning` at the line that called the library, through all decorators and torch's own calls."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in ("lfm_torch", "torch"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, LFMWarning, stacklevel=level)


def _package(scope: dict[str, object]) -> str:
    return str(scope.get("__name__")).partition(".")[0]
