"""Finding and loading the two compiled libraries, and telling what is live."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from lfm_torch._version import __version__
from lfm_torch._warnings import LFMWarning
from lfm_torch.ops._source_digest import source_digest

SIMD_LEVELS = ("generic", "avx2", "avx512", "vnni")
_PACKAGE = Path(__file__).parents[1]
_BUILD_AGAIN = "build it again: make setup, or python setup.py build_ext --inplace"


@dataclass(frozen=True)
class BuildInfo:
    """What is live in this process: see :func:`build_info`.

    Attributes:
        version: Of lfm_torch.
        torch: Version of torch.
        cpu_kernels: Whether the compiled CPU kernels are live; the PyTorch twins run otherwise.
        cpu_build: What the CPU library says of its build: digest of its sources, least torch, compiler.
        simd: Vector instructions that its kernels take here, one of "generic", "avx2", "avx512", "vnni"; None without
            them.
        torch_cpu_capability: What torch's own kernels take.
        cuda_kernels: Whether the compiled CUDA kernels are live.
        cuda_build: What the CUDA library says of its build: digest, least torch, architectures, CUDA runtime.
        torch_cuda: CUDA version that torch was built for.
        cuda_driver: Newest CUDA version that the driver of this machine serves.
        cuda_devices: Names and compute capabilities of the GPUs that torch sees.
        notes: Why something is not live, or not to be trusted.
    """

    version: str
    torch: str
    cpu_kernels: bool
    cpu_build: str | None
    simd: str | None
    torch_cpu_capability: str
    cuda_kernels: bool
    cuda_build: str | None
    torch_cuda: str | None
    cuda_driver: str | None
    cuda_devices: tuple[str, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Library:
    """A compiled library beside the package.

    Attributes:
        path: Where it lies, None where there is none.
        build: What it says of its build, by key; empty where it says nothing.
        problem: Why its kernels are not live; None where they are.
    """

    path: Path | None
    build: dict[str, str]
    problem: str | None

    @property
    def live(self) -> bool:
        """Whether its kernels are registered in this process."""
        return self.problem is None

    def described(self) -> str | None:
        """Its build in one line."""
        readable = self.build | ({"cuda": _dotted(int(self.build["cuda"]))} if "cuda" in self.build else {})
        return "; ".join(f"{key} {value}" for key, value in readable.items()) or None


@dataclass(frozen=True)
class Loaded:
    """Both libraries, and whether doing without them was asked for."""

    cpu: Library
    cuda: Library
    by_choice: bool
    notes: tuple[str, ...]


@functools.cache
def load() -> Loaded:
    """Load the operator libraries once; a library that does not load is reported in ``notes``, never hidden.

    Raises:
        ValueError: ``LFM_TORCH_SIMD`` names no level.

    Warns:
        LFMWarning: a library was built from other sources than those beside the package.
    """
    _check_simd()
    if os.environ.get("LFM_TORCH_NO_EXT") == "1":
        reason = "LFM_TORCH_NO_EXT=1: the pure PyTorch twins are used"
        none = Library(None, {}, reason)
        return Loaded(none, none, True, (reason,))
    cpu = _loaded("_cpu")
    if torch.version.cuda is None:
        path = _find("_cuda")
        build = _build_of(path) if path else {}
        cuda = Library(path, build, "_cuda: CUDA kernels not loaded: this torch is built without CUDA")
    else:
        cuda = _loaded("_cuda")
    stale = [problem for library in (cpu, cuda) if (problem := _staleness(library.path, library.build))]
    for problem in stale:
        warnings.warn(problem, LFMWarning, stacklevel=2)
    problems = [library.problem for library in (cpu, cuda) if library.problem is not None]
    return Loaded(cpu, cuda, False, (*problems, *stale))


def _check_simd() -> None:
    level = os.environ.get("LFM_TORCH_SIMD", "")
    if level and level not in SIMD_LEVELS:
        raise ValueError(f"LFM_TORCH_SIMD must be one of {', '.join(SIMD_LEVELS)}, got {level!r}")


def _find(stem: str) -> Path | None:
    return next(iter(sorted(_PACKAGE.glob(f"{stem}*.so"), reverse=True)), None)


def _loaded(stem: str) -> Library:
    path = _find(stem)
    if path is None:
        reason = "no compiled library beside the package (built with LFM_TORCH_NO_EXT, or without a compiler)"
        return Library(None, {}, f"{stem}: {reason}")
    build = _build_of(path)
    problem = _driver_problem(build)
    if problem is None:
        try:
            torch.ops.load_library(str(path))  # type: ignore[no-untyped-call]
        except OSError as error:
            problem = f"does not load: {error}"
    return Library(path, build, None if problem is None else f"{stem}: {path.name} {problem}")


def _build_of(path: Path) -> dict[str, str]:
    """Read what csrc/build_info.h put into the file, without loading it."""
    if path.stat().st_size == 0:
        return {}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        found = re.search(rb"lfm_torch build: ([^\0]+)", content)
        entries = found[1].decode().split("; ") if found else []
    return dict(entry.partition("=")[::2] for entry in entries)


def _driver_problem(build: dict[str, str]) -> str | None:
    """A library of a newer major CUDA version than the driver's loads, and fails at its first launch."""
    driver = _driver_version()
    if "cuda" not in build or driver is None or int(build["cuda"]) // 1000 <= driver // 1000:
        return None
    return (
        f"was built with CUDA {_dotted(int(build['cuda']))}, and the driver serves CUDA {_dotted(driver)}: update the "
        "driver, or build with a toolkit of its major version"
    )


