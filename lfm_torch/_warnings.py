"""The one warning category of the library, so that users can filter or escalate it by name, and how it is given."""

import functools
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class LFMWarning(UserWarning):
    """A result that is usable but not what was asked for: a solver that did not converge, a slow path taken."""


def warn(message: str) -> None:
    """Give an :class:`LFMWarning` at the line that called the library, through all decorators and torch's own calls."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and _package(frame.f_globals) in ("lfm_torch", "torch", "contextlib"):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, LFMWarning, stacklevel=level)


_collected: ContextVar[list[str] | None] = ContextVar("lfm_torch_notes", default=None)


def note(message: str) -> None:
    """Give a warning about the user's data, or keep it for whoever is :func:`collecting` what is to be said."""
    notes = _collected.get()
    if notes is None:
        warn(message)
    elif message not in notes:
        notes.append(message)


@contextmanager
def collecting() -> Iterator[list[str]]:
    """Keep the notes of this thread in a list: for workers, whose results carry them, and to say a name with them."""
    notes: list[str] = []
    token = _collected.set(notes)
    try:
        yield notes
    finally:
        _collected.reset(token)


@contextmanager
def about(name: str) -> Iterator[None]:
    """Give the notes of one of several representations under its name."""
    with collecting() as notes:
        yield
    for text in notes:
        note(f"{name}: {text}")


@contextmanager
def each_once(said: set[str]) -> Iterator[None]:
    """Give notes of one kind once, where every step of a training may come across the reason; the owner keeps it."""
    with collecting() as notes:
        yield
    for text in notes:
        if (kind := kind_of(text)) not in said:
            note(f"{text} (said once)")
            said.add(kind)


def kind_of(text: str) -> str:
    """A note without its numbers, which change from step to step."""
    return re.sub(r"\d+", "", text)


def said_once(function: Callable[P, R]) -> Callable[P, R]:
    """Give every note of a call once, at its end, however many of its parts came across the reason."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        with collecting() as notes:
            result = function(*args, **kwargs)
        for text in notes:
            note(text)
        return result

    return wrapper


def _package(scope: dict[str, object]) -> str:
    return str(scope.get("__name__")).partition(".")[0]
