"""The command line, ``lfm-torch``: compare checkpoints, compare two arrays, extract activations, show what is live."""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import os
import platform
import shlex
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._extension import build_info
from lfm_torch._warnings import LFMWarning
from lfm_torch.arrays import ARRAY_SUFFIXES, load_array
from lfm_torch.checkpoints import SUFFIXES, Checkpoints, find_checkpoints
from lfm_torch.cli import align, cache, runfile
from lfm_torch.cli.inputs import load_data, load_model, load_object
from lfm_torch.compare import compare
from lfm_torch.comparison import Comparison
from lfm_torch.graph import WEIGHTS
from lfm_torch.jobs.engines import ENGINES
from lfm_torch.jobs.plan import plan
from lfm_torch.jobs.store import INDEX, Store, parse_size
from lfm_torch.jobs.tasks import Settings
from lfm_torch.measures import DEFAULT_MEASURES, MEASURES, check_measures
from lfm_torch.models import ORIGINS, Activations, Models
from lfm_torch.ops.knn import METRICS
from lfm_torch.pipeline import similarity
from lfm_torch.report import terminal
from lfm_torch.representation import POOLINGS
from lfm_torch.significance import significance
from lfm_torch.sources import Source

OK, FAILED, PARTIAL, INTERRUPTED = 0, 1, 3, 130
_EXIT_STATUS = """exit status:
  0  all went well
  1  nothing could be compared, or an input is wrong (the message says which)
  2  the command line itself is wrong
  3  some checkpoints could not be compared; the others were, and the report says why
  130  interrupted with Ctrl-C"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: what the user did wrong is a line, never a traceback."""
    parser = _parser()
    try:
        arguments = parser.parse_args(_with_run_file(list(sys.argv[1:] if argv is None else argv)))
    except _checks.USER_ERRORS as error:
        print(f"lfm-torch: error: {_checks.one_line(error)}", file=sys.stderr)
        return FAILED
    if getattr(arguments, "checkpoints", None) == []:
        parser.error("compare: CKPT must name at least one file, directory or model")
    try:
        status: int = arguments.run(arguments)
        # a reader that has gone is met here, not by the interpreter at exit
        print(end="", flush=True)
    except KeyboardInterrupt:
        print("lfm-torch: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # the reader of a pipe has gone; nothing is left to say, and the interpreter must not say it at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except Exception as error:
        if arguments.debug:
            raise
        hint = "" if isinstance(error, _checks.USER_ERRORS) else " (--debug shows where)"
        print(f"lfm-torch: error: {_checks.one_line(error)}{hint}", file=sys.stderr)
        return FAILED
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm-torch",
        description="Compare neural representations with latent functional maps.",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lfm-torch {version('lfm-torch')}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(commands, "compare", _compare, "compare saved checkpoints, layer by layer, and write a report")
    command.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CKPT",
        help=f"{', '.join(SUFFIXES)}; globs; directories; or models by name, {', '.join(o + ':NAME' for o in ORIGINS)}",
    )
    command.add_argument("--config", metavar="FILE", help="options in a .toml or .yaml file; those given here win")
    command.add_argument(
        "--activations", action="store_true", help="CKPT are saved activations, a file a network, an array a layer"
    )
    _add_model(command, required=False)
    _add_settings(command)
    command.add_argument(
        "--out", type=Path, default=Path("lfm-report"), metavar="DIR", help="where to write (lfm-report)"
    )
    command.add_argument("--format", choices=("csv", "parquet"), default="csv", help="of the table of all pairs (csv)")
    _add_scale(command)
    command.add_argument(
        "--runs",
        metavar="REGEX",
        help="groups (?P<run>...) and (?P<step>...) in the path, where the names do not tell runs and epochs",
    )
    _add_output(command)

    command = _command(commands, "similarity", _similarity, "compare two arrays of the same samples")
    for name in ("x", "y"):
        command.add_argument(name, help=f"[n, d] in {', '.join(ARRAY_SUFFIXES)}; FILE:NAME for one of several")
    _add_settings(command)
    _add_output(command)

    command = _command(commands, "align", align.run, "find the map between two arrays whose rows need not pair")
    align.add_arguments(command)
    _add_output(command)

    command = _command(commands, "extract", _extract, "write the activations of a checkpoint's layers to a file")
    command.add_argument("checkpoint", metavar="CKPT")
    _add_model(command)
    command.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors or .npz file")
    _add_output(command)

    cache.add_commands(_command(commands, "cache", cache.run, "list, check and thin out a store of finished pieces"))

    command = _command(commands, "info", _info, "show versions and which kernels are live")
    _add_output(command)

    command = _command(commands, "demo", _demo, "train three small networks on handwritten digits and compare them")
    command.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="where to (demo-output)")
    _add_output(command)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=_EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


