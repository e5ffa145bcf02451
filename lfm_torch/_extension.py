"""Finding and loading the two compiled libraries, and telling what is live."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class BuildInfo:
    """What is live in this process: see :func:`build_info`."""

    version: str
    torch: str
    cpu_kernels: bool
    cpu_capability: str
    cuda_kernels: bool
    cuda_devices: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Loaded:
    """Which libraries were loaded, and why another was not."""

    cpu: bool
    cuda: bool
    notes: tuple[str, ...]


@functools.cache
def load() -> Loaded:
    """Load the operator libraries once; a library that does not load is reported in ``notes``, never hidden."""
    if os.environ.get("LFM_TORCH_NO_EXT") == "1":
        return Loaded(False, False, ("LFM_TORCH_NO_EXT=1: the pure PyTorch twins are used",))
    notes: list[str] = []
    cpu = _load_library("_cpu", notes)
    if torch.version.cuda is None:
        notes.append("CUDA kernels not loaded: this torch is built without CUDA")
        cuda = False
    else:
        cuda = _load_library("_cuda", notes)
    return Loaded(cpu, cuda, tuple(notes))


def _load_library(stem: str, notes: list[str]) -> bool:
    found = sorted(Path(__file__).parent.glob(f"{stem}*.so"))
    if not found:
        notes.append(
            f"{stem}: no compiled library beside the package (built with LFM_TORCH_NO_EXT, or without a compiler)"
        )
        return False
    try:
        torch.ops.load_library(str(found[-1]))  # type: ignore[no-untyped-call]
    except OSError as error:
        notes.append(f"{stem}: {found[-1].name} does not load: {error}")
        return False
    return True


def build_info() -> BuildInfo:
    """Tell what is live in this process: compiled kernels, devices, and the reason where one is missing.

    Example:
        >>> import lfm_torch as lfm
        >>> lfm.build_info().version.count(".")
        2
    """
    from lfm_torch import __version__

    loaded = load()
    devices = tuple(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        cpu_kernels=loaded.cpu,
        cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cuda_kernels=loaded.cuda,
        cuda_devices=devices,
        notes=loaded.notes,
    )
