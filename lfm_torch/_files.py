"""What lies on disk: records of tensors, files written whole or not at all, where a store keeps its pieces."""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from torch import Tensor

Record = TypeVar("Record")
# what a store of finished pieces (comparison/jobs/store.py) consists of
STORE_INDEX = "index.sqlite"
STORE_PIECES = "pieces"


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


def write_atomically(path: str | Path, content: bytes, *, durable: bool = False) -> None:
    """Write to a temporary file beside ``path`` and rename it: readers see the old file or the whole new one.

    With ``durable`` the file and its name are on the disk when this returns, also after a power failure.
    """
    with replacing(path, durable=durable) as file:
        file.write(content)


@contextmanager
def replacing(path: str | Path, *, durable: bool = False) -> Iterator[BinaryIO]:
    """Open a temporary file that takes the place of ``path`` when all went well: see :func:`write_atomically`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            # a write to an open file, on a full disk say, does not tell which
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    if durable and hasattr(os, "O_DIRECTORY"):
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)


def stored_below(directory: Path) -> set[Path]:
    """Folders below a directory that hold the pieces of a store: safetensors files that are nobody's weights."""
    return {index.parent / STORE_PIECES for index in directory.rglob(STORE_INDEX)}


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor on the CPU, without a copy where it is contiguous."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: Any = flat.view(torch.uint8).numpy()
    return memoryview(array)
