"""What the command line names in words: models, functions and data."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lfm_torch import _checks
from lfm_torch.cli.demo import digits
from lfm_torch.representations.arrays import ARRAY_SUFFIXES, load_array


def load_model(arguments: argparse.Namespace) -> torch.nn.Module:
    """Make the model that ``--model`` names.

    Raises:
        TypeError: it makes something else.
        ValueError: no ``--layers``; those of the model are listed.
    """
    found = load_object(arguments.model)
    model = found if isinstance(found, torch.nn.Module) else _called(arguments.model, found)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"--model must make a torch.nn.Module, got {type(model).__name__} from {arguments.model}")
    if not arguments.layers:
        names = [name for name, _ in model.named_modules() if name]
        shown = ", ".join(names[:40]) + (f" and {len(names) - 40} more" if len(names) > 40 else "")
        raise ValueError(f"--layers must name layers or globs of them; the model has {shown or 'no submodules'}")
    return model


def _called(spec: str, function: Callable[[], Any]) -> Any:
    try:
        return function()
    except Exception as error:
        got = _checks.one_line(error, typed=True)
        raise ValueError(f"{spec} must run without an error, got {got} (--debug shows where)") from error


def load_object(spec: str) -> Any:
    """Import ``package.module:name``, also from the working directory.

    Raises:
        ValueError: not of that form, or the module has no such name.
        ImportError: the module does not import.
    """
    module_name, colon, name = spec.partition(":")
    if not (colon and module_name and name):
        raise ValueError(f"{spec!r} must be of the form package.module:name")
    # as `python -m` does it: an installed script starts with its own directory there
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    # SystemExit: a script that reads its own command line where it is imported
    except (Exception, SystemExit) as error:
        got = _checks.one_line(error, typed=True)
        raise ImportError(f"{spec!r} must name a module that imports, got {got}") from error
    for part in name.split("."):
        if not hasattr(found, part):
            raise ValueError(f"{spec!r} must name something in {module_name}{_checks.did_you_mean(part, dir(found))}")
        found = getattr(found, part)
    return found


def load_data(spec: str) -> Any:
    """Return the probe inputs that ``--data`` names: an array file, ``package.module:function``, or "digits".

    Raises:
        ValueError: none of these, or a file that does not read.
    """
    if spec == "digits":
        return digits()[0]
    file = spec if Path(spec).suffix in ARRAY_SUFFIXES else spec.rpartition(":")[0]
    if Path(file).suffix in ARRAY_SUFFIXES:
        return load_array(spec)
    if ":" in spec:
        found = load_object(spec)
        return _called(spec, found) if callable(found) else found
    raise ValueError(f"--data must be 'digits', a file ({', '.join(ARRAY_SUFFIXES)}) or module:function, got {spec!r}")
