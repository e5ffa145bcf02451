"""What the two runs on a GPU share: commands with a time limit, and reading what they print.

Without torch, whose import takes seconds, so that the clock of a run starts at once.
"""

from __future__ import annotations

import contextlib
import glob
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE = 2.0  # seconds in which what was killed has to be gone; one that a driver holds is not waited for
# The kernels of this library alone, whose names hold its namespace: torch's are many, and not ours to check. The
# failures that the runtime reports are raised by the library itself.
SANITIZER_OPTIONS = ("--kernel-name", "kns=lfm", "--report-api-errors", "no", "--error-exitcode", "9")
SANITIZERS = ("memcheck", "racecheck")
_running: set[subprocess.Popen[str]] = set()
_over = threading.Event()


class Outcome(NamedTuple):
    """How a command ended.

    Attributes:
        status: Its exit status, None where it was stopped at its limit or never began.
        seconds: How long it ran.
    """

    status: int | None
    seconds: float

    def __str__(self) -> str:
        ended = "stopped at its limit" if self.status is None else "ok" if self.status == 0 else f"status {self.status}"
        return f"{ended}, {self.seconds:.1f} s"


def run(
    command: Sequence[str],
    *,
    limit: float,
    environment: Mapping[str, str] | None = None,
    cwd: str | os.PathLike[str] | None = None,
    on_line: Callable[[str], None] = print,
    on_tick: Callable[[], None] = lambda: None,
    tick: float = 5.0,
) -> Outcome:
    """Run ``command`` for at most ``limit`` seconds in a process group of its own, which ends with it.

    ``on_line`` is called with every line of its output and errors, by another thread; ``on_tick`` every ``tick``
    seconds.
    """
    begun = time.monotonic()
    process = subprocess.Popen(
        command,
        env=environment,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )

    _running.add(process)
    if _over.is_set():
        _kill(process)

    def pass_on() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            on_line(line.rstrip("\n"))

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    status: int | None = None
    try:
        while status is None and (left := limit - (time.monotonic() - begun)) > 0:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(min(tick, left))
            if status is None and left > tick:
                on_tick()
    finally:
        _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        reader.join(GRACE)
        _running.discard(process)
    return Outcome(status, time.monotonic() - begun)


def _kill(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def end_all() -> None:
    """Kill what is still running, and what other threads are about to start: for an interrupted run."""
    _over.set()
    for process in list(_running):
        _kill(process)


class TestOutcomes:
    """How tests end, read line by line from what ``pytest -v`` prints as it goes, with or without workers."""

    __test__ = False  # no test of pytest's own

    def __init__(self) -> None:
        self.passed = self.skipped = 0
        self.failed: list[str] = []
        self._begun: dict[str, None] = {}

    def add(self, line: str) -> str | None:
        """Read a line; returns the name of a test that failed."""
        words = r"(PASSED|FAILED|SKIPPED|ERROR)"
        with_worker = re.match(rf"\[gw\d+\] (?:\[ *\d+%\] )?{words} (.*?) *$", line)
        alone = re.match(rf"(tests/.*::.*?) {words}\b", line)
        if with_worker is not None:
            end, name = with_worker.groups()
        elif alone is not None:
            name, end = alone.groups()
        else:
            if re.match(r"tests/\S*::", line) and not line.endswith("%]"):
                self._begun[line.rstrip()] = None
            return None
        self._begun.pop(name, None)
        self.passed += end == "PASSED"
        self.skipped += end == "SKIPPED"
        if end in ("PASSED", "SKIPPED") or name in self.failed:
            return None
        self.failed.append(name)
        return name

    @property
    def unfinished(self) -> list[str]:
        """Tests that began and did not end."""
        return list(self._begun)

    def __bool__(self) -> bool:
        return bool(self.passed or self.skipped or self.failed or self._begun)


def sanitizer() -> str | None:
    """compute-sanitizer, on PATH or in a toolkit."""
    found = glob.glob("/usr/local/cuda*/bin/compute-sanitizer") + glob.glob("/opt/nvidia/*/bin/compute-sanitizer")
    return shutil.which("compute-sanitizer") or next(iter(sorted(found)), None)


def commit() -> str:
    """Of ``LFM_TORCH_COMMIT``, which a copy without its history is given along, or of git; "unknown" without both."""
    if given := os.environ.get("LFM_TORCH_COMMIT"):
        return given
    command = ["git", "describe", "--always", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent, check=False)
    except OSError:  # no git here
        return "unknown"
    return found.stdout.strip() or "unknown"
