"""Saved weights, read safely and fitted to a model: all of it, or an error that says what does not fit."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lfm_torch.representations.arrays import read_tensors
from lfm_torch.representations.checkpoint_files import weight_files

# where training loops put the weights inside a checkpoint
_STATE_KEYS = ("state_dict", "model_state_dict", "model", "module", "weights")
_LISTED = 4


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
