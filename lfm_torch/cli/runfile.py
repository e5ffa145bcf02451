"""Run files: the options of ``lfm-torch compare`` in TOML or YAML, to be kept beside the results."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from lfm_torch import _checks
from lfm_torch.representations.arrays import check_file

SUFFIXES = (".toml", ".yaml", ".yml")


def read(path: str | Path) -> dict[str, Any]:
    """Read a run file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another ending, or a file that does not read.
        ImportError: YAML without pyyaml, TOML before Python 3.11 without tomli.
    """
    path = Path(path)
    check_file(path, SUFFIXES)
    try:
        content = _toml(path) if path.suffix == ".toml" else _yaml(path)
    except ValueError as error:
        raise ValueError(f"{path} must be a readable {path.suffix[1:]} file, got: {_checks.one_line(error)}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options by name, got {type(content).__name__}")
    return content


def _toml(path: Path) -> Any:
    try:
        library = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError as error:
        raise ImportError('a .toml run file needs tomli before Python 3.11: pip install "tomli"') from error
    return library.loads(path.read_text("utf-8"))


def _yaml(path: Path) -> Any:
    try:
        import yaml
    except ImportError as error:
        raise ImportError('a .yaml run file needs pyyaml: pip install "lfm-torch[yaml]"') from error
    try:
        return yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(_checks.one_line(error, typed=True)) from error


def as_arguments(path: str | Path, known: Collection[str]) -> list[str]:
    r"""Return a run file as arguments of the command line, so that what follows them takes precedence.

    ``checkpoints`` are the positional ones. A list gives several values, true a flag, false leaves it out.

    Args:
        path: The run file. Paths in it are relative to the working directory, like those of the command line.
        known: Names of the options, with dashes.

    Raises:
        ValueError: an option that does not exist; near matches are suggested.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "run.toml")
        ...     _ = file.write_text('checkpoints = "runs"\nlayers = ["a", "b"]\nn_basis = 20\nquiet = true')
        ...     as_arguments(file, {"layers", "n-basis", "quiet"})
        ['runs', '--layers', 'a', 'b', '--n-basis', '20', '--quiet']
    """
    positional: list[str] = []
    options: list[str] = []
    for name, value in read(path).items():
        several = isinstance(value, Sequence) and not isinstance(value, str)
        values = [str(entry) for entry in (value if several else [value])]
        if name == "checkpoints":
            positional += values
            continue
        option = str(name).replace("_", "-")
        _checks.check_choice(f"an option in {path}", option, sorted(known))
        if value is True:
            options.append(f"--{option}")
        elif value is not False:
            options += [f"--{option}", *values]
    return [*positional, *options]
