"""What all benchmarks share: interleaved timing, and results with machine, versions and commit in one JSON file."""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
_PAUSE = 0.1


def interleaved(contenders: dict[str, Callable[[], Any]], repeats: int, *, calls: int = 0) -> dict[str, list[float]]:
    """Seconds of each contender, run in turns so that a busy machine slows all alike; the first turn is a warm-up.

    A pause before each lets the threads of the one before stop spinning: libraries with thread pools of their own
    otherwise slow their successor. What takes milliseconds only would then be lost in the time that processors take to
    wake up: with ``calls`` each turn begins with one call that is not timed, and is the mean of so many after it.
    """
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            synchronize()
            time.sleep(_PAUSE)
            if calls:
                run()
                synchronize()
            start = time.perf_counter()
            for _ in range(max(calls, 1)):
                run()
            synchronize()
            if turn:
                seconds[name].append((time.perf_counter() - start) / max(calls, 1))
    return seconds


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    """Middle value."""
    return sorted(values)[len(values) // 2]


def ratio(seconds: dict[str, list[float]], peer: str, ours: str) -> float:
    """Median over turns of peer / ours."""
    return median([p / o for p, o in zip(seconds[peer], seconds[ours], strict=True)])


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": gpu,
        "system": f"{platform.system()} {platform.machine()}",
    }


def write(
    name: str,
    rows: list[dict[str, Any]],
    *,
    args: argparse.Namespace | None = None,
    packages: tuple[str, ...] = (),
    limits: dict[str, float] | None = None,
) -> Path:
    """Write ``benchmarks/results/<name>.json`` and print the rows as a table.

    With the parsed ``args``, a run on a GPU goes to ``<name>-cuda.json`` and one of small sizes to
    ``<name>-quick.json``; ``limits`` is what :func:`roofline` measured in the same run.
    """
    if args is not None:
        name += ("-cuda" if args.device == "cuda" else "") + ("-quick" if args.quick else "")
    versions = {"python": platform.python_version()}
    for package in ("lfm-torch", "torch", "numpy", *packages):
        versions[package] = _version(package)
    record = {
        "benchmark": name,
        "commit": _commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ"),
        "machine": machine(),
        "versions": versions,
        **({} if limits is None else {"limits": limits}),
        "rows": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    _print_table(rows)
    return path


def arguments(description: str, *, cases: tuple[str, ...] = ()) -> argparse.Namespace:
    """The options every benchmark takes, and ``--case`` where it has parts that can run alone."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--repeats", type=int, default=5, help="timed turns after one warm-up")
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it runs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="where to run (cpu)")
    if cases:
        parser.add_argument("--case", choices=cases, help="one part alone, the others as recorded (all)")
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda needs a CUDA device, and torch sees none")
    return args


def roofline(device: str) -> dict[str, float]:
    """Measured limits of the device in this run: matmul rates in TFLOP/s, copy bandwidth in GB/s (read and write)."""
    limits: dict[str, float] = {}
    n = 8192 if device == "cuda" else 2048
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = min(interleaved({"matmul": lambda a=a, b=b: a @ b}, 5)["matmul"])
        limits[f"matmul {str(dtype).removeprefix('torch.')} TFLOP/s"] = 2 * n**3 / seconds / 1e12
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(interleaved({"copy": lambda: target.copy_(source)}, 5)["copy"])
    limits["copy GB/s"] = 2 * source.nbytes / seconds / 1e9
    return limits


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _commit() -> str:
    run = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return run.stdout.strip() or "unknown"


def _print_table(rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [f"{row.get(c, ''):.4g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        for row in rows
    ]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    for line in [columns, ["-" * w for w in widths], *cells]:
        print("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)))
