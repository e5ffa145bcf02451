"""Digests of what a representation depends on: weights, model code, probe data, settings."""

from __future__ import annotations

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch import _checks, _files

# how a source asks for the digest of a file: a store remembers it
DigestOf = Callable[[Path, Callable[[Path], str]], str]
_CHUNK = 2**22


def digest(*parts: Any) -> str:
    """Return the SHA-256 of plain values (anything JSON holds), in hexadecimal.

    Example:
        >>> digest("basis", {"n_basis": 50}) == digest("basis", {"n_basis": 51})
        False
    """
    return hashlib.sha256(json.dumps(parts, sort_keys=True, allow_nan=False).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's content."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


def value_digest(value: Any) -> str:
    """Return the digest of tensors, arrays, and the lists and mappings that hold them.

    Raises:
        TypeError: something else, of which no digest can be trusted.
    """
    found = hashlib.sha256()
    _update(found.update, value)
    return found.hexdigest()


def _update(update: Callable[[Any], None], value: Any) -> None:
    if isinstance(value, np.ndarray):
        value = _checks.from_numpy(value)
    if isinstance(value, Tensor):
        update(f"tensor {value.dtype} {list(value.shape)};".encode())
        # in rows: a view of a file mapped into memory is read piece by piece
        rows = value.detach().reshape(1) if value.dim() == 0 else value.detach()
        step = max(1, _CHUNK // max(1, rows[:1].numel() * rows.element_size()))
        for start in range(0, len(rows), step):
            update(_files.raw_bytes(rows[start : start + step]))
    elif isinstance(value, Mapping):
        update(f"mapping {len(value)};".encode())
        for key, inner in value.items():
            update(f"{key!r}:".encode())
            _update(update, inner)
    elif isinstance(value, (list, tuple)):
        update(f"sequence {len(value)};".encode())
        for inner in value:
            _update(update, inner)
    elif isinstance(value, (str, bytes, int, float, bool, type(None))):
        update(f"{value!r};".encode())
    else:
        raise TypeError(f"a digest must be of tensors, arrays and plain values, got {type(value).__name__}")


def batches_digest(batches: Iterable[Any]) -> tuple[str, int]:
    """Return the digest of probe inputs and their number, reading them once, batch by batch."""
    found, n = hashlib.sha256(), 0
    for batch in batches:
        inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
        _update(found.update, inputs)
        values = inputs.values() if isinstance(inputs, Mapping) else (inputs,)
        n += next(len(value) for value in values if isinstance(value, (Tensor, np.ndarray, list, tuple)))
    return found.hexdigest(), n


def model_digest(model: nn.Module) -> str:
    """Return the digest of a model but for its weights: structure, plain attributes, buffers no checkpoint holds, code.

    The code is that of the files its classes outside torch come from, so that an edited ``forward`` is another model.
    """
    found = hashlib.sha256(torch.__version__.encode())
    saved = set(model.state_dict())
    for name, module in model.named_modules():
        found.update(f"{name} {type(module).__module__}.{type(module).__qualname__};".encode())
        plain = {key: value for key, value in vars(module).items() if key != "training" and _is_plain(value)}
        found.update(json.dumps(plain, sort_keys=True, default=str).encode())
    for name, buffer in model.named_buffers():
        if name not in saved:
            _update(found.update, [name, buffer])
    classes = {type(module) for module in model.modules()}
    for source in sorted({_source_of(kind) for kind in classes if kind.__module__.partition(".")[0] != "torch"}):
        found.update(source.encode())
    return found.hexdigest()


def _is_plain(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return all(map(_is_plain, value))
    return isinstance(value, (str, int, float, bool, type(None)))


def _source_of(kind: type) -> str:
    module = sys.modules.get(kind.__module__)
    try:
        return inspect.getsource(module if module is not None else kind)
    except (OSError, TypeError):
        # typed at a prompt: the byte code of its methods is what there is
        codes = [member.__code__ for member in vars(kind).values() if inspect.isfunction(member)]
        return repr([(c.co_code, c.co_names, [v for v in c.co_consts if _is_plain(v)]) for c in codes])