def _add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--model", required=required, metavar="MODULE:FACTORY", help="a function or class that makes the model"
    )
    parser.add_argument(
        "--data",
        required=required,
        metavar="DATA",
        help=f"probe inputs: {', '.join(ARRAY_SUFFIXES)} (FILE:NAME for one of several), MODULE:FUNCTION, or 'digits'",
    )
    parser.add_argument(
        "--layers", nargs="+", metavar="NAME", help="names or globs ('layers.*'); left out, they are listed"
    )
    parser.add_argument("--pooling", choices=POOLINGS, default="mean", help="of space or tokens (mean)")
    parser.add_argument("--batch-size", type=int, default=256, metavar="N", help="samples per forward pass (256)")
    parser.add_argument("--device", help="where to run, such as cuda or cuda:1 (that of the model)")
    parser.add_argument("--unsafe-pickle", action="store_true", help="allow checkpoints that execute code when loaded")


def _add_settings(parser: argparse.ArgumentParser) -> None:
    names = f"all, or among {', '.join(MEASURES)}"
    parser.add_argument("--measures", nargs="+", default=list(DEFAULT_MEASURES), metavar="NAME", help=names)
    parser.add_argument("--n-neighbors", type=int, metavar="K", help="of each sample (15%% of them, at most 300)")
    parser.add_argument("--n-basis", type=int, default=50, metavar="M", help="eigenvectors per space (50)")
    parser.add_argument("--metric", default="angular", help=f"{', '.join(METRICS)} (angular)")
    parser.add_argument("--weights", default="gaussian", help=f"{', '.join(WEIGHTS)} (gaussian)")


def _add_scale(parser: argparse.ArgumentParser) -> None:
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


def _add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def _compare(arguments: argparse.Namespace) -> int:
    _check_packages(arguments)
    source = _source(arguments)
    if arguments.dry_run:
        return _planned(arguments, source)
    described = {name: value for name in ("model", "data") if (value := getattr(arguments, name)) is not None}
    return _compared(arguments, source, source=described)


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
    store = Store(directory) if (directory / INDEX).exists() and not arguments.no_store else None
    names = ("n_neighbors", "n_basis", "metric", "weights")
    found = plan(source, Settings(tuple(_measures(arguments)), *(getattr(arguments, name) for name in names)), store)
    if arguments.json:
        print(json.dumps(dataclasses.asdict(found), indent=2))
    elif not arguments.quiet:
        terminal.print_plan(found)
    return PARTIAL if found.problems else OK


def _with_run_file(arguments: list[str]) -> list[str]:
    """Put the options of ``--config FILE`` before those of the command line."""
    if arguments[:1] != ["compare"]:
        return arguments
    before = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    before.add_argument("--config")
    known, rest = before.parse_known_args(arguments[1:])
    if known.config is None:
        return arguments
    options = {name.replace("_", "-") for name in vars(_parser().parse_args(["compare"]))}
    options -= {"run", "checkpoints", "config"}
    return ["compare", *runfile.as_arguments(known.config, options), *rest]


