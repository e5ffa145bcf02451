"""``lfm-torch compare``: many checkpoints, layer by layer, and the report of them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lfm_torch._files import STORE_INDEX
from lfm_torch._warnings import LFMWarning
from lfm_torch.cli.inputs import load_data, load_model
from lfm_torch.cli.options import OK, PARTIAL, add_model, add_settings, make_writable, measures_of
from lfm_torch.comparison.jobs.engines import ENGINES
from lfm_torch.comparison.jobs.plan import plan
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.comparison.jobs.sizes import parse_size
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare
from lfm_torch.report import terminal
from lfm_torch.report.progress import ProgressBars
from lfm_torch.report.summary import as_json, left_out
from lfm_torch.report.write import check_available, write_report
from lfm_torch.representations.checkpoint_files import SUFFIXES
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.models import ORIGINS, Models
from lfm_torch.representations.saved_activations import Activations
from lfm_torch.representations.sources import Source


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what ``lfm-torch compare`` takes, beside the options of every command."""
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help=f"{', '.join(SUFFIXES)}; globs; directories; or models by name, {', '.join(o + ':NAME' for o in ORIGINS)}",
    )
    parser.add_argument("--config", metavar="FILE", help="options in a .toml or .yaml file; those given here win")
    parser.add_argument(
        "--activations", action="store_true", help="CKPT are saved activations, a file a network, an array a layer"
    )
    add_model(parser, required=False)
    add_settings(parser)
    parser.add_argument(
        "--out", type=Path, default=Path("lfm-report"), metavar="DIR", help="where to write (lfm-report)"
    )
    parser.add_argument("--format", choices=("csv", "parquet"), default="csv", help="of the table of all pairs (csv)")
    parser.add_argument("--store", type=Path, metavar="DIR", help="where finished pieces are kept (OUT/store)")
    parser.add_argument("--no-store", action="store_true", help="keep nothing: an interrupted run starts again")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        help="threads (local), torchrun's processes (torch), or ray; torch where torchrun started this",
    )
    parser.add_argument("--memory", metavar="SIZE", help="the most to take, such as 2GiB (half of what is free)")
    parser.add_argument("--log", metavar="FILE", help="append what happens when to a file")
    parser.add_argument("--dry-run", action="store_true", help="say what there is to do and about how long it takes")
    parser.add_argument(
        "--runs",
        metavar="REGEX",
        help="groups (?P<run>...) and (?P<step>...) in the path, where the names do not tell runs and epochs",
    )


def run(arguments: argparse.Namespace) -> int:
    """Compare, or say what there is to do; return the exit status."""
    check_packages(arguments)
    source = _source(arguments)
    if arguments.dry_run:
        return _planned(arguments, source)
    described = {name: value for name in ("model", "data") if (value := getattr(arguments, name)) is not None}
    return compared(arguments, source, source=described)


def _source(arguments: argparse.Namespace) -> Source:
    """Return what the command line says is to be compared."""
    if arguments.activations:
        return Activations(arguments.checkpoints, pattern=arguments.runs)
    named = [name for name in arguments.checkpoints if name.partition(":")[0] in ORIGINS and not Path(name).exists()]
    needed = ("data", "layers") if named else ("model", "data")
    for name in needed:
        if getattr(arguments, name) is None:
            raise ValueError(f"--{name} must be given, got none (--activations compares arrays that are saved already)")
    options: dict[str, Any] = {name: getattr(arguments, name) for name in ("layers", "pooling", "batch_size", "device")}
    if options["device"] == "cuda" and "LOCAL_RANK" in os.environ:
        options["device"] = f"cuda:{os.environ['LOCAL_RANK']}"
    if named:
        if len(named) < len(arguments.checkpoints):
            raise ValueError("CKPT must be all models by name, or all files, got a mixture")
        return Models(named, load_data(arguments.data), **options)
    found = find_checkpoints(arguments.checkpoints, pattern=arguments.runs)
    return Checkpoints(
        found, load_model(arguments), load_data(arguments.data), unsafe_pickle=arguments.unsafe_pickle, **options
    )


def _planned(arguments: argparse.Namespace, source: Source) -> int:
    """Say what there is to do; nothing is written."""
    directory = arguments.store or arguments.out / "store"
    store = Store(directory).open() if (directory / STORE_INDEX).exists() and not arguments.no_store else None
    names = ("n_neighbors", "n_basis", "metric", "weights")
    settings = Settings(measures_of(arguments), *(getattr(arguments, name) for name in names))
    found = plan(source, settings, store, nonfinite=arguments.nonfinite)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    elif not arguments.quiet:
        terminal.print_plan(found)
    return PARTIAL if found.problems else OK


def compared(
    arguments: argparse.Namespace, checkpoints: Source, *, source: dict[str, str], notes: Sequence[str] = ()
) -> int:
    """Compare, write the report and print the summary: the one path of ``compare`` and ``demo``."""
    directory: Path = arguments.out
    make_writable(directory)
    if arguments.log is not None:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(filename=arguments.log, level=logging.INFO, format=form)
    store = None if arguments.no_store else arguments.store or directory / "store"
    try:
        comparison = _quietly_compare(
            arguments,
            checkpoints,
            store=store,
            engine=arguments.engine or ("torch" if _rank() is not None else "local"),
            memory_budget=None if arguments.memory is None else parse_size(arguments.memory),
        )
    except OSError as error:
        if store is None:
            raise
        raise OSError(f"{error}; what is finished is kept, and the same command goes on from there") from error
    if _rank():
        # the first process writes the report
        return OK
    comparison = dataclasses.replace(comparison, settings={**comparison.settings, **source})
    page = write_report(comparison, directory, format=arguments.format)
    pictures = [
        path for name in ("layers", "checkpoints", "trajectory") if (path := directory / f"{name}.png").exists()
    ]
    written = [page, directory / f"similarity.{arguments.format}", *pictures]
    if arguments.json:
        print(json.dumps(as_json(comparison, written), indent=2))
    elif not arguments.quiet:
        terminal.print_summary(comparison, written, notes)
    if arguments.json or arguments.quiet:
        unsaid = [f"not compared: {failure}" for failure in comparison.failures]
        if said := left_out(comparison):
            unsaid.insert(0, said)
        unsaid += comparison.below_chance().values()
        for line in unsaid:
            print(f"lfm-torch: warning: {line}", file=sys.stderr)
    return PARTIAL if comparison.failures else OK


def _rank() -> int | None:
    """Rank of this process among those of torchrun; None without it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def _quietly_compare(arguments: argparse.Namespace, representations: Any, **options: Any) -> Comparison:
    with (
        ProgressBars(quiet=arguments.quiet or arguments.json or bool(_rank())) as bars,
        warnings.catch_warnings(),
    ):
        # failures and eigenpairs that did not converge are in the summary and the report
        warnings.simplefilter("ignore", LFMWarning)
        return compare(
            representations,
            measures=measures_of(arguments),
            n_neighbors=arguments.n_neighbors,
            n_basis=arguments.n_basis,
            metric=arguments.metric,
            weights=arguments.weights,
            nonfinite=arguments.nonfinite,
            progress=bars,
            **options,
        )


def check_packages(arguments: argparse.Namespace) -> None:
    """Find out that a package is missing before an hour of work, not after it."""
    check_available()
    if not (arguments.quiet or arguments.json):
        terminal.check_available()
    if arguments.format == "parquet":
        try:
            import pandas  # noqa: F401
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(f'--format parquet needs {error.name}: pip install "lfm-torch[pandas]"') from error
