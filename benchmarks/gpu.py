"""Everything a GPU has to prove, in one run: build, tests marked gpu, benchmarks with their peers, one table.

For a machine whose python has torch with CUDA, without network. A prebuilt ``lfm_torch/_cuda*.so`` is taken as it is.
Writes ``benchmarks/results/<gpu>.json`` (h200.json on an H200). Each part can be run alone: ``python benchmarks/gpu.py
tests``, ``... bench bench_knn``, ``... sanitize``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import harness
import torch

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "bench", "sanitize")
# seconds a part may take, so that one that hangs costs neither the others nor the machine
LIMITS = {"build": 240, "tests": 200, "bench": 120, "sanitize": 300}
# small shapes: the sanitizer slows a kernel by one to two orders of magnitude
SANITIZED = ["tests/test_ops.py", "tests/test_cuda_library.py", "-m", "gpu", "-k", "twin or stream or misaligned"]


def run(what: str, command: list[str], limit: int) -> dict[str, Any]:
    """Run one part; what it printed goes to the terminal, its end and its time into the record."""
    print(f"\n== {what}: {' '.join(command)}", flush=True)
    # "python -m pytest" and the benchmarks must both import the package beside them
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    started = time.perf_counter()
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
    scripts = sorted(path for path in (ROOT / "benchmarks").glob("bench_*.py") if not names or path.stem in names)
    if len(scripts) < len(names):
        raise SystemExit(f"benchmarks must be among {[path.stem for path in scripts]}, got {names}")
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
        for check in ("memcheck", "racecheck")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS, help="one part alone (build, tests and bench)")
    parser.add_argument("names", nargs="*", help="benchmarks, such as bench_knn (all)")
    arguments = parser.parse_args()
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
