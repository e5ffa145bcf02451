"""What several commands take, and the checks of it."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from lfm_torch.graphs.weights import WEIGHTS
from lfm_torch.measures.table import DEFAULT_MEASURES, MEASURES, check_measures
from lfm_torch.ops.knn import METRICS
from lfm_torch.representations.arrays import ARRAY_SUFFIXES
from lfm_torch.representations.nonfinite import NONFINITE
from lfm_torch.representations.pooling import POOLINGS

OK, FAILED, PARTIAL, INTERRUPTED = 0, 1, 3, 130
EXIT_STATUS = """exit status:
  0  all went well
  1  nothing could be compared, or an input is wrong (the message says which)
  2  the command line itself is wrong
  3  some checkpoints could not be compared; the others were, and the report says why
  130  interrupted with Ctrl-C"""


def add_model(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add what says which layers of which model are read, on which inputs."""
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


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add what a comparison of two representations depends on."""
    names = f"all, or among {', '.join(MEASURES)}"
    parser.add_argument("--measures", nargs="+", default=list(DEFAULT_MEASURES), metavar="NAME", help=names)
    parser.add_argument("--n-neighbors", type=int, metavar="K", help="of each sample (15%% of them, at most 300)")
    parser.add_argument(
        "--n-basis", type=int, metavar="M", help="eigenvectors per space (a quarter of the samples, at most 50)"
    )
    parser.add_argument("--metric", default="angular", help=f"{', '.join(METRICS)} (angular)")
    parser.add_argument("--weights", default="gaussian", help=f"{', '.join(WEIGHTS)} (gaussian)")
    parser.add_argument(
        "--nonfinite",
        choices=NONFINITE,
        default="raise",
        help="a sample with a NaN or an infinity: refuse the representation (raise), or drop it everywhere",
    )


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add what every command takes."""
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    parser.add_argument("--quiet", action="store_true", help="print errors only")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def measures_of(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Names of the measures asked for; "all" stands for every one."""
    return tuple(MEASURES) if arguments.measures == ["all"] else check_measures(arguments.measures)


def make_writable(directory: Path) -> None:
    """Make the directory and try to write there: what cannot be written to is said before the work, not after it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        got = f"{str(directory)!r}: {error.strerror}"
        raise ValueError(f"--out must be a place that can be written to, got {got}") from error
