"""Saved weights: found, put in order, loaded safely into a model, and read as representations one at a time."""

from __future__ import annotations

import copy
import difflib
import functools
import glob
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch.arrays import check_file, read_tensors
from lfm_torch.jobs.fingerprints import DigestOf, batches_digest, digest, file_digest, model_digest
from lfm_torch.jobs.store import INDEX, PIECES
from lfm_torch.representation import POOLINGS, Pooling, activations, as_batches, move_model, resolve_layers
from lfm_torch.sources import Source

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
# where training loops put the weights inside a checkpoint
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")
_LISTED = 4
# what Hugging Face's save_pretrained writes, the safer first
_FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a training run.

    Attributes:
        name: how reports call it, unique within a comparison.
        run: the training run it belongs to.
        step: its place in the run (epoch or step); None where the name tells none.
        path: the file, None for representations given directly.
    """

    name: str
    run: str
    step: int | None = None
    path: Path | None = None


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
    called = {file: _absolute(file.parent if file.name in _FOLDER_WEIGHTS else file) for file in files}
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


def in_order(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Sort by run (numbers in it by value), then step; a checkpoint without a step ends its run."""

    def natural(text: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", text)
        # not isdigit: a superscript is a digit that int() does not read
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(
        checkpoints, key=lambda c: (natural(c.run), c.step is None, -1 if c.step is None else c.step, natural(c.name))
    )


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
    stores = {file.parent / PIECES for file in directory.rglob(INDEX)}
    inside: dict[Path, list[Path]] = {}
    for file in sorted(directory.rglob("*")):
        if (
            stores.isdisjoint(file.parents)
            and file.is_file()
            and (file.suffix in suffixes or file.name in _FOLDER_WEIGHTS)
        ):
            inside.setdefault(file.parent, []).append(file)
    found = []
    for files in inside.values():
        names = {file.name: file for file in files}
        weights = next((names[name] for name in _FOLDER_WEIGHTS if name in names), None)
        found += files if weights is None else [weights]
    return found


def weight_files(path: Path) -> list[Path]:
    """Return the files a checkpoint's weights are in: itself, or the shards that an index lists.

    Raises:
        ValueError: an index that does not read.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text())["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be an index of shards with a 'weight_map', got one that does not read"
        ) from error
    # a name in an index is a file beside it, nowhere else
    return [path, *(path.parent / Path(shard).name for shard in shards)]


def _absolute(path: Path) -> Path:
    # unlike Path.absolute this takes out "..", so that a file is one file however it is written
    return Path(os.path.abspath(path))


# what a number in a file name counts; the first that is found wins
_COUNTERS = (
    re.compile(r"(?:^|(?<=[^a-zA-Z]))(?:epoch|ep)[=_\-]?(\d+)", re.IGNORECASE),
    re.compile(r"(?:^|(?<=[^a-zA-Z]))(?:global_?step|step|iteration|iter|it)s?[=_\-]?(\d+)", re.IGNORECASE),
    re.compile(r"(?:^|(?<=[^a-zA-Z]))(?:checkpoint|ckpt)[=_\-]?(\d+)", re.IGNORECASE),
)
# metrics that Lightning writes behind the epoch: val_loss=0.31
_METRIC = re.compile(r"[-_]?[a-zA-Z]\w*=-?\d+\.\d+(?:e-?\d+)?", re.IGNORECASE)
_VERSION = re.compile(r"-v\d+$")
_LAST = ("last", "final")


def parse_name(name: str, *, root: str = "") -> tuple[str, int | None]:
    """Read run and step from a path below ``root``, without ending: see :func:`find_checkpoints`.

    Example:
        >>> parse_name("seed0/epoch=04-step=75"), parse_name("model_seed_3"), parse_name("a/last")
        (('seed0', 4), ('model_seed_3', None), ('a', None))
    """
    directory, _, stem = name.rpartition("/")
    step, rest = None, _VERSION.sub("", _METRIC.sub("", stem))
    for counter in _COUNTERS:
        counted = counter.search(rest)
        if counted:
            step = int(counted.group(1)) if step is None else step
            rest = rest[: counted.start()] + rest[counted.end() :]
    rest = re.sub(r"[-_=.]{2,}", "-", rest).strip("-_=. ")
    if step is None and rest.lower() in _LAST:
        rest = ""
    if step is None and rest.isdecimal():
        step, rest = int(rest), ""
    return "/".join(part for part in (directory, rest) if part) or root or "run", step


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


def load_weights(model: nn.Module, path: str | Path, *, unsafe_pickle: bool = False) -> None:
    """Load a checkpoint into ``model``: all of it, or an error that says what does not fit.

    Weights are looked for at the top level and under the keys of Lightning and common training loops. A prefix common
    to the weights ("model.", "module.", "_orig_mod.") is dropped only where that makes them fit exactly, so a
    LightningModule's checkpoint fits the network inside it.

    Args:
        model: The module to fill; untouched when the checkpoint does not fit.
        path: .pt, .pth, .ckpt (read with ``weights_only=True``) or .safetensors.
        unsafe_pickle: Allow a pickle that executes code, for files you trust.

    Raises:
        FileNotFoundError: no such file.
        ValueError: an unreadable file, a pickle that would execute code, or weights that do not fit the model (missing,
            unexpected and mismatching names are listed).

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     saved = {"state_dict": {f"model.{k}": v for k, v in torch.nn.Linear(2, 3).state_dict().items()}}
        ...     torch.save(saved, f"{folder}/last.ckpt")
        ...     load_weights(torch.nn.Linear(2, 3), f"{folder}/last.ckpt")
    """
    model.load_state_dict(fitting_weights(model, path, unsafe_pickle=unsafe_pickle))


def fitting_weights(model: nn.Module, path: str | Path, *, unsafe_pickle: bool = False) -> dict[str, Tensor]:
    """Read a checkpoint under the names of the model's state dict, as :func:`load_weights` does, and load nothing.

    Raises:
        FileNotFoundError: no such file.
        ValueError: as :func:`load_weights`.
    """
    first, *shards = weight_files(Path(path))
    if shards:
        state = {name: x for shard in shards for name, x in _state_of(shard, read_tensors(shard)).items()}
    else:
        state = _state_of(path, read_tensors(first, unsafe_pickle=unsafe_pickle))
    fitting, missing = _fit(path, model, state)
    return fitting | {name: model.state_dict()[name] for name in missing}


def _state_of(path: str | Path, content: Any) -> dict[str, Tensor]:
    if isinstance(content, nn.Module):
        return dict(content.state_dict())
    if isinstance(content, Mapping):
        for inner in (content, *(content[key] for key in _STATE_KEYS if key in content)):
            inner = inner.state_dict() if isinstance(inner, nn.Module) else inner
            if isinstance(inner, Mapping) and inner and all(isinstance(value, Tensor) for value in inner.values()):
                return {str(name): value for name, value in inner.items()}
    got = type(content).__name__
    if isinstance(content, Mapping):
        got = f"the keys {', '.join(map(repr, list(content)[:8]))}"
    places = ", ".join(map(repr, _STATE_KEYS))
    raise ValueError(f"{path} must hold a state dict, at the top or under {places}, got {got}")


def _fit(path: str | Path, model: nn.Module, state: dict[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights under the model's names and the names that may be missing; raise where they do not fit."""
    wanted = model.state_dict()
    # written by BatchNorm only since torch 0.4, and of no use in eval mode
    optional = {name for name in wanted if name.endswith("num_batches_tracked")}
    required = set(wanted) - optional

    def fits(names: set[str]) -> bool:
        return required <= names <= set(wanted)

    if not any("_orig_mod." in name for name in wanted):
        state = {name.replace("_orig_mod.", ""): value for name, value in state.items()}
    if not fits(set(state)):
        prefixes = {name[: dot.end()] for name in state for dot in re.finditer(r"\.", name)}
        cut = {p: {name.removeprefix(p): state[name] for name in state if name.startswith(p)} for p in sorted(prefixes)}
        fitting = [prefix for prefix, inner in cut.items() if fits(set(inner))]
        if len(fitting) > 1:
            listed = ", ".join(map(repr, fitting))
            raise ValueError(
                f"{path} must hold the weights of one such model, got several, under {listed}; save one alone"
            )
        if fitting:
            state = cut[fitting[0]]
        elif cut:
            # for the message: the reading that comes closest
            state = max([state, *cut.values()], key=lambda inner: len(set(inner) & set(wanted)))
    problems = _misfits(state, wanted, required)
    if problems:
        raise ValueError(f"{path} must fit the model {type(model).__name__}, got {'; '.join(problems)}")
    return state, sorted(optional - set(state))


def _misfits(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor], required: set[str]) -> list[str]:
    missing, unexpected = sorted(required - set(state)), [name for name in state if name not in wanted]
    problems = []
    if missing:
        problems.append(f"{len(missing)} missing ({_first(missing)})")
    if unexpected:
        near = difflib.get_close_matches(missing[0], unexpected, n=1) if missing else []
        hint = f", of which {near[0]!r} is near the missing {missing[0]!r}" if near else ""
        problems.append(f"{len(unexpected)} unexpected ({_first(unexpected)}){hint}")
    shapes = [
        f"{name}: {list(wanted[name].shape)} in the model, {list(value.shape)} in the file"
        for name, value in state.items()
        if name in wanted and value.shape != wanted[name].shape
    ]
    if shapes:
        problems.append(f"{len(shapes)} of another shape ({_first(shapes)})")
    return problems


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:_LISTED]) + (", ..." if len(names) > _LISTED else "")