def _driver_version() -> int | None:
    """Newest CUDA version that the driver serves, as 1000 major + 10 minor; None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else None


def _dotted(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _staleness(path: Path | None, build: dict[str, str]) -> str | None:
    """Tell where a library and the sources beside the package do not belong together; an installed package has none."""
    digest = _digest_of_sources()
    if path is None or digest is None or build.get("source") == digest:
        return None
    return f"{path.name} was built from sources {build.get('source', 'unknown')}, csrc is {digest}: {_BUILD_AGAIN}"


@functools.cache
def _digest_of_sources() -> str | None:
    csrc = _PACKAGE.parent / "csrc"
    return source_digest(csrc) if (csrc / "ops.cpp").exists() else None


def library_problems() -> list[str]:
    """What is wrong with the libraries that lie beside the package, loaded or not: missing, or of other sources."""
    problems = []
    for stem in ("_cpu", "_cuda"):
        path = _find(stem)
        problem = _staleness(path, _build_of(path)) if path else f"{stem}*.so is missing: {_BUILD_AGAIN}"
        problems += [problem] if problem else []
    return problems


def simd_level() -> str | None:
    """Vector instructions that the CPU kernels take in this process, one of ``SIMD_LEVELS``; None without kernels."""
    library = load().cpu
    if not library.live:
        return None
    level = getattr(ctypes.CDLL(str(library.path)), "lfm_torch_simd", None)
    if level is None:  # a library of older sources, which a note names
        return None
    level.restype = ctypes.c_char_p
    return bytes(level()).decode()


def _device_notes(build: dict[str, str]) -> tuple[str, ...]:
    """Name the GPUs without code in the CUDA library: machine code serves its major version, PTX all later ones."""
    asked_for = build["architectures"].split(",")
    found = [re.fullmatch(r"(\d+)\.(\d+)\w?(\+PTX)?", name) for name in asked_for]
    built = [((int(match[1]), int(match[2])), match[3] is not None) for match in found if match is not None]
    if len(built) < len(asked_for):  # torch knows architectures by other names too: nothing can be said
        return ()
    notes = []
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        if not any((code[0] == major and code[1] <= minor) or (ptx and code <= (major, minor)) for code, ptx in built):
            notes.append(
                f"cuda:{index} has compute capability {major}.{minor}, and the CUDA library code for "
                f"{build['architectures']}: set TORCH_CUDA_ARCH_LIST={major}.{minor} and {_BUILD_AGAIN}"
            )
    return tuple(notes)


def build_info() -> BuildInfo:
    """Tell what is live in this process: compiled kernels, devices, and the reason where one is missing.

    Returns:
        BuildInfo, the attributes of which say what is what.

    Example:
        >>> import lfm_torch as lfm
        >>> lfm.build_info().version.count(".")
        2
    """
    loaded = load()
    devices = [
        f"{torch.cuda.get_device_name(i)} ({'.'.join(map(str, torch.cuda.get_device_capability(i)))})"
        for i in range(torch.cuda.device_count())
    ]
    driver = _driver_version()
    device_notes = _device_notes(loaded.cuda.build) if loaded.cuda.live and loaded.cuda.build else ()
    return BuildInfo(
        version=__version__,
        torch=torch.__version__,
        cpu_kernels=loaded.cpu.live,
        cpu_build=loaded.cpu.described(),
        simd=simd_level(),
        torch_cpu_capability=torch.backends.cpu.get_cpu_capability(),
        cuda_kernels=loaded.cuda.live,
        cuda_build=loaded.cuda.described(),
        torch_cuda=torch.version.cuda,
        cuda_driver=None if driver is None else _dotted(driver),
        cuda_devices=tuple(devices),
        notes=(*loaded.notes, *device_notes),
    )
