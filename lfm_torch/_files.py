"""Records of tensors (Graph, Basis, FunctionalMap) in safetensors files; a crash while writing leaves no half file."""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

Record = TypeVar("Record")


def save_record(path: str | Path, record: Any) -> None:
    """Write the tensors of a dataclass, and its other fields as JSON metadata, to a safetensors file."""
    from safetensors.torch import save

    values = {field.name: getattr(record, field.name) for field in fields(record)}
    # clones: two fields may be views of one tensor, which the format does not know
    tensors = {name: value.detach().clone().contiguous() for name, value in values.items() if isinstance(value, Tensor)}
    others = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
    metadata = {"format": type(record).__name__, "fields": json.dumps(others)}
    write_atomically(path, save(tensors, metadata))


def load_record(path: str | Path, kind: type[Record]) -> Record:
    """Read what :func:`save_record` wrote.

    Raises:
        ValueError: the file is no safetensors file or holds another kind of record.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file, got one that does not read: {error}") from error
    if metadata.get("format") != kind.__name__:
        raise ValueError(f"{path} must hold a {kind.__name__}, got {metadata.get('format', 'plain tensors')}")
    others = {name: tuple(v) if isinstance(v, list) else v for name, v in json.loads(metadata["fields"]).items()}
    return kind(**tensors, **others)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write to a temporary file beside ``path`` and rename it: readers see the old file or the whole new one."""
    path = Path(path)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
