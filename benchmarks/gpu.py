"""Everything a GPU has to prove, in one run: build, tests marked gpu, benchmarks with their peers, one table.

For a machine whose python has torch with CUDA, without network. A prebuilt ``lfm_torch/_cuda*.so`` is taken as it is.
Writes ``benchmarks/results/<gpu>.json`` (h200.json on an H200). Each part can be run alone: ``python benchmarks/gpu.py
tests``, ``... bench bench_knn``, ``... sanitize``. ``... resources`` needs nvcc only: registers, shared memory, spills
and occupancy of every kernel on sm_90, to ``cuda-resources.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "bench", "sanitize", "resources")
# seconds a part may take, so that one that hangs costs neither the others nor the machine
LIMITS = {"build": 240, "tests": 200, "bench": 120, "sanitize": 300}
WHOLE, BEGUN = 480, time.perf_counter()  # of build, tests and benchmarks together
SANITIZERS = ("memcheck", "racecheck")
# what these measure is not a GPU: the command line on many small checkpoints
NOT_FOR_GPU = {"bench_compare"}
# of an SM of sm_90: registers, bytes of shared memory (1 KiB more for each block), threads, blocks
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32
# small shapes: the sanitizer slows a kernel by one to two orders of magnitude
SANITIZED = ["tests/test_cuda_library.py", "-m", "gpu", "-k", "sample_inputs or half_stored or ragged or empty"]


def run(what: str, command: list[str], limit: int) -> dict[str, Any]:
    """Run one part; what it printed goes to the terminal, its end and its time into the record."""
    print(f"\n== {what}: {' '.join(command)}", flush=True)
    # "python -m pytest" and the benchmarks must both import the package beside them
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if what in SANITIZERS:  # an access past a tensor shows only where each tensor is an allocation of its own
        environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    started = time.perf_counter()
    if what not in SANITIZERS:
        limit = min(limit, max(1, int(WHOLE - (started - BEGUN))))
    try:
        status: int | str = subprocess.run(command, cwd=ROOT, env=environment, timeout=limit, check=False).returncode
    except subprocess.TimeoutExpired:
        status = f"stopped after {limit} s"
    return {"what": what, "status": status, "seconds": time.perf_counter() - started}


def build() -> list[dict[str, Any]]:
    if list((ROOT / "lfm_torch").glob("_cuda*.so")):
        return [{"what": "build", "status": 0, "seconds": 0.0, "note": "prebuilt"}]
    return [run("build", [sys.executable, "setup.py", "-q", "build_ext", "--inplace"], LIMITS["build"])]


def tests() -> list[dict[str, Any]]:
    return [run("tests", [sys.executable, "-m", "pytest", "-q", "-m", "gpu"], LIMITS["tests"])]


def bench(names: list[str]) -> list[dict[str, Any]]:
    found = sorted(path for path in (ROOT / "benchmarks").glob("bench_*.py") if path.stem not in NOT_FOR_GPU)
    scripts = [path for path in found if not names or path.stem in names]
    if len(scripts) < len(names):
        raise SystemExit(f"benchmarks must be among {[path.stem for path in found]}, got {names}")
    parts = []
    for script in scripts:
        started = time.time()
        part = run(script.stem, [sys.executable, str(script), "--device", "cuda", "--repeats", "3"], LIMITS["bench"])
        written = [path for path in harness.RESULTS.glob("*-cuda.json") if path.stat().st_mtime >= started]
        part["rows"] = [row for path in written for row in json.loads(path.read_text())["rows"]]
        parts.append(part)
    return parts


def sanitize() -> list[dict[str, Any]]:
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        raise SystemExit("compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
    pytest = [sys.executable, "-m", "pytest", "-q", *SANITIZED]
    return [
        run(check, [tool, "--tool", check, "--error-exitcode", "9", *pytest], LIMITS["sanitize"])
        for check in SANITIZERS
    ]


def resources() -> list[dict[str, Any]]:
    """One row for each kernel of the sources, the most that any of its instances takes."""
    from torch.utils.cpp_extension import include_paths

    nvcc = shutil.which("nvcc")
    if nvcc is None:
        raise SystemExit("nvcc is not on PATH; it comes with the CUDA toolkit")
    flags = ["-std=c++17", "-O3", "-arch=sm_90", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xptxas=-v", "-cubin"]
    flags += ["-DTORCH_TARGET_VERSION=0x020a000000000000", *(f"-I{path}" for path in (ROOT / "csrc", *include_paths()))]
    entry = re.compile(
        r"Compiling entry function '(?P<name>\w+)'.*?(?P<spilled>\d+) bytes spill stores"
        r".*?Used (?P<registers>\d+) registers(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
        flags=re.DOTALL,
    )
    rows = []
    for source in sorted((ROOT / "csrc").rglob("*_cuda.cu")):
        with tempfile.TemporaryDirectory() as folder:
            command = [nvcc, *flags, str(source), "-o", str(Path(folder) / "kernels.cubin")]
            text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        near = "".join(path.read_text() for path in sorted(source.parent.glob("*.cu*")))
        size = re.search(r"constexpr int kThreads = (\d+);", near)
        assert size is not None, source
        kernels: dict[str, dict[str, int]] = {}
        for found in entry.finditer(text):
            name = re.search(r"\d([a-z_]+_kernel)(?![a-z])", found["name"])
            if name is None or "3cub" in found["name"]:
                continue  # kernels of the toolkit
            kernel = kernels.setdefault(name[1], {"instances": 0, "registers": 0, "shared": 0, "spilled": 0})
            kernel["instances"] += 1
            for key in ("registers", "shared", "spilled"):
                kernel[key] = max(kernel[key], int(found[key] or 0))
        for name, kernel in sorted(kernels.items()):
            rows.append({"file": source.name, "kernel": name, **kernel, **occupancy(int(size[1]), kernel)})
    return rows


def occupancy(threads: int, kernel: dict[str, int]) -> dict[str, float]:
    """Blocks on one SM, from registers (given out to warps by 256) and static shared memory."""
    of_warp = -(-kernel["registers"] * 32 // 256) * 256
    blocks = min(
        BLOCKS, THREADS // threads, REGISTERS // of_warp // (threads // 32), SHARED // (kernel["shared"] + 1024)
    )
    return {"threads": threads, "blocks on an SM": blocks, "occupancy": blocks * threads / THREADS}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="one part alone (build, tests and bench)")
    parser.add_argument("names", nargs="*", help="benchmarks, such as bench_knn (all)")
    arguments = parser.parse_args()
    if arguments.part == "resources":
        harness.write("cuda-resources", resources())
        return 0
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and torch sees none")
    chosen = [arguments.part] if arguments.part else ["build", "tests", "bench"]
    steps = {"build": build, "tests": tests, "bench": lambda: bench(arguments.names), "sanitize": sanitize}
    parts = [part for name in chosen for part in steps[name]()]
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-")
    rows = [{key: value for key, value in part.items() if key != "rows"} for part in parts]
    details = [{"benchmark": part["what"], **row} for part in parts for row in part.get("rows", [])]
    print()
    harness.write(
        gpu if not arguments.part else f"{gpu}-{arguments.part}", rows + details, limits=harness.roofline("cuda")
    )
    return 0 if all(part["status"] == 0 for part in parts) else 1


if __name__ == "__main__":
    sys.exit(main())
