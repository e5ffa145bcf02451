"""The first run on a GPU, tried without one: from a bare checkout, within its time, and whatever goes wrong in it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import extras
import pytest
from checkout import ROOT, copied

from lfm_torch.ops import OPERATORS

gpu_first = pytest.importorskip("gpu_first", reason="the benchmarks are not beside the tests")
runs = pytest.importorskip("runs")


@pytest.mark.slow
def test_dry_run(tmp_path: Path) -> None:
    environment = {**os.environ, "OUT": str(tmp_path)}
    begun = time.monotonic()
    result = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "--dry"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert time.monotonic() - begun < gpu_first.WHOLE
    rows = [json.loads(line) for line in (tmp_path / "gpu-first.jsonl").read_text().splitlines()]
    wrong = {row["what"] for row in rows if row.get("ok") is False and not row["what"].startswith("step: ")}
    assert wrong == set()
    assert {row["step"] for row in rows} == {"run", *gpu_first.LIMITS}
    assert {row["what"] for row in rows if row["step"] == "operators"} >= set(gpu_first.OPERATORS)
    counts = next(row for row in rows if row["what"] == "counts")
    assert counts["passed"] >= 2 * len(OPERATORS)
    assert counts["failed"] == 0
    summary = result.stdout.partition("== summary")[2]
    assert 500 < len(summary) < 8000
    assert all(f"\n{name} " in summary for name in gpu_first.LIMITS)


def test_every_operator_is_looked_at() -> None:
    assert {name for name in gpu_first.OPERATORS if " of " not in name} == set(OPERATORS)


def test_a_step_ends_at_its_limit_with_all_its_children() -> None:
    lines: list[str] = []
    code = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
    time.sleep(60)
    """
    outcome = runs.run([sys.executable, "-c", textwrap.dedent(code)], limit=2.0, on_line=lines.append)
    assert outcome.status is None
    assert outcome.seconds < 9
    child = Path(f"/proc/{int(lines[0])}/stat")
    for _ in range(50):
        if not child.exists() or child.read_text().split()[2] == "Z":
            break
        time.sleep(0.1)
    else:
        pytest.fail("the grandchild is still alive")


def test_the_five_minutes_hold_whatever_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_first, "WHOLE", 10.0)
    monkeypatch.setattr(gpu_first, "LIMITS", dict.fromkeys(gpu_first.LIMITS, 60.0))
    (tmp_path / "results").mkdir()
    hanging = tmp_path / "gpu_steps.py"
    hanging.write_text("import time\nprint('begun', flush=True)\ntime.sleep(600)\n")
    monkeypatch.setattr(gpu_first, "HERE", tmp_path)
    run = gpu_first.Run(tmp_path / "gpu-first.jsonl", dry=False)
    for name in ("limits", "operators", "sanitize"):
        run.step(name)
    assert time.monotonic() - run.begun < 12
    assert "stopped at its limit" in run.summary()
    assert "not run: the five minutes are over" in run.summary()
    assert (tmp_path / "results" / "gpu-first.jsonl").read_text() in run.record.read_text()


def test_interrupted_it_leaves_no_process_and_a_summary(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_first.py"), "--dry", "operators"]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env={**os.environ, "OUT": str(tmp_path)}, stdout=pipe, text=True) as process:
        record, end = tmp_path / "gpu-first.jsonl", time.monotonic() + 30
        while not (record.exists() and record.stat().st_size) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)  # SIGINT is ignored by what a shell starts in the background
        said, _ = process.communicate(timeout=20)
    assert process.returncode == 1
    assert "run: interrupted" in said
    assert str(record) in said


def test_a_crash_is_no_success(tmp_path: Path) -> None:
    outcomes = [runs.Outcome(status, 1.0) for status in (0, -11, 0)]
    assert gpu_first.worst(outcomes) == -11
    assert gpu_first.worst([*outcomes, runs.Outcome(None, 1.0)]) is None
    assert gpu_first.worst(outcomes[:1]) == 0
    run = gpu_first.Run(tmp_path / "gpu-first.jsonl", dry=True)
    run.say("operators", "knn: status -11", ok=False)
    with run.record.open("a") as file:
        file.write('{"step": "oper')  # the last words of a process that was killed
    assert [row["what"] for row in run.rows()] == ["knn: status -11"]
    assert "knn: status -11" in run.summary()


def test_a_bare_checkout_runs_its_gpu_tests(tmp_path: Path) -> None:
    """Only on PYTHONPATH, not installed, without git, and without any package that is not needed."""
    checkout = copied(tmp_path / "checkout")
    code = """
    import sys
    for name in sys.argv[2].split():
        sys.modules[name] = None
    import importlib.metadata as metadata
    version = metadata.version

    def uninstalled(name):
        if name.replace("_", "-") == "lfm-torch":
            raise metadata.PackageNotFoundError(name)
        return version(name)

    metadata.version = uninstalled
    import lfm_torch
    assert lfm_torch.__file__.startswith(sys.argv[1]), lfm_torch.__file__
    assert lfm_torch.__version__.count(".") == 2
    import pytest
    sys.exit(pytest.main(sys.argv[3:]))
    """
    environment = {**os.environ, "PYTHONPATH": str(checkout), "PATH": "/nowhere", "LFM_TORCH_GPU_TESTS_ON": "cpu"}

    def run(*words: str) -> str:
        pytest_options = ("-p", "no:cacheprovider", "-m", "gpu", *words)
        command = [sys.executable, "-c", textwrap.dedent(code), str(checkout), " ".join(extras.EXTRAS), *pytest_options]
        result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result.stdout

    collected = run("--collect-only", "-q")
    assert " error" not in collected.splitlines()[-1]
    assert len([line for line in collected.splitlines() if "test_cuda_library.py::" in line]) > 200
    assert " passed" in run("-q", "tests/csrc/test_cuda_library.py", "-k", "sample_inputs and knn-float32")
