"""Everything a GPU has to prove, in one run of nine minutes at most: build, tests marked gpu, benchmarks, one table.

For a machine whose python has torch with CUDA, without network and without git. Libraries beside the package that were
built from the sources beside it are taken as they are; others are built where nvcc is. Writes
``benchmarks/results/<gpu>.json`` (h200.json on an H200) after every part and while one runs, what the parts print to
``build/gpu.log``, and both to ``$OUT`` where that is set. Each part can be run alone: ``python benchmarks/gpu.py
tests``, ``... bench bench_knn``, ``... sanitize``. ``... resources`` needs nvcc only: registers, shared memory, spills
and occupancy of every kernel on sm_90, to ``cuda-resources.json``.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

import harness
import runs
import torch
from runs import GRACE

ROOT = Path(__file__).resolve().parents[1]
PARTS = ("build", "tests", "bench", "large", "sanitize", "limits", "resources")
# Seconds of all parts together, and of each at most: whatever hangs, the rest has its time and the whole its end. In
# the order in which they run, by what they are worth; a build is not part of it: where one is needed, the last parts
# find no time.
WHOLE = 530
LIMITS = {
    "build": 20,
    "tests": 120,
    "bench_knn": 70,
    "bench_basis": 90,
    "bench_laplacian": 45,
    "bench_similarity": 30,
    "bench_losses": 25,
    "bench_training": 30,
    "bench_maps": 35,
    "bench_pipeline": 25,
    "limits": 15,
    "large": 25,
}
BUILDING, SANITIZING = 240, 260
TICK = 5.0  # seconds between two looks at the rows of a benchmark that is running
BEGUN = time.perf_counter()
# what these measure is not a GPU: the command line on many small checkpoints
NOT_FOR_GPU = {"bench_compare"}
# of an SM of sm_90: registers, bytes of shared memory (1 KiB more for each block), threads, blocks
REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32
LARGE = "MoreThan2To31"  # tests that fill the GPU's memory: alone, and last
# small shapes: the sanitizer slows a kernel by one to two orders of magnitude
SANITIZED = ["tests/csrc/test_cuda_library.py", "-m", "gpu", "-k", "sample_inputs or half_stored or ragged or empty"]
TABLE = 9500  # characters of the table at the end, which a terminal that keeps little still holds

# what the libraries are, told by a process of its own: one that does not load may end it
PROBE = """
import json, warnings
warnings.simplefilter("ignore")
import lfm_torch
from lfm_torch.ops._extension import library_problems
info = lfm_torch.build_info()
problems = library_problems()
if not info.cpu_kernels or not info.cuda_kernels:
    problems += [note for note in info.notes if note not in problems] or ["the libraries are not live"]