def _compared(
    arguments: argparse.Namespace, checkpoints: Source, *, source: dict[str, str], notes: Sequence[str] = ()
) -> int:
    """Compare, write the report and print the summary: the one path of ``compare`` and ``demo``."""
    from lfm_torch.report import write_report

    directory: Path = arguments.out
    _make_writable(directory)
    if arguments.log is not None:
        form = "%(asctime)s %(levelname)s %(name)s: %(message)s"
        logging.basicConfig(filename=arguments.log, level=logging.INFO, format=form)
    comparison = _quietly_compare(
        arguments,
        checkpoints,
        store=None if arguments.no_store else arguments.store or directory / "store",
        engine=arguments.engine or ("torch" if _rank() is not None else "local"),
        memory_budget=None if arguments.memory is None else parse_size(arguments.memory),
    )
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
        print(json.dumps(terminal.as_json(comparison, written), indent=2))
    elif not arguments.quiet:
        terminal.print_summary(comparison, written, notes)
    for failure in comparison.failures if arguments.json or arguments.quiet else ():
        print(f"lfm-torch: warning: not compared: {failure}", file=sys.stderr)
    return PARTIAL if comparison.failures else OK


def _make_writable(directory: Path) -> None:
    """Make the directory and try to write there: what cannot be written to is said before the work, not after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        got = f"{str(directory)!r}: {error.strerror}"
        raise ValueError(f"--out must be a place that can be written to, got {got}") from error


def _rank() -> int | None:
    """Rank of this process among those of torchrun; None without it."""
    return int(os.environ["RANK"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def _quietly_compare(arguments: argparse.Namespace, representations: Any, **options: Any) -> Comparison:
    with (
        terminal.ProgressBars(quiet=arguments.quiet or arguments.json or bool(_rank())) as bars,
        warnings.catch_warnings(),
    ):
        # failures and eigenpairs that did not converge are in the summary and the report
        warnings.simplefilter("ignore", LFMWarning)
        return compare(
            representations,
            measures=_measures(arguments),
            n_neighbors=arguments.n_neighbors,
            n_basis=arguments.n_basis,
            metric=arguments.metric,
            weights=arguments.weights,
            progress=bars,
            **options,
        )


def _check_packages(arguments: argparse.Namespace) -> None:
    """Find out that a package is missing before an hour of work, not after it."""
    from lfm_torch.report import check_available

    check_available()
    if not (arguments.quiet or arguments.json):
        terminal.check_available()
    if arguments.format == "parquet":
        try:
            import pandas  # noqa: F401
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise ImportError(f'--format parquet needs {error.name}: pip install "lfm-torch[pandas]"') from error


def _similarity(arguments: argparse.Namespace) -> int:
    if not (arguments.quiet or arguments.json):
        terminal.check_available()
    points = {}
    for name in (arguments.x, arguments.y):
        x = load_array(name)
        real = x if x.is_floating_point() or x.is_complex() else x.float()
        points[name] = _checks.check_points(name, real)
        if x.dim() != 2:
            raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}")
    rows = [len(x) for x in points.values()]
    if len(points) < 2:
        raise ValueError(f"x and y must be two different arrays, got {arguments.x} twice")
    if rows[0] != rows[1]:
        raise ValueError(f"{arguments.y} must have the rows of {arguments.x}, {rows[0]}, got {rows[1]}")
    values = _pair_values(arguments, *points.values())
    if arguments.json:
        print(json.dumps(values, indent=2))
    elif not arguments.quiet:
        terminal.print_pair(arguments.x, arguments.y, rows[0], values)
    return OK


def _measures(arguments: argparse.Namespace) -> list[str]:
    """Names of the measures asked for; "all" stands for every one."""
    measures: list[str] = list(MEASURES) if arguments.measures == ["all"] else arguments.measures
    check_measures(measures)
    return measures


def _pair_values(arguments: argparse.Namespace, x: Tensor, y: Tensor) -> dict[str, dict[str, float | None]]:
    names = ("n_neighbors", "n_basis", "metric", "weights")
    settings: dict[str, Any] = {name: getattr(arguments, name) for name in names}
    # halves need more samples than eigenvectors
    n_splits = 10 if len(x) // 2 > arguments.n_basis + 1 else 0
    measures = _measures(arguments)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    found = significance(x, y, measures=measures, n_splits=n_splits, **settings)
    directed = [name for name in measures if not MEASURES[name].symmetric]
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


def _extract(arguments: argparse.Namespace) -> int:
    suffix = arguments.out.suffix
    if suffix not in (".safetensors", ".npz"):
        raise ValueError(f"--out must end on .safetensors or .npz, got {arguments.out.name!r}")
    checkpoints = Checkpoints(
        [arguments.checkpoint],
        load_model(arguments),
        load_data(arguments.data),
        layers=arguments.layers,
        pooling=arguments.pooling,
        batch_size=arguments.batch_size,
        device=arguments.device,
        unsafe_pickle=arguments.unsafe_pickle,
    )
    if len(checkpoints) != 1:
        raise ValueError(f"CKPT must be one checkpoint, got {len(checkpoints)} under {arguments.checkpoint!r}")
    _make_writable(arguments.out.parent)
    found = {name: x.cpu() for name, x in next(iter(checkpoints.values())).items()}
    for name, x in found.items():
        _checks.check_finite(f"the output of layer {name!r}", x)
    _files.write_atomically(arguments.out, _serialized(found, suffix))
    shapes = {name: list(x.shape) for name, x in found.items()}
    if arguments.json:
        print(json.dumps({"layers": shapes, "written": str(arguments.out)}, indent=2))
    elif not arguments.quiet:
        for name, shape in shapes.items():
            print(f"{name}  {shape}")
        print(f"written: {arguments.out}")
    return OK


def _serialized(found: dict[str, Tensor], suffix: str) -> bytes:
    if suffix == ".safetensors":
        from safetensors.torch import save

        return save({name: x.contiguous() for name, x in found.items()})
    import io

    import numpy as np

    buffer = io.BytesIO()
    np.savez(buffer, **{name: x.numpy() for name, x in found.items()})  # type: ignore[arg-type, unused-ignore]
    return buffer.getvalue()


def _info(arguments: argparse.Namespace) -> int:
    values: dict[str, Any] = dataclasses.asdict(build_info())
    values["python"] = platform.python_version()
    for name in ("numpy", "safetensors", "rich", "matplotlib", "jinja2", "pandas", "pytorch-lightning", "scikit-learn"):
        values[name] = _version_of(name)
    if arguments.json:
        print(json.dumps(values, indent=2))
    elif not arguments.quiet:
        for name, value in values.items():
            print(f"{name.replace('_', ' '):<18}{_shown(value)}")
    return OK


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "not installed" if value is None else str(value)


def _demo(arguments: argparse.Namespace) -> int:
    from lfm_torch import demo

    defaults = _parser().parse_args(["compare", "checkpoints", "--model", "m", "--data", "d"])
    arguments = argparse.Namespace(**{**vars(defaults), **vars(arguments)})
    _check_packages(arguments)
    _make_writable(arguments.out)
    saved = arguments.out / "checkpoints"
    with terminal.ProgressBars(quiet=arguments.quiet or arguments.json) as bars:
        accuracy = demo.train(saved, progress=bars)
    source = {"model": "lfm_torch.demo:DigitsCNN", "data": "lfm_torch.demo:probe_images"}
    command = ["lfm-torch", "compare", str(saved), "--model", source["model"], "--data", source["data"]]
    command += ["--layers", *demo.LAYERS, "--out", str(arguments.out)]
    notes = [
        "held-out accuracy of the trained networks: " + ", ".join(f"{run} {a:.1%}" for run, a in accuracy.items()),
        f"the comparison alone: {shlex.join(command)}",
    ]
    checkpoints = Checkpoints(
        find_checkpoints(saved), load_object(source["model"]), load_data(source["data"]), layers=demo.LAYERS
    )
    return _compared(arguments, checkpoints, source=source, notes=notes)
