"""The first five minutes on a GPU: what is wrong, operator by operator, and then what is slow.

For a machine whose python3 has torch with CUDA, numpy and pytest, from a checkout with both compiled libraries beside
the package; nothing is installed, compiled or changed. Every step is a process of its own with a limit, and the whole
ends within five minutes whatever happens. Each result is printed and appended at once to a file of JSON lines,
``gpu-first.jsonl``, in ``$OUT`` where that is set, otherwise in ``build/``; ``benchmarks/results/`` gets a copy with
every step. Last comes a summary.

    device      what is there, and whether the libraries load
    operators   every operator against float64 on the CPU, each in a process of its own
    limits      copies, matrix products, small eigenproblems
    kernels     Laplacian product and map energies beside cuSPARSE and the bytes they move
    neighbors   knn beside matmul and topk
    solvers     eigenpairs of large graphs and of many
    training    losses, a monitor, reduced precision, where the time of a solve goes
    tests       the tests marked gpu
    sanitize    compute-sanitizer's memcheck and racecheck over every kernel

``--dry`` does all of it on the CPU at small sizes, to know that this script works. Names of steps choose some.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import runs

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
WHOLE = 300.0
SUMMARY = 7500  # characters
# seconds at most. The first import reads gigabytes of libraries from a cold disk; what is left over is there for all
LIMITS = {
    "device": 60.0,
    "operators": 35.0,
    "limits": 18.0,
    "kernels": 18.0,
    "neighbors": 25.0,
    "solvers": 40.0,
    "training": 30.0,
    "tests": 90.0,
    "sanitize": 40.0,
}
# one process each, so that an error that sticks to a CUDA context costs one of them
OPERATORS = (
    *("knn", "knn of 32 features", "knn of 100 features", "knn of 768 features", "knn of 4096 features"),
    *("knn_ragged", "symmetrize_edges", "symmetrize_edges_backward", "connected_components", "geodesics"),
    *("laplacian_product", "laplacian_recurrence", "edge_products", "orthonormalize_block", "batched_eigh"),
    *("map_energies", "inner_products"),
)
AT_ONCE = 9
DRY_FACTOR = 3  # two cores do in turns what a larger machine does at once
NOTHING_TO_RUN = 3  # exit status of the device step where the kernels are not live
TESTS = ("tests/csrc/test_cuda_library.py", "tests/csrc/test_gpu_stages.py", "tests/ops/test_ops.py")


class Run:
    """The steps of one run, its clock and its record."""

    def __init__(self, record: Path, *, dry: bool) -> None:
        self.begun = time.monotonic()
        self.record = record
        self.dry = dry
        self.outcomes: dict[str, runs.Outcome] = {}
        self.interrupted = False
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text("")
        paths = [
            str(ROOT),
            str(ROOT / "tests"),
            str(ROOT / "tests" / "csrc"),
            str(HERE),
            os.environ.get("PYTHONPATH", ""),
        ]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "PYTHONUNBUFFERED": "1",
            "OMP_WAIT_POLICY": "PASSIVE",
            "LFM_TORCH_GPU_RECORD": str(record),
        }

    @property
    def found_nothing(self) -> bool:
        """Whether there is no GPU here, or no kernels for it."""
        return "device" in self.outcomes and self.outcomes["device"].status == NOTHING_TO_RUN

    def left(self) -> float:
        """Seconds that a step may still take; a few are kept for the summary."""
        return WHOLE - 4.0 - (time.monotonic() - self.begun)

    def step(self, name: str) -> None:
        """Run one step; what it found is in the record."""
        limit = min(LIMITS[name] * (DRY_FACTOR if self.dry else 1), self.left())
        begun = time.monotonic()
        if limit < 3:
            self.outcomes[name] = runs.Outcome(None, 0.0)
            self.say(name, "not run: the five minutes are over", ok=False)
            return
        special: dict[str, Callable[[float], int | None]] = {
            "operators": self.operators,
            "tests": self.tests,
            "sanitize": self.sanitize,
        }
        status = special[name](limit) if name in special else self.child(limit, name).status
        self.outcomes[name] = runs.Outcome(status, time.monotonic() - begun)
        self.say(name, f"step: {self.outcomes[name]}", ok=status == 0)
        self.keep()

    def child(
        self,
        limit: float,
        *words: str,
        prefix: tuple[str, ...] = (),
        on_line: Callable[[str], None] | None = None,
        **environment: str,
    ) -> runs.Outcome:
        """Run a step of gpu_steps.py, which prints and records what it finds."""
        command = [*prefix, sys.executable, str(HERE / "gpu_steps.py"), *words, *(["--dry"] if self.dry else [])]
        environment = self.environment | environment
        return runs.run(command, limit=limit, environment=environment, cwd=ROOT, on_line=on_line or show)

    def operators(self, limit: float) -> int | None:
        """Several at once: this is about answers, not about time."""
        deadline = time.monotonic() + limit
        waiting, ended = list(OPERATORS), dict.fromkeys(OPERATORS, runs.Outcome(None, 0.0))
        lock = threading.Lock()

        def work() -> None:
            while True:
                with lock:
                    if not waiting or self.interrupted:
                        return
                    name = waiting.pop(0)
                time_left = deadline - time.monotonic()
                if time_left > 1:
                    ended[name] = self.child(time_left, "operators", "--only", name, CUDA_LAUNCH_BLOCKING="1")
                if ended[name].status not in (0, 1):  # 1: what was wrong is in the record
                    self.say("operators", f"{name}: {ended[name]}", ok=False)

        workers = [threading.Thread(target=work) for _ in range(2 if self.dry else AT_ONCE)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return worst(ended.values())

    def tests(self, limit: float) -> int | None:
        """The tests marked gpu, without those of more than 2^31 elements; names of failures at once.

        Dry, some of them, on the CPU's kernels: ``LFM_TORCH_GPU_TESTS_ON=cpu`` rehearses them all.
        """
        log = self.record.with_name(self.record.stem + "-tests.log")
        ends = runs.TestOutcomes()
        command = [sys.executable, "-m", "pytest", "-v", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu", *TESTS]
        command += ["-k", "sample_inputs or losses" if self.dry else "not MoreThan2To31"]
        if find_spec("xdist") is not None:
            command += ["-n", "2" if self.dry else "4"]
        # the twins run on the CPU, in four processes at once
        environment = self.environment | {"OMP_NUM_THREADS": "4"}
        if self.dry:
            environment["LFM_TORCH_GPU_TESTS_ON"] = "cpu"
        with log.open("w") as file:

            def read(line: str) -> None:
                file.write(line + "\n")
                failed = ends.add(line)
                if failed:
                    self.say("tests", f"failed: {failed}", ok=False)
                    show(f"tests: failed: {failed}")

            outcome = runs.run(command, limit=limit, environment=environment, cwd=ROOT, on_line=read)
        counts = {"passed": ends.passed, "failed": len(ends.failed), "skipped": ends.skipped}
        self.say("tests", "counts", **counts, unfinished=ends.unfinished[:8])
        show(f"tests: {', '.join(f'{count} {what}' for what, count in counts.items())}; {outcome}")
        return outcome.status

    def sanitize(self, limit: float) -> int | None:
        """Both checks at once, of our own kernels only; allocations one by one, so that each has its bounds."""
        tool = runs.sanitizer()
        if tool is None and not self.dry:
            self.say("sanitize", "compute-sanitizer was not found", ok=False)
            return 1
        outcomes: dict[str, runs.Outcome] = {}

        def check(name: str) -> None:
            options = ("--tool", name, "--print-limit", "10", *runs.SANITIZER_OPTIONS)
            prefix = (str(tool), *options) if tool and not self.dry else ()
            found: list[str] = []

            def read(line: str) -> None:
                show(line)
                if line.startswith("=========") and re.search(
                    r"Invalid|Misaligned|[Hh]azard|Race|[Ee]rror|SUMMARY", line
                ):
                    found.append(line.strip("= "))

            command = ("operators", "--only", "sanitized")
            unpooled = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
            outcomes[name] = self.child(limit, *command, prefix=prefix, on_line=read, **unpooled)
            for line in [*found[:5], *found[5:][-1:]]:
                self.say("sanitize", f"{name}: {line[:200]}")
            self.say("sanitize", f"{name}: {outcomes[name]}", ok=outcomes[name].status == 0)

        workers = [threading.Thread(target=check, args=(name,)) for name in runs.SANITIZERS]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
        return worst(outcomes.values())

    def say(self, step: str, what: str, **values: Any) -> None:
        """Append a line to the record."""
        with self.record.open("a") as file:
            file.write(json.dumps({"step": step, "what": what, **values}) + "\n")

    def keep(self) -> None:
        """Copy the record to the results, unless there is nothing of a GPU in it."""
        if not self.dry and not self.found_nothing:
            shutil.copy(self.record, HERE / "results" / self.record.name)

    def rows(self) -> list[dict[str, Any]]:
        """The record so far, without lines that a process could not finish."""
        found = []
        for line in self.record.read_text().splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def summary(self) -> str:
        """Steps, then what failed, then what was measured, as far as it fits."""
        lines = [f"{name:<10} {outcome}" for name, outcome in self.outcomes.items()]
        rows = [row for row in self.rows() if not row["what"].startswith("step: ")]
        lines += [described(row)[:300] for row in sorted(rows, key=lambda row: row.get("ok", True))]
        text, total = [], 0
        for index, line in enumerate(lines):
            total += len(line) + 1
            if total > SUMMARY:
                text.append(f"... {len(lines) - index} more lines in {self.record.name}")
                break
            text.append(line)
        return "\n".join(text)


def worst(outcomes: Iterable[runs.Outcome]) -> int | None:
    """The status of several commands: None where one was stopped, otherwise of one that failed, if any did."""
    statuses = [outcome.status for outcome in outcomes]
    return None if None in statuses else next((status for status in statuses if status != 0), 0)


def described(row: dict[str, Any]) -> str:
    """A row of the record in one line."""
    values = [
        f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}"
        for key, value in row.items()
        if key not in ("step", "what", "ok", "after")
    ]
    return " ".join([f"{row['step']}: {row['what']}", *values])


_printing = threading.Lock()


def show(line: str) -> None:
    """Print a whole line, whoever else prints."""
    with _printing:
        print(line, flush=True)


def main() -> int:
    """Run the steps and print the summary; the status is 0 where all of them ended well."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"some of {', '.join(LIMITS)} (all)")
    parser.add_argument("--dry", action="store_true", help="small sizes on the CPU, to know that this script works")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.steps if name not in LIMITS]
    if unknown:
        parser.error(f"STEP must be among {', '.join(LIMITS)}, got {', '.join(unknown)}")
    out = os.environ.get("OUT") or (tempfile.mkdtemp(prefix="gpu-first-") if arguments.dry else ROOT / "build")
    run = Run(Path(out) / "gpu-first.jsonl", dry=arguments.dry)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # both ways to stop it leave the summary
    run.say("run", "begun", commit=runs.commit(), dry=arguments.dry)
    try:
        for name in LIMITS:
            if not arguments.steps or name in arguments.steps:
                run.step(name)
            if run.found_nothing:
                break
    except KeyboardInterrupt:
        run.interrupted = True
        runs.end_all()
        run.say("run", "interrupted", ok=False)
    seconds = time.monotonic() - run.begun
    run.say("run", "ended", seconds=round(seconds, 1))
    print(f"\n== summary after {seconds:.0f} s; all of it in {run.record}\n{run.summary()}", flush=True)
    run.keep()
    return 0 if not run.interrupted and all(outcome.status == 0 for outcome in run.outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