print(json.dumps({"problems": problems, "cpu": info.cpu_build, "cuda": info.cuda_build}))
"""


@dataclass(frozen=True)
class Part:
    """One process of the run.

    Attributes:
        what: Its name.
        command: What runs.
        limit: Seconds that it may take.
        grows: Whether it may also take what earlier parts left over.
        results: File in which it writes its rows while it runs, or None.
        environment: Variables of its own.
    """

    what: str
    command: list[str]
    limit: float
    grows: bool = False
    results: Path | None = None
    environment: dict[str, str] = field(default_factory=dict)


def allowed(part: Part, later: Sequence[Part], left: float) -> float:
    """Seconds that a part may run where ``left`` are left for it and those after it, each with its end.

    Its own limit, unless less is left; one that grows also gets what those after it do not need.
    """
    left -= GRACE
    spare = left - sum(other.limit for other in later)
    return max(min(part.limit, left), spare if part.grows else 0.0)


class Run:
    """Parts one after the other until the time is up, and the record of them."""

    def __init__(self, record: harness.Record, log: Path, end: float) -> None:
        self.record, self.log, self.end = record, log, end

    def parts(self, parts: Sequence[Part]) -> None:
        for i, part in enumerate(parts):
            self.part(part, parts[i + 1 :])

    def part(self, part: Part, later: Sequence[Part] = ()) -> tuple[harness.Row, str]:
        """Run one part in a group of its own, which ends with it; returns its row and what it printed."""
        seconds = allowed(part, later, self.end - time.perf_counter())
        if seconds < 1:
            row: harness.Row = {"what": part.what, "status": "not started: no time was left", "seconds": 0.0}
            self.record.add(row)
            return row, ""
        print(f"\n== {part.what}, at most {seconds:.0f} s", flush=True)
        began, ends, lines = time.time(), runs.TestOutcomes(), list[str]()
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("a") as log:

            def read(line: str) -> None:
                lines.append(line)
                ends.add(line)
                print(line, file=log, flush=True)

            outcome = runs.run(
                part.command,
                limit=seconds,
                environment=environment(part),
                cwd=ROOT,
                on_line=read,
                on_tick=lambda: self.record.write([{"what": part.what, "status": "running"}, *rows_of(part, began)]),
                tick=TICK,
            )
        status = f"stopped after {seconds:.0f} s" if outcome.status is None else outcome.status
        row = {"what": part.what, "status": status, "seconds": outcome.seconds}
        if ends:
            row |= {"passed": ends.passed, "skipped": ends.skipped, "failed": ends.failed}
            row |= {"unfinished": ends.unfinished} if ends.unfinished else {}
        if status != 0 and not row.get("failed"):
            row["said"] = " | ".join([line.strip() for line in lines if line.strip()][-3:])[-500:]
        rows = rows_of(part, began)
        print(f"{part.what}: {status}, {row['seconds']:.1f} s, {len(rows)} rows {row.get('said', '')}", flush=True)
        for name in [*row.get("failed", []), *row.get("unfinished", [])][:40]:
            print(f"  failed or not ended: {name}")
        self.record.add(row, *rows)
        return row, "\n".join(lines)


def environment(part: Part) -> dict[str, str]:
    # "python -m pytest" and the benchmarks must both import the package beside them
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    # $OUT gets two files: the rows of all benchmarks are in the record of the whole
    own = {name: value for name, value in os.environ.items() if name != "OUT"}
    return {**own, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **part.environment}


def rows_of(part: Part, began: float) -> list[harness.Row]:
    """The rows that a benchmark has written since it began."""
    if part.results is None or not part.results.exists() or part.results.stat().st_mtime < began:
        return []
    return [{"benchmark": part.what, **row} for row in json.loads(part.results.read_text())["rows"]]


def build(run: Run) -> None:
    """Take the libraries that are there, or build them; without them there is nothing to test."""
    probe = Part("build", [sys.executable, "-c", PROBE], LIMITS["build"])
    problems = examined(run, probe)
    if problems and (nvcc_is_here() and find_spec("setuptools") is not None):
        print("building, because", *problems, sep="\n  ")
        command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
        run.part(Part("building", command, BUILDING))
        problems = examined(run, probe)
    if problems:
        raise SystemExit("the libraries beside the package cannot be used:\n  " + "\n  ".join(problems))


def examined(run: Run, probe: Part) -> list[str]:
    """What is wrong with the libraries; how they were built goes into the record."""
    row, text = run.part(probe)
    if row["status"] != 0:
        return [f"importing the package: {row['status']} {row.get('said', '')}"]
    print(text.strip())
    found = json.loads(text.strip().splitlines()[-1])
    row |= {key: value for key, value in found.items() if value}
    run.record.write()
    return list(found["problems"])


def nvcc_is_here() -> bool:
    homes = [Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    return shutil.which("nvcc") is not None or any((home / "bin" / "nvcc").exists() for home in homes)


def pytest(what: str, word: str, *options: str, workers: int = 1) -> Part:
    """The tests marked gpu of the files in which a word stands: the imports of all the others take longer than some."""
    files = [str(path) for path in sorted((ROOT / "tests").rglob("test_*.py")) if re.search(word, path.read_text())]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--tb=short", "-rfE", "-p", "no:cacheprovider"]
    command += ["--continue-on-collection-errors", *options]
    if workers > 1 and find_spec("xdist") is not None:
        command += ["-n", str(workers)]
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    return Part(what, [*command, *files], LIMITS[what], environment={"OMP_NUM_THREADS": threads})


def tests() -> list[Part]:
    return [pytest("tests", r"gpu|\bdevice\b", "-k", f"not {LARGE}", workers=4)]


def large() -> list[Part]:
    return [pytest("large", LARGE, "-k", LARGE)]


def bench(names: Sequence[str] = ()) -> list[Part]:
    found = {path.stem for path in (ROOT / "benchmarks").glob("bench_*.py")} - NOT_FOR_GPU
    known = [name for name in LIMITS if name in found] + sorted(found - set(LIMITS))
    if not set(names) <= found:
        raise SystemExit(f"benchmarks must be among {known}, got {list(names)}")
    parts = []
    for name in [name for name in known if not names or name in names]:
        script, results = (
            ROOT / "benchmarks" / f"{name}.py",
            harness.RESULTS / f"{name.removeprefix('bench_')}-cuda.json",
        )
        command = [sys.executable, str(script), "--device", "cuda", "--repeats", "3"]
        parts.append(Part(name, command, LIMITS.get(name, 30), grows=True, results=results))
    return parts


def limits() -> list[Part]:
    command = [sys.executable, str(Path(__file__)), "measure-limits"]
    return [Part("limits", command, LIMITS["limits"], grows=True, results=harness.RESULTS / "limits-cuda.json")]


def sanitize() -> list[Part]:
    tool = runs.sanitizer()
    if tool is None:
        raise SystemExit("compute-sanitizer was not found; it comes with the CUDA toolkit")
    command = [sys.executable, "-m", "pytest", "-q", *SANITIZED]
    # an access past a tensor shows only where each tensor is an allocation of its own
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Part(check, [tool, "--tool", check, *runs.SANITIZER_OPTIONS, *command], SANITIZING, environment=variables)
        for check in runs.SANITIZERS
    ]


def resources() -> list[harness.Row]:
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
    for source in sorted((ROOT / "csrc").glob("*/*_cuda.cu")):
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


def summary(rows: list[harness.Row]) -> str:
    """The parts, then the rows of each benchmark, in at most ``TABLE`` characters.

    Small tables are printed whole; the large ones share what is left.
    """
    columns = ("what", "status", "seconds", "passed", "skipped", "failed", "unfinished")
    blocks = []
    if parts := [{key: row[key] for key in columns if key in row} for row in rows if "benchmark" not in row]:
        for row in parts:
            row |= {key: len(row[key]) for key in ("failed", "unfinished") if key in row}
        blocks.append(harness.table(parts, digits=3))
    for name in dict.fromkeys(row["benchmark"] for row in rows if "benchmark" in row):
        mine = [{**row} for row in rows if row.get("benchmark") == name]
        same = {key: value for key, value in mine[0].items() if all(row.get(key) == value for row in mine[1:])}
        if len(mine) > 1:
            mine = [{key: value for key, value in row.items() if key not in same} for row in mine]
        head = ", ".join(f"{key} = {value}" for key, value in same.items() if key != "benchmark")
        blocks.append([f"{name} {head}".strip(), *harness.table(mine, digits=3)])
    left = TABLE
    texts: dict[int, str] = {}
    for place, i in enumerate(sorted(range(len(blocks)), key=lambda i: sum(map(len, blocks[i])))):
        share = left // (len(blocks) - place)
        texts[i] = cut([line[:220] for line in blocks[i]], share - 2)
        left -= len(texts[i]) + 2
    return "\n\n".join(texts[i] for i in range(len(blocks)))


def cut(lines: list[str], most: int) -> str:
    """As many lines as fit, and how many did not."""
    text = "\n".join(lines)
    kept = len(lines)
    while len(text) > most and kept > 0:
        kept -= 1
        text = "\n".join([*lines[:kept], f"... {len(lines) - kept} lines more in the record"])
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=(*PARTS, "measure-limits"), help="one part alone (all that prove)")
    parser.add_argument("names", nargs="*", help="benchmarks, such as bench_knn (all)")
    arguments = parser.parse_args()
    if arguments.part == "resources":
        with harness.Record("cuda-resources") as record:
            record.add(*resources())
        return 0
    if not torch.cuda.is_available():
        parser.error("this needs a CUDA device, and torch sees none")
    if arguments.part == "measure-limits":
        with harness.Record("limits-cuda") as record:
            record.measure("limits", harness.roofline("cuda"))
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the part under way is ended too
    sys.path.append(str(ROOT))  # for the version of the package in the record
    gpu = re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().removeprefix("nvidia ")).strip("-")
    record = harness.Record(f"{gpu}-{arguments.part}" if arguments.part else gpu)
    log = Path(os.environ.get("OUT") or ROOT / "build") / "gpu.log"
    run = Run(record, log, BEGUN + WHOLE)
    try:
        if arguments.part in (None, "build"):
            build(run)
        alone = {"tests": tests, "large": large, "bench": lambda: bench(arguments.names), "limits": limits}
        alone |= {"sanitize": sanitize, "build": list}
        everything = [*tests(), *bench(), *limits(), *large()]
        # a part alone has all the time
        run.parts([replace(part, grows=True) for part in alone[arguments.part]()] if arguments.part else everything)
        record.complete = True
    finally:
        record.write()
        print("\n" + summary(record.rows), flush=True)
    return 0 if all(row["status"] == 0 for row in record.rows if "benchmark" not in row) else 1


if __name__ == "__main__":
    sys.exit(main())
