"""The parser of all commands, what is done for every one of them, and the demo, which is a comparison of its own."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lfm_torch import _checks
from lfm_torch._version import __version__
from lfm_torch._warnings import LFMWarning
from lfm_torch.cli import align, cache, compare, demo, extract, info, runfile, similarity
from lfm_torch.cli.inputs import load_data, load_object
from lfm_torch.cli.options import EXIT_STATUS, FAILED, INTERRUPTED, add_output, make_writable
from lfm_torch.report.progress import ProgressBars
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.checkpoints import Checkpoints


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
        with _warnings_in_a_line():
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


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """Print what the library warns of without the line of code that Python shows."""
    with warnings.catch_warnings():
        shown = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: Any, **more: Any) -> None:
            if issubclass(category, LFMWarning):
                print(f"lfm-torch: warning: {message}", file=sys.stderr)
            else:
                shown(message, category, *where, **more)

        warnings.showwarning = show
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lfm-torch",
        description="Compare neural representations with latent functional maps.",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"lfm-torch {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(
        commands, "compare", compare.run, "compare saved checkpoints, layer by layer, and write a report"
    )
    compare.add_arguments(command)
    add_output(command)

    command = _command(commands, "similarity", similarity.run, "compare two arrays of the same samples")
    similarity.add_arguments(command)
    add_output(command)

    command = _command(commands, "align", align.run, "find the map between two arrays whose rows need not pair")
    align.add_arguments(command)
    add_output(command)

    command = _command(commands, "extract", extract.run, "write the activations of a checkpoint's layers to a file")
    extract.add_arguments(command)
    add_output(command)

    cache.add_commands(_command(commands, "cache", cache.run, "list, check and thin out a store of finished pieces"))

    command = _command(commands, "info", info.run, "show versions and which kernels are live")
    add_output(command)

    command = _command(commands, "demo", _demo, "train three small networks on handwritten digits and compare them")
    command.add_argument("--out", type=Path, default=Path("demo-output"), metavar="DIR", help="where to (demo-output)")
    add_output(command)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=EXIT_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser


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


def _demo(arguments: argparse.Namespace) -> int:
    defaults = _parser().parse_args(["compare", "checkpoints", "--model", "m", "--data", "d"])
    arguments = argparse.Namespace(**{**vars(defaults), **vars(arguments)})
    compare.check_packages(arguments)
    make_writable(arguments.out)
    saved = arguments.out / "checkpoints"
    with ProgressBars(quiet=arguments.quiet or arguments.json) as bars:
        accuracy = demo.train(saved, progress=bars)
    source = {"model": "lfm_torch.cli.demo:DigitsCNN", "data": "lfm_torch.cli.demo:probe_images"}
    command = ["lfm-torch", "compare", str(saved), "--model", source["model"], "--data", source["data"]]
    command += ["--layers", *demo.LAYERS, "--out", str(arguments.out)]
    notes = [
        "held-out accuracy of the trained networks: " + ", ".join(f"{run} {a:.1%}" for run, a in accuracy.items()),
        f"the comparison alone: {shlex.join(command)}",
    ]
    checkpoints = Checkpoints(
        find_checkpoints(saved), load_object(source["model"]), load_data(source["data"]), layers=demo.LAYERS
    )
    return compare.compared(arguments, checkpoints, source=source, notes=notes)
