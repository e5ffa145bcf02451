"""``lfm-torch similarity``: two arrays of the same samples, with chance and intervals."""

from __future__ import annotations

import argparse
import functools
import json
import math
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import collecting
from lfm_torch.cli.options import OK, add_settings, measures_of
from lfm_torch.comparison.against_chance import significance
from lfm_torch.measures.table import MEASURES
from lfm_torch.pipeline import check_pair, similarity
from lfm_torch.report import terminal
from lfm_torch.representations.arrays import ARRAY_SUFFIXES, load_array
from lfm_torch.spectral.sizes import default_n_basis


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``lfm-torch similarity`` takes, beside the options of every command."""
    for name in ("x", "y"):
        parser.add_argument(name, help=f"[n, d] in {', '.join(ARRAY_SUFFIXES)}; FILE:NAME for one of several")
    add_settings(parser)


def run(arguments: argparse.Namespace) -> int:
    """Compare the two, print what was found, and return the exit status."""
    if not (arguments.quiet or arguments.json):
        terminal.check_available()
    points: dict[str, Tensor] = {}
    for name in (arguments.x, arguments.y):
        x = load_array(name)
        real = x if x.is_floating_point() or x.is_complex() else x.float()
        _checks.check_dims(name, real, batched=None)
        # what is not finite is left out of both, or refused under the name of its file
        points[name] = (_checks.check_points if arguments.nonfinite == "raise" else _checks.check_floating)(name, real)
    rows = [len(x) for x in points.values()]
    if len(points) < 2:
        raise ValueError(f"x and y must be two different arrays, got {arguments.x} twice")
    if rows[0] != rows[1]:
        raise ValueError(f"{arguments.y} must have the rows of {arguments.x}, {rows[0]}, got {rows[1]}")
    dtype = functools.reduce(torch.promote_types, (x.dtype for x in points.values()))
    x, y = check_pair(*(x.to(dtype) for x in points.values()), nonfinite=arguments.nonfinite)
    values = _pair_values(arguments, x, y)
    if arguments.json:
        print(json.dumps(values, indent=2))
    elif not arguments.quiet:
        terminal.print_pair(arguments.x, arguments.y, len(x), values)
    return OK


def _pair_values(arguments: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, dict[str, float | None]]:
    names = ("n_neighbors", "n_basis", "metric", "weights")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    # halves need more samples than eigenvectors
    n_basis = default_n_basis(len(x)) if arguments.n_basis is None else arguments.n_basis
    n_splits = 10 if len(x) // 2 > n_basis + 1 else 0
    measures = measures_of(arguments)
    found = significance(x, y, measures=measures, n_splits=n_splits, **settings)
    directed = [name for name in measures if not MEASURES[name].symmetric]
    with collecting():  # said above, with x and y in their places
        reverse = similarity(y, x, measures=directed, **settings) if directed else {}
    values = {}
    for name, value in found.items():
        numbers = {
            "similarity": value.value,
            "reverse": float(reverse.get(name, value.value)),
            "low": value.low,
            "high": value.high,
            "shuffled_rows": value.chance,
            "shuffled_rows_std": value.chance_std,
            "z": value.z,
            "p": value.p,
        }
        # JSON has no NaN
        values[name] = {key: number if math.isfinite(number) else None for key, number in numbers.items()}
    return values
