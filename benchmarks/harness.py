"""What all benchmarks share: timing in turns, and results with machine, versions and commit in one JSON file.

A result is written anew with every row, so that a benchmark that is stopped keeps what it measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from runs import commit

Row = dict[str, Any]

RESULTS = Path(__file__).parent / "results"
_PAUSE = 0.1
# on a GPU: seconds of a timed turn, so that its beginning and its end do not count; and of all turns together, where
# time on the machine is short
_TURN, _WHOLE = 0.02, 15.0


class Turns(list[float]):
    """Seconds per call, one entry a turn; ``calls`` in each turn where that was calibrated, otherwise 0."""

    calls = 0


def interleaved(
    contenders: dict[str, Callable[[], Any]], repeats: int, *, calls: int = 0, device: str = "cpu"
) -> dict[str, Turns]:
    """Seconds of each contender, run in turns so that a busy machine slows all alike; the first turn is a warm-up.

    A pause before each lets the threads of the one before stop spinning: libraries with thread pools of their own
    otherwise slow their successor. What takes milliseconds only would then be lost in the time that processors take to
    wake up: with ``calls`` each turn begins with one call that is not timed, and is the mean of so many after it.

    With ``device="cuda"`` there is no pause, each contender gets as many calls a turn as fill 20 ms, and the turns are
    fewer than ``repeats`` where they would take more than 15 s.
    """
    if device == "cuda":
        return _on_gpu(contenders, repeats)
    seconds = {name: Turns() for name in contenders}
    for turn in range(repeats + 1):
        for name, run in contenders.items():
            synchronize()
            time.sleep(_PAUSE)
            if calls:
                run()
            spent = _timed(run, max(calls, 1))
            if turn:
                seconds[name].append(spent / max(calls, 1))
    return seconds


def _on_gpu(contenders: dict[str, Callable[[], Any]], repeats: int) -> dict[str, Turns]:
    seconds = {name: Turns() for name in contenders}
    first, turn = {}, {}
    for name, run in contenders.items():
        first[name] = turn[name] = _timed(run, 1)
        calls = 1
        if first[name] < 1:  # what takes longer needs no calibration, and the first call is near enough
            while (spent := _timed(run, calls)) < _TURN and calls < 10_000:
                calls = min(10 * calls, math.ceil(1.2 * calls * _TURN / max(spent, 1e-9)))
            turn[name] = spent
        seconds[name].calls = calls
    if sum(first.values()) > _WHOLE:  # a second turn may not end in the time there is
        for name, times in seconds.items():
            times.append(turn[name] / times.calls)
        return seconds
    for _ in range(max(1, min(repeats, int(_WHOLE / sum(turn.values()))))):
        for name, run in contenders.items():
            seconds[name].append(_timed(run, seconds[name].calls) / seconds[name].calls)
    return seconds


def _timed(run: Callable[[], Any], calls: int) -> float:
    synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    synchronize()
    return time.perf_counter() - start


def once(run: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it returned: for peers too slow to take turns."""
    found: list[Any] = []
    return _timed(lambda: found.append(run()), 1), found[0]