class Checkpoints(Source):
    """Checkpoints of one architecture as a lazy mapping of representations, ``{name: {layer: [n, d]}}``.

    Each is read, run on the probe set and let go when it is asked for, so that hundreds need the memory of one: what
    :func:`compare` takes.

    Args:
        checkpoints: What :func:`find_checkpoints` takes, or its result.
        model: A module, or a function that makes one; its weights are overwritten by each checkpoint in turn.
        data: Probe inputs, as in :func:`extract`.
        layers: Layer names or globs, as in :func:`extract`.
        pooling: "mean" or "flatten".
        batch_size: Samples per forward pass.
        device: Where to run the model; None for where it is.
        unsafe_pickle: Allow checkpoints that execute code when loaded.

    Raises:
        TypeError: ``model`` does not give a module, data of the wrong kind.
        ValueError: a layer that the model does not have, an unknown pooling, data that :func:`extract` refuses.

    Example:
        >>> import tempfile, torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in range(2):
        ...         torch.save(network.state_dict(), f"{folder}/model_seed_{seed}.pt")
        ...     found = Checkpoints(folder, network, torch.randn(60, 4), layers="0")
        ...     {name: list(layers["0"].shape) for name, layers in found.items()}
        {'model_seed_0': [60, 8], 'model_seed_1': [60, 8]}
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path | Checkpoint],
        model: nn.Module | Callable[[], nn.Module],
        data: Any,
        *,
        layers: str | Sequence[str],
        pooling: Pooling = "mean",
        batch_size: int = 256,
        device: torch.device | str | None = None,
        unsafe_pickle: bool = False,
    ) -> None:
        self.checkpoints = _as_checkpoints(checkpoints)
        self._by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        self.model = _made(model)
        self.layers = resolve_layers(self.model, layers)
        # what is wrong for every checkpoint is said once, before the first is read
        _checks.check_choice("pooling", pooling, POOLINGS)
        as_batches(data, batch_size)
        self.data, self.pooling, self.batch_size = data, pooling, batch_size
        self.unsafe_pickle = unsafe_pickle
        if device is not None:
            move_model(self.model, device)
        self.device = str(next((tensor.device for tensor in self.model.parameters()), torch.device("cpu")))
        self._lock = threading.Lock()
        self._idle: list[nn.Module] = []

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"Checkpoints({len(self)} of {kind}, layers {', '.join(self.layers)}, pooling {self.pooling})"

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """Load one checkpoint and extract its layers; values that are not finite are left to the reader to judge."""
        path = self._by_name[name].path
        assert path is not None
        with self._borrowed_model() as model:
            load_weights(model, path, unsafe_pickle=self.unsafe_pickle)
            return activations(model, self.data, layers=self.layers, pooling=self.pooling, batch_size=self.batch_size)

    @contextmanager
    def _borrowed_model(self) -> Iterator[nn.Module]:
        """Lend each thread a copy of the model, or the model itself to one thread at a time."""
        if self.threads == 1:
            with self._lock:
                yield self.model
            return
        with self._lock:
            # of a model that is not in use: a copy of one in its forward pass has that pass's hooks
            model = self._idle.pop() if self._idle else copy.deepcopy(self.model)
        try:
            yield model
        finally:
            with self._lock:
                self._idle.append(model)

    @property
    def threads(self) -> int | None:
        """How many threads may read at once; None for any number."""
        one_at_a_time = not isinstance(self.data, (Tensor, np.ndarray, tuple, list, dict))
        # a data set or a loader need not be safe to read in two threads, and a GPU is shared as it is
        return 1 if one_at_a_time or self.device != "cpu" else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_idle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._idle = threading.Lock(), []

    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return for each layer the digest of all that its values depend on: file, model, probe data, settings."""
        path = self._by_name[name].path
        assert path is not None
        check_file(path)
        weights = [digest_of(file, file_digest) for file in weight_files(path)]
        return {layer: digest("checkpoint", self._digest, weights, layer) for layer in self.layers}

    @functools.cached_property
    def _digest(self) -> str:
        data, _ = self._probe
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        return digest(model_digest(self.model), data, self.pooling, self.batch_size, kind)

    @functools.cached_property
    def _probe(self) -> tuple[str, int]:
        return batches_digest(as_batches(self.data, self.batch_size))

    @property
    def n_samples(self) -> int:
        """Number of probe inputs."""
        return self._probe[1]

    @property
    def settings(self) -> dict[str, Any]:
        """What a report should say about where the representations come from."""
        return {"model": type(self.model).__name__, "layers": self.layers, "pooling": self.pooling}


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"model must be a torch.nn.Module or a function that makes one, got {type(model).__name__}")
    with torch.random.fork_rng(devices=()):
        made = model()
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must make a torch.nn.Module, got {type(made).__name__}")
    return made


def _as_checkpoints(checkpoints: str | Path | Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    if not isinstance(checkpoints, (str, Path)) and all(isinstance(c, Checkpoint) for c in checkpoints):
        listed = [c for c in checkpoints if isinstance(c, Checkpoint)]
        names = [c.name for c in listed]
        if not listed or len(set(names)) < len(names) or any(c.path is None for c in listed):
            raise ValueError("checkpoints must be at least one, with a path each and names that differ")
        return listed
    if isinstance(checkpoints, (str, Path)):
        return find_checkpoints(checkpoints)
    if any(isinstance(c, Checkpoint) for c in checkpoints):
        raise TypeError("checkpoints must be all paths or all Checkpoint records, got a mixture")
    return find_checkpoints([c for c in checkpoints if not isinstance(c, Checkpoint)])
