"""Array files, read without ever executing what is in them: npy, npz, pt, safetensors."""

from __future__ import annotations

import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks

ARRAY_SUFFIXES = (".npy", ".npz", ".pt", ".pth", ".safetensors")


def load_array(path: str | Path) -> Tensor:
    """Read one array from a npy, npz, pt or safetensors file.

    Args:
        path: The file, or ``file:name`` for one of several arrays in it (``probe.npz:images``). Pickled content is
            refused.

    Returns:
        The array as a tensor on the CPU, in the dtype of the file.

    Raises:
        FileNotFoundError: no such file; near matches beside it are listed.
        ValueError: a file that does not read, holds no array, or holds several and none was named.

    Example:
        >>> import tempfile, numpy as np
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.savez(f"{folder}/two.npz", a=np.zeros((3, 2)), b=np.ones(4))
        ...     load_array(f"{folder}/two.npz:b").shape
        torch.Size([4])
    """
    file, name = _split_name(str(path))
    check_file(file, ARRAY_SUFFIXES)
    if file.suffix in (".npy", ".npz"):
        return _as_tensor(path, _read_numpy(path, file, name))
    return _as_tensor(path, _pick(path, read_tensors(file), name))


def read_tensors(path: str | Path, *, unsafe_pickle: bool = False, mapped: bool = False) -> Any:
    """Read what a safetensors or torch file holds, on the CPU.

    Args:
        path: ``.safetensors``, or anything ``torch.save`` wrote.
        unsafe_pickle: Let a pickle run the code it names. Only for files you trust.
        mapped: Map a torch file into memory instead of reading it (safetensors always are).

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that does not read, or a pickle that names code, without ``unsafe_pickle``.
    """
    path = Path(path)
    check_file(path)
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} must be a readable safetensors file, got: {error}") from error
    try:
        with _without_warnings():
            mapped = mapped and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=not unsafe_pickle, mmap=mapped)
    except pickle.UnpicklingError as error:
        if not unsafe_pickle and (zipfile.is_zipfile(path) or path.read_bytes()[:1] == b"\x80"):
            raise ValueError(_refusal(path, str(error))) from None
        raise _unreadable(path, error) from error
    # a damaged file trips the reader in many ways: EOFError, KeyError, RuntimeError, struct.error and more
    except Exception as error:
        raise _unreadable(path, error) from error


@contextmanager
def _without_warnings() -> Iterator[None]:
    # filters are global: a worker thread must leave them to the thread that started it
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    with warnings.catch_warnings():
        # "detected pickle protocol 4": what matters of it is in the error
        warnings.filterwarnings("ignore", category=UserWarning, module="torch")
        yield


def _refusal(path: Path, message: str) -> str:
    named = re.search(r"(?:GLOBAL|[Uu]nsupported class) (\S+)", message)
    what = f"that names the code {named.group(1)!r}" if named else "of a kind that the safe reader does not know"
    return (
        f"{path} must hold plain tensors, got a pickle {what}: refused, because loading it can execute anything. If "
        "you trust the file, allow it with --unsafe-pickle (unsafe_pickle=True), or save model.state_dict() instead"
    )


def _unreadable(path: Path, error: Exception) -> ValueError:
    first = (str(error).strip().splitlines() or [""])[0].split(". ")[0]
    size = path.stat().st_size
    detail = f"{type(error).__name__}{': ' + first if first else ''}"
    return ValueError(f"{path} must be a file that torch.save wrote, got {size} bytes that do not read ({detail})")


def check_file(path: Path, suffixes: tuple[str, ...] | None = None) -> None:
    """Raise unless ``path`` is an existing file whose name ends on one of ``suffixes``.

    Raises:
        FileNotFoundError: nothing there; near matches beside it are listed.
        ValueError: a directory, or another ending.
    """
    if path.is_dir():
        raise ValueError(f"{path} must be a file, got a directory")
    if not path.exists():
        beside = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        raise FileNotFoundError(f"{path} must be an existing file, got none{_checks.did_you_mean(path.name, beside)}")
    if suffixes is not None and path.suffix not in suffixes:
        raise ValueError(f"{path} must be a file ending on {', '.join(suffixes)}, got {path.suffix or 'no ending'!r}")


def _split_name(path: str) -> tuple[Path, str | None]:
    file, colon, name = path.rpartition(":")
    if colon and not Path(path).exists() and Path(file).suffix in ARRAY_SUFFIXES:
        return Path(file), name
    return Path(path), None


def _read_numpy(path: str | Path, file: Path, name: str | None) -> Any:
    with _reading_numbers(file):
        loaded = np.load(file, allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return _pick(path, loaded, name)
    with loaded:
        # only the chosen entry is read: what stands beside it may be large, or no numbers at all
        entry = _pick(path, {entry: entry for entry in loaded.files}, name)
        with _reading_numbers(file):
            return loaded[entry]


@contextmanager
def _reading_numbers(file: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile) as error:
        advice = "; it holds Python objects, which are never loaded" if "allow_pickle" in str(error) else ""
        raise ValueError(f"{file} must be a readable array of numbers, got: {error}{advice}") from error


def _pick(path: str | Path, content: Any, name: str | None) -> Any:
    if not isinstance(content, Mapping):
        if name is not None:
            raise ValueError(f"{path} must be the file alone, which holds a single array; leave out {':' + name!r}")
        return content
    names = [str(key) for key in content]
    if name is None:
        if len(content) != 1:
            raise ValueError(
                f"{path} must be a file with one array, got {len(content)} ({', '.join(names[:8])}); choose with "
                f"'{path}:{names[0] if names else 'name'}'"
            )
        return next(iter(content.values()))
    if name not in content:
        hint = _checks.did_you_mean(name, names)
        raise ValueError(f"{path} must name one of {', '.join(names[:8])}, got {name!r}{hint}")
    return content[name]


def _as_tensor(path: str | Path, value: Any) -> Tensor:
    if isinstance(value, np.ndarray):
        try:
            return _checks.from_numpy(value)
        except TypeError:
            raise ValueError(f"{path} must be an array of numbers, got dtype {value.dtype}") from None
    if not isinstance(value, Tensor):
        raise ValueError(f"{path} must hold a tensor, got {type(value).__name__}")
    return value.detach()