@contextlib.contextmanager
def tf32(allowed: bool = True) -> Iterator[None]:
    """Let float32 products on a GPU be made in TF32, with 10 bits of mantissa, until the end of the block."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if allowed else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def synchronize() -> None:
    """Wait for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median(values: list[float]) -> float:
    """Middle value."""
    return sorted(values)[len(values) // 2]


def ratio(seconds: dict[str, Turns], peer: str, ours: str) -> float:
    """Median over turns of peer / ours."""
    return median([p / o for p, o in zip(seconds[peer], seconds[ours], strict=True)])


def calibration(times: Turns) -> Row:
    """For a row: how many calls a turn had, and how many turns there were, where the timing chose both itself."""
    return {"calls": times.calls, "turns": len(times)} if times.calls else {}


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


class Record:
    """``benchmarks/results/<name>.json``, written with every row; also to ``$OUT``, where that is set.

    With the parsed ``args``, a run on a GPU goes to ``<name>-cuda.json`` and one of small sizes to
    ``<name>-quick.json``; with ``--case`` the rows of other cases are kept as recorded. Used in a ``with`` statement:
    the file says ``"complete": true`` once that has come to its end, the rows are printed as a table, and a case that
    failed ends the program with 1.
    """

    def __init__(self, name: str, *, args: argparse.Namespace | None = None, packages: tuple[str, ...] = ()) -> None:
        if args is not None:
            name += ("-cuda" if args.device == "cuda" else "") + ("-quick" if args.quick else "")
        versions = {"python": platform.python_version()}
        for package in ("lfm-torch", "torch", "numpy", *packages):
            versions[package] = _version(package)
        self.name, self.complete = name, False
        self.rows: list[Row] = []
        self._head = {"benchmark": name, "commit": commit(), "machine": machine(), "versions": versions}
        case = getattr(args, "case", None)
        if case is not None and self.path.exists():
            self.rows = [row for row in json.loads(self.path.read_text())["rows"] if row.get("case") != case]

    @property
    def path(self) -> Path:
        """The file."""
        return RESULTS / f"{self.name}.json"

    def add(self, *rows: Row) -> None:
        """Add rows, and write."""
        self.rows += rows
        self.write()

    def measure(self, what: str, rows: Iterable[Row], **keys: Any) -> None:
        """Add rows, with ``keys`` in each, as they are measured.

        What fails becomes a row with an "error", so that the cases after it are measured all the same.
        """
        try:
            for row in rows:
                self.add({**keys, **row})
        except Exception as error:
            traceback.print_exc()
            self.add({**keys, "what": what, "error": failure(error)})
        if torch.cuda.is_available():
            with contextlib.suppress(RuntimeError):  # after a kernel that failed
                torch.cuda.empty_cache()  # the next case may need it in other sizes, or by another allocator

    def write(self, pending: Iterable[Row] = ()) -> None:
        """Write the rows, and those of a part still under way after them."""
        date = datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%MZ")
        record = {**self._head, "date": date, "complete": self.complete, "rows": [*self.rows, *pending]}
        folders = [RESULTS, *(Path(folder) for folder in [os.environ.get("OUT")] if folder)]
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            part = folder / f"{self.name}.part"
            part.write_text(json.dumps(record, indent=1, default=str) + "\n")
            part.replace(folder / f"{self.name}.json")

    def __enter__(self) -> Record:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.complete = error is None
        if self.rows:  # one that was stopped before its first row leaves the last result as it is
            self.write()
            print("\n".join(table(self.rows)), flush=True)
        if error is None and any("error" in row for row in self.rows):
            raise SystemExit(1)


def failure(error: Exception) -> str:
    """An exception in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


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


def roofline(device: str) -> Iterator[Row]:
    """Measured limits of the device: matmul rates in TFLOP/s, copy bandwidth in GB/s (read and write)."""
    n = 8192 if device == "cuda" else 2048
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if device == "cuda" else (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
        seconds = min(interleaved({"matmul": lambda a=a, b=b: a @ b}, 5, device=device)["matmul"])
        yield {"what": f"matmul {str(dtype).removeprefix('torch.')}, TFLOP/s", "limit": 2 * n**3 / seconds / 1e12}
    source = torch.empty(2**28 if device == "cuda" else 2**26, device=device)
    target = torch.empty_like(source)
    seconds = min(interleaved({"copy": lambda: target.copy_(source)}, 5, device=device)["copy"])
    yield {"what": "copy, GB/s", "limit": 2 * source.nbytes / seconds / 1e9}


def _version(package: str) -> str:
    try:
        if package == "lfm-torch":  # also where it is not installed, only on the path
            from lfm_torch import __version__

            return __version__
        return version(package)
    except (ImportError, PackageNotFoundError):
        return "absent"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def table(rows: list[Row], digits: int = 4) -> list[str]:
    """The rows as the lines of a table."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [
        [f"{row.get(c, ''):.{digits}g}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in columns]
        for row in rows
    ]
    widths = [max(len(c), *(len(line[i]) for line in cells)) for i, c in enumerate(columns)]
    return [
        "  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip()
        for line in [columns, ["-" * w for w in widths], *cells]
    ]
