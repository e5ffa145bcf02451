"""Where activations gather, batch by batch: in memory on some device, or in ``.npy`` files larger than it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor


class Store(Protocol):
    """Takes ``{layer: [batch, d]}`` again and again, and gives ``{layer: [n, d]}``."""

    def append(self, batch: Mapping[str, Tensor]) -> None:
        """Add the rows of a batch."""

    def tensors(self) -> dict[str, Tensor]:
        """Return all rows."""


@contextmanager
def open_store(target: torch.device | str | Path | None, dtype: torch.dtype | None) -> Iterator[Store]:
    """Give a store on a device (None: where the batches are) or in a folder (a Path).

    Raises:
        TypeError: bfloat16 in a folder, for which NumPy has no type.
    """
    if not isinstance(target, Path):
        yield _Memory(target, dtype)
        return
    if dtype == torch.bfloat16:
        raise TypeError("dtype must be float16, float32 or float64 in a .npy file, got torch.bfloat16")
    target.mkdir(parents=True, exist_ok=True)
    folder = _Folder(target, dtype)
    try:
        yield folder
    finally:
        folder.close()


class _Memory:
    def __init__(self, device: torch.device | str | None, dtype: torch.dtype | None) -> None:
        self.device, self.dtype = device, dtype
        self.parts: dict[str, list[Tensor]] = {}

    def append(self, batch: Mapping[str, Tensor]) -> None:
        for name, x in batch.items():
            parts = self.parts.setdefault(name, [])
            _check_width(name, x, parts[0].shape[1] if parts else None)
            parts.append(x.to(self.device, self.dtype))

    def tensors(self) -> dict[str, Tensor]:
        return {name: torch.cat(parts) for name, parts in self.parts.items()}


class _Folder:
    def __init__(self, folder: Path, dtype: torch.dtype | None) -> None:
        self.folder, self.dtype = folder, dtype
        self.files: dict[str, tuple[IO[bytes], int, np.dtype[Any]]] = {}
        self.rows = 0

    def append(self, batch: Mapping[str, Tensor]) -> None:
        for name, x in batch.items():
            values = x.to("cpu", self.dtype).numpy()
            if name not in self.files:
                opened = open(self.path(name), "wb")  # noqa: SIM115 (closed by close())
                self.files[name] = (opened, values.shape[1], values.dtype)
                self._write_header(name, 0)
            file, width, dtype = self.files[name]
            _check_width(name, x, width)
            file.write(np.ascontiguousarray(values, dtype).data)
        self.rows += len(x)

    def tensors(self) -> dict[str, Tensor]:
        for name, (file, _, _) in self.files.items():
            end = file.tell()
            # NumPy leaves room in the header for the number of rows to grow
            self._write_header(name, self.rows)
            file.seek(end)
            file.flush()
        # copy on write: whoever changes the tensor does not change the file
        return {name: torch.from_numpy(np.load(self.path(name), mmap_mode="c")) for name in self.files}

    def path(self, name: str) -> Path:
        return self.folder / f"{quote(name, safe=' ')}.npy"

    def close(self) -> None:
        for file, _, _ in self.files.values():
            file.close()

    def _write_header(self, name: str, rows: int) -> None:
        file, width, dtype = self.files[name]
        file.seek(0)
        header = {
            "descr": np.lib.format.dtype_to_descr(dtype),
            "fortran_order": False,
            "shape": (rows, width),
        }
        np.lib.format.write_array_header_1_0(file, header)


def _check_width(name: str, x: Tensor, width: int | None) -> None:
    if width is not None and x.shape[1] != width:
        raise ValueError(
            f"the output of layer {name!r} must have as many features in every batch, {width} in the first, got "
            f"{x.shape[1]}; take pooling='mean', or inputs of one size"
        )
