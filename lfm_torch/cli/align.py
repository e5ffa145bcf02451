"""``lfm-torch align``: the map between two arrays whose rows need not pair, and whether there is one."""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm_torch._warnings import LFMWarning
from lfm_torch.alignment.fit import METHODS, METRICS, align
from lfm_torch.alignment.result import Alignment
from lfm_torch.alignment.translator import KINDS
from lfm_torch.representations.arrays import ARRAY_SUFFIXES, load_array


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``lfm-torch align`` takes, beside the options of every command."""
    for name in ("x", "y"):
        parser.add_argument(name, help=f"[n, d] in {', '.join(ARRAY_SUFFIXES)}; FILE:NAME for one of several")
    parser.add_argument("--anchors", metavar="FILE", help="known pairs [p, 2] (row of x, row of y), from 0")
    parser.add_argument("--labels", nargs=2, metavar="FILE", help="classes of the rows of x and of y")
    parser.add_argument("--kind", choices=KINDS, default="orthogonal", help="of translator (orthogonal)")
    parser.add_argument("--method", choices=METHODS, default="auto", help="how to find the correspondence (auto)")
    parser.add_argument("--metric", choices=METRICS, help="of both spaces (angular, with norms where that is better)")
    parser.add_argument("--n-neighbors", type=int, metavar="K", help="of each sample (15%% of them, at most 300)")
    parser.add_argument("--n-basis", type=int, metavar="M", help="eigenvectors of the map (an eighth of the rows)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write translator, map and pairs there, where an alignment is found"
    )


def run(arguments: argparse.Namespace) -> int:
    """Align, write what was found, and return the exit status: 1 where there is no alignment."""
    x, y = _points(arguments.x), _points(arguments.y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("kind", "method", "metric")}
    options |= {name: getattr(arguments, name) for name in ("n_neighbors", "n_basis")}
    if arguments.anchors is not None:
        options["anchors"] = load_array(arguments.anchors)
    if arguments.labels is not None:
        options["labels"] = tuple(load_array(name) for name in arguments.labels)
    with warnings.catch_warnings():
        # said below, and by the exit status
        warnings.simplefilter("ignore", LFMWarning)
        alignment = align(x.to(dtype), y.to(dtype), **options)
    written = _write(alignment, arguments.out) if arguments.out is not None and alignment.found else []
    if arguments.json:
        print(json.dumps(_values(alignment) | {"written": [str(path) for path in written]}, indent=2))
    elif alignment.found and not arguments.quiet:
        print(alignment)
        print(f"{len(alignment.pairs)} pairs of rows; {alignment.translator}")
        for path in written:
            print(f"written: {path}")
    if not alignment.found and not arguments.json:
        print(f"lfm-torch: no alignment found: {alignment}", file=sys.stderr)
    return 0 if alignment.found else 1


def _points(name: str) -> Tensor:
    x = load_array(name)
    return x if x.is_floating_point() or x.is_complex() else x.float()


def _values(alignment: Alignment) -> dict[str, Any]:
    names = ("found", "confidence", "chance", "anchor_p", "method")
    values = {name: getattr(alignment, name) for name in names}
    return values | {"pairs": len(alignment.pairs) if alignment.found else 0}


def _write(alignment: Alignment, directory: Path) -> list[Path]:
    from safetensors.torch import save

    from lfm_torch import _files

    directory.mkdir(parents=True, exist_ok=True)
    names = ("translator", "map", "correspondence")
    translator, fmap, correspondence = (directory / f"{name}.safetensors" for name in names)
    alignment.translator.save(translator)
    alignment.fmap.save(fmap)
    tensors = {name: getattr(alignment, name).contiguous() for name in ("pairs", "idx_yx", "idx_xy")}
    _files.write_atomically(correspondence, save(tensors))
    return [translator, fmap, correspondence]
