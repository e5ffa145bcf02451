"""Checkpoints found: the files that paths, globs and directories stand for, in order along training."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Sequence
from pathlib import Path

from lfm_torch import _files
from lfm_torch.representations.checkpoint_files import FOLDER_WEIGHTS, SUFFIXES, Checkpoint, in_order, parse_name


def find_checkpoints(
    paths: str | Path | Sequence[str | Path],
    *,
    pattern: str | re.Pattern[str] | None = None,
    suffixes: Sequence[str] = SUFFIXES,
) -> list[Checkpoint]:
    """List checkpoint files, grouped into runs and ordered along training.

    The run of a file is its directory, with what its name holds beside the epoch or step:
    ``seed0/epoch=04-step=75.ckpt`` is step 4 of run "seed0", ``resnet_epoch_12.pt`` step 12 of "resnet",
    ``model_seed_3.pth`` a run of its own. "last" and "final" come at the end of their directory's run. A directory as
    Hugging Face's Trainer writes it (``checkpoint-500/model.safetensors``, in shards or not) is one checkpoint, and its
    optimizer and other files are none.

    Args:
        paths: Files, globs (``**`` for any depth) and directories (searched for .ckpt, .pt, .pth and .safetensors).
        pattern: Regular expression with the groups ``run`` and ``step`` (either may be left out), searched in the path
            with forward slashes, to replace the rules above.
        suffixes: Endings of the files that are looked for in directories.

    Returns:
        Checkpoints in order of run, then step. Names are paths below the common directory, without ending.

    Raises:
        FileNotFoundError: a directory or glob that leads to nothing. (A single missing file is listed: it fails when
            read, alone.)
        ValueError: a pattern that is no regular expression, lacks both groups or does not match a file.

    Example:
        >>> import tempfile, pathlib
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for name in ("epoch=10.ckpt", "epoch=2.ckpt"):
        ...         pathlib.Path(folder, name).touch()
        ...     [(c.name, c.step) for c in find_checkpoints(folder)]
        [('epoch=2', 2), ('epoch=10', 10)]
    """
    files = _files_of([paths] if isinstance(paths, (str, Path)) else paths, suffixes)
    # a folder's weights are called by the folder
    called = {file: _absolute(file.parent if file.name in FOLDER_WEIGHTS else file) for file in files}
    common = Path(os.path.commonpath([path.parent for path in called.values()]))
    relative = {file: path.relative_to(common) for file, path in called.items()}
    short = {file: file_name.with_suffix("").as_posix() for file, file_name in relative.items()}
    if len(set(short.values())) < len(files):
        short = {file: file_name.as_posix() for file, file_name in relative.items()}
    compiled = None if pattern is None else _compiled(pattern)
    found = []
    for file in files:
        run, step = parse_name(relative[file].with_suffix("").as_posix(), root=common.name)
        if compiled is not None:
            run, step = _matched(compiled, file, run, step)
        found.append(Checkpoint(short[file], run, step, file))
    return in_order(found)


def _files_of(paths: Sequence[str | Path], suffixes: Sequence[str]) -> list[Path]:
    files: dict[Path, Path] = {}
    for path in paths:
        text = str(path)
        if Path(text).is_dir():
            matched = _below(Path(text), suffixes)
            wanted = f"a directory with checkpoints ({', '.join(suffixes)})"
        elif Path(text).exists() or not glob.has_magic(text):
            # a missing file stays in the list: it is a failure of its own, not of the others
            matched, wanted = [Path(text)], "a file"
        else:
            matched = sorted(Path(file) for file in glob.glob(text, recursive=True) if Path(file).is_file())
            wanted = "a glob that matches files"
        if not matched:
            raise FileNotFoundError(f"checkpoints must be {wanted}, got {text!r}, where there is none")
        for file in matched:
            files.setdefault(_absolute(file), file)
    if not files:
        raise ValueError("checkpoints must name at least one file, got none")
    return list(files.values())


def _below(directory: Path, suffixes: Sequence[str]) -> list[Path]:
    """Files below a directory; of one that holds a model as Hugging Face saves it, the weights alone.

    The bases that an earlier comparison stored there are none.
    """
    stores = _files.stored_below(directory)
    inside: dict[Path, list[Path]] = {}
    for file in sorted(directory.rglob("*")):
        if (
            stores.isdisjoint(file.parents)
            and file.is_file()
            and (file.suffix in suffixes or file.name in FOLDER_WEIGHTS)
        ):
            inside.setdefault(file.parent, []).append(file)
    found = []
    for files in inside.values():
        names = {file.name: file for file in files}
        weights = next((names[name] for name in FOLDER_WEIGHTS if name in names), None)
        found += files if weights is None else [weights]
    return found


def _absolute(path: Path) -> Path:
    # unlike Path.absolute this takes out "..", so that a file is one file however it is written
    return Path(os.path.abspath(path))


def _compiled(pattern: str | re.Pattern[str]) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern must be a regular expression, got {pattern!r}: {error}") from error
    if not {"run", "step"} & set(compiled.groupindex):
        raise ValueError(f"pattern must have a group (?P<run>...) or (?P<step>...), got {compiled.pattern!r}")
    return compiled


def _matched(pattern: re.Pattern[str], file: Path, run: str, step: int | None) -> tuple[str, int | None]:
    match = pattern.search(file.as_posix())
    if match is None:
        raise ValueError(f"pattern must match every checkpoint, got {pattern.pattern!r} against {file.as_posix()}")
    groups = match.groupdict()
    if "step" in groups:
        if not (groups["step"] or "").isdecimal():
            raise ValueError(f"pattern must give a number for step, got {groups['step']!r} from {file.as_posix()}")
        step = int(groups["step"])
    return groups.get("run") or run, step
