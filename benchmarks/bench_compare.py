"""Comparing many checkpoints: 200 small CNNs x 4 layers on 2,000 samples, all 320,400 pairs, through the command line.

Measured: a run from nothing to the report, the second run with one checkpoint more, and a run that is killed (SIGKILL)
at random moments until it ends, which must write the same table. Peak memory is the process's, under --memory 2GiB.
The checkpoints are trained first where they are not there yet (about two minutes). Then many checkpoints of one layer,
as saved activations: there a pair is one small product, and what is done beside it counts.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import harness
import many_checkpoints
import numpy as np

BUDGET = "2GiB"
HERE = Path(__file__).parent


MODEL = ["--model", "lfm_torch.cli.demo:DigitsCNN", "--data", "many_checkpoints:probe", "--layers", "layers.*"]


def command(checkpoints: list[Path], out: Path, read: list[str]) -> list[str]:
    options = ["--memory", BUDGET, "--out", str(out), "--quiet"]
    return [sys.executable, "-m", "lfm_torch.cli", "compare", *map(str, checkpoints), *read, *options]


def environment() -> dict[str, str]:
    paths = [str(HERE), str(HERE.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_WAIT_POLICY": "PASSIVE"}


def run(checkpoints: list[Path], out: Path, read: list[str] = MODEL) -> tuple[float, int]:
    """Seconds and peak bytes of one run."""
    start = time.perf_counter()
    process = subprocess.Popen(command(checkpoints, out, read), env=environment())
    _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, status
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def killed_run(checkpoints: list[Path], out: Path, seconds: float, kills: int) -> None:
    """Start and kill at random moments, then let it end."""
    chance = random.Random(0)
    for k in range(kills):
        process = subprocess.Popen(command(checkpoints, out, MODEL), env=environment())
        time.sleep(chance.uniform(3, 3 + 1.2 * seconds / kills))
        process.send_signal(signal.SIGKILL)
        process.wait()
        print(f"kill {k + 1} of {kills}", flush=True)
    run(checkpoints, out)


def save_activations(directory: Path, count: int) -> Path:
    """Save ``count`` networks of one layer on 400 samples, 50 steps a run, a step a file."""
    generator = np.random.default_rng(0)
    base = generator.normal(size=(400, 16))
    for k in range(count):
        folder = directory / f"seed{k // 50}"
        folder.mkdir(parents=True, exist_ok=True)
        if k % 50 == 0:
            own = generator.normal(size=base.shape)
        values = base + (0.2 + k % 50 / 60) * own + 0.1 * generator.normal(size=base.shape)
        np.savez(folder / f"epoch={k % 50}.npz", layer=values.astype(np.float32))
    return directory


def digest(out: Path) -> str:
    return hashlib.sha256((out / "similarity.csv").read_bytes()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=Path, default=Path(tempfile.gettempdir()) / "lfm-torch-checkpoints")
    parser.add_argument("--quick", action="store_true", help="40 checkpoints, to see that it runs")
    parser.add_argument("--device", choices=("cpu",), default="cpu", help="as the other benchmarks take it")
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    n_runs, n_epochs = (4, 10) if arguments.quick else (20, 10)
    many_checkpoints.train(arguments.checkpoints, n_runs + 1, n_epochs)
    folders = [arguments.checkpoints / f"seed{seed}" for seed in range(n_runs)]
    more = [*folders, arguments.checkpoints / f"seed{n_runs}" / "epoch=9.pt"]
    work = Path(tempfile.mkdtemp(prefix="lfm-torch-bench-"))
    try:
        seconds, peak = run(folders, work / "cold")
        table = digest(work / "cold")
        again, again_peak = run(folders, work / "cold")
        one_more, one_more_peak = run(more, work / "cold")
        n_items = 4 * n_runs * n_epochs
        size = {"checkpoints": n_runs * n_epochs, "layers": 4, "samples": many_checkpoints.N_PROBE}
        size["pairs"] = n_items * (n_items + 1) // 2
        with harness.Record("compare", args=arguments) as record:
            record.add(
                {"what": "from nothing to the report", "seconds": seconds, "peak MiB": peak / 2**20, **size},
                {"what": "again, nothing new", "seconds": again, "peak MiB": again_peak / 2**20, **size},
                {"what": "one checkpoint more", "seconds": one_more, "peak MiB": one_more_peak / 2**20, **size},
            )
            if arguments.kills:
                killed_run(folders, work / "killed", seconds, arguments.kills)
                assert digest(work / "killed") == table, "an interrupted run must end with the same bytes"
                record.add({"what": f"killed {arguments.kills} times: the same bytes", **size})
            count = 100 if arguments.quick else 1000
            single = {"checkpoints": count, "layers": 1, "samples": 400, "pairs": count * (count + 1) // 2}
            saved = [save_activations(work / "activations", count)]
            for what in ("one layer each, from nothing", "one layer each, again"):
                seconds, peak = run(saved, work / "single", ["--activations"])
                record.add({"what": what, "seconds": seconds, "peak MiB": peak / 2**20, **single})
            assert all(row.get("peak MiB", 0) < 2048 for row in record.rows)
    finally:
        shutil.rmtree(work)


if __name__ == "__main__":
    main()
