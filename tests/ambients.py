"""What a program may have set around a call of the library: it must change neither values nor dtypes."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import Any

import torch

import lfm_torch as lfm

_entered = threading.local()
# warnings are given at the line of the user, for whom the frames here are the library's
__name__ = "lfm_torch.ambients"


@contextmanager
def _other_defaults() -> Iterator[None]:
    before = torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.device("meta"):
            yield
    finally:
        torch.set_default_dtype(before[0])
        torch.use_deterministic_algorithms(before[1])


AMBIENTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast-bfloat16": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast-float16": lambda: torch.autocast("cpu", torch.float16),
    # dtype float64, device meta, deterministic algorithms
    "other-defaults": _other_defaults,
    "inference-mode": torch.inference_mode,
}


def public() -> Iterator[tuple[Any, str]]:
    """Yield where each public function and method is found, and its name: of the package, its modules and classes."""
    for name in lfm.__all__:
        value = getattr(lfm, name)
        if isinstance(value, ModuleType):
            for inner, member in vars(value).items():
                if callable(member) and not inner.startswith("_") and member.__module__.startswith(value.__name__):
                    yield value, inner
        elif inspect.isclass(value):
            kinds = (staticmethod, classmethod, property, functools.cached_property)
            for inner, member in vars(value).items():
                if (inspect.isfunction(member) or isinstance(member, kinds)) and (
                    not inner.startswith("_") or inner in ("__call__", "__matmul__")
                ):
                    yield value, inner
        else:
            yield lfm, name


def surround(ambient: Callable[[], AbstractContextManager[Any]]) -> None:
    """Put every public function and method into the ambient, wherever the package's modules refer to it."""
    modules = [module for name, module in sys.modules.items() if name.partition(".")[0] == "lfm_torch"]
    for owner, name in [place for found in public() for place in _methods(*found)]:
        function = vars(owner)[name]
        if not inspect.isfunction(function):
            continue
        inside = _inside(ambient, function)
        setattr(owner, name, inside)
        for module in modules:
            for alias in [alias for alias, value in vars(module).items() if value is function]:
                setattr(module, alias, inside)


def _methods(owner: Any, name: str) -> Iterator[tuple[Any, str]]:
    """Yield the place itself or, of a class, those of its public methods."""
    value = vars(owner)[name]
    if inspect.isclass(value):
        yield from ((value, inner) for inner in vars(value) if not inner.startswith("_"))
    else:
        yield owner, name


def _inside(ambient: Callable[[], AbstractContextManager[Any]], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inside(*args: Any, **kwargs: Any) -> Any:
        if getattr(_entered, "yes", False):
            return function(*args, **kwargs)
        _entered.yes = True
        try:
            with ambient():
                return function(*args, **kwargs)
        finally:
            _entered.yes = False

    return inside
