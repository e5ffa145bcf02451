"""The benchmarks keep what they measured whatever happens, and the run for a GPU ends in the time it has."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from checkout import ROOT
from extras import needs

import lfm_torch as lfm

pytestmark = needs("scipy", "sklearn")  # what ours is measured against
BENCHMARKS = ROOT / "benchmarks"
SCRIPTS = sorted(path.stem for path in BENCHMARKS.glob("bench_*.py"))
HANG = "import time; time.sleep(60)"


@pytest.fixture(autouse=True)
def results(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Scripts import what they share, as when they run; results go to a folder of the test."""
    if not SCRIPTS:
        pytest.skip("the benchmarks are not beside the tests")
    monkeypatch.syspath_prepend(BENCHMARKS)
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.delenv("LFM_TORCH_COMMIT", raising=False)
    monkeypatch.setattr(load("harness"), "RESULTS", tmp_path / "results")
    monkeypatch.setattr(load("harness"), "_PAUSE", 0.0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # small sizes: on a busy machine two threads wait for each other longer than they work
    yield tmp_path / "results"
    torch.set_num_threads(threads)


def load(name: str) -> Any:
    return importlib.import_module(name)


def read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())  # type: ignore[no-any-return]


def arguments(**changes: Any) -> argparse.Namespace:
    return argparse.Namespace(**({"device": "cpu", "quick": False, "repeats": 1} | changes))


class TestRecord:
    def test_without_git_and_with_a_folder_for_what_comes_back(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, results: Path
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        monkeypatch.setenv("OUT", str(tmp_path / "out"))
        with load("harness").Record("thing", args=arguments(quick=True)) as record:
            record.add({"what": "a", "seconds": 1.0})
        found = read(results / "thing-quick.json")
        assert found == read(tmp_path / "out" / "thing-quick.json")
        assert found["commit"] == "unknown"
        assert found["complete"]
        assert found["versions"]["lfm-torch"] == lfm.__version__
        monkeypatch.setenv("LFM_TORCH_COMMIT", "abc123")
        assert load("harness").Record("thing")._head["commit"] == "abc123"

    def test_a_row_is_in_the_file_once_it_is_added(self, results: Path) -> None:
        def interrupted() -> None:
            with load("harness").Record("thing") as record:
                assert not results.exists()
                for count in (1, 2):
                    record.add({"what": count})
                    found = read(results / "thing.json")
                    assert [row["what"] for row in found["rows"]] == list(range(1, count + 1))
                    assert not found["complete"]
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert not read(results / "thing.json")["complete"]
        assert [path.name for path in results.iterdir()] == ["thing.json"]

    def test_stopped_before_the_first_row_the_last_result_stays(self, results: Path) -> None:
        with load("harness").Record("thing") as record:
            record.add({"what": "old"})
        with pytest.raises(KeyboardInterrupt), load("harness").Record("thing"):
            raise KeyboardInterrupt
        assert read(results / "thing.json")["complete"]

    def test_a_case_that_fails_costs_no_other(self, results: Path) -> None:
        def rows(fails: bool) -> Iterator[dict[str, Any]]:
            yield {"seconds": 1.0}
            if fails:
                raise ValueError("not\nright")

        def benchmark() -> None:
            with load("harness").Record("thing") as record:
                record.measure("first", rows(True), case="first")
                record.measure("second", rows(False), case="second")

        with pytest.raises(SystemExit) as ended:
            benchmark()
        assert ended.value.code == 1
        found = read(results / "thing.json")
        assert found["complete"]
        assert found["rows"] == [
            {"case": "first", "seconds": 1.0},
            {"case": "first", "what": "first", "error": "ValueError: not right"},
            {"case": "second", "seconds": 1.0},
        ]

    def test_of_one_case_the_others_are_kept(self, results: Path) -> None:
        with load("harness").Record("thing", args=arguments(case=None)) as record:
            record.add({"case": "a", "seconds": 1.0}, {"case": "b", "seconds": 2.0})
        with load("harness").Record("thing", args=arguments(case="a")) as record:
            record.measure("a", [{"seconds": 3.0}], case="a")
        assert read(results / "thing.json")["rows"] == [{"case": "b", "seconds": 2.0}, {"case": "a", "seconds": 3.0}]


class TestTiming:
    def test_on_a_gpu_each_turn_is_filled_with_calls(self) -> None:
        harness, calls = load("harness"), []
        seconds = harness.interleaved({"quick": lambda: time.sleep(1e-3)}, 3, device="cuda")["quick"]
        assert 2 <= seconds.calls <= 40
        assert len(seconds) == 3
        assert 1e-3 <= harness.median(seconds) < 2e-2
        assert harness.calibration(seconds) == {"calls": seconds.calls, "turns": 3}
        seconds = harness.interleaved({"once": lambda: calls.append(0)}, 2, calls=5)["once"]
        assert len(calls) == 3 * 6
        assert harness.calibration(seconds) == {}

    def test_on_a_gpu_turns_are_fewer_where_they_are_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        harness = load("harness")
        monkeypatch.setattr(harness, "_WHOLE", 0.12)
        seconds = harness.interleaved({"long": lambda: time.sleep(0.05)}, 9, device="cuda")["long"]
        assert 1 <= len(seconds) <= 2
        monkeypatch.setattr(harness, "_WHOLE", 0.01)
        assert len(harness.interleaved({"long": lambda: time.sleep(0.05)}, 9, device="cuda")["long"]) == 1


class TestScripts:
    @pytest.mark.parametrize("name", SCRIPTS)
    def test_each_takes_the_common_options(
        self, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--device", "cpu", "--help"])
        with pytest.raises(SystemExit) as ended:
            load(name).main()
        assert ended.value.code == 0
        said = capsys.readouterr().out
        assert "--quick" in said
        assert "--device" in said

    @pytest.mark.parametrize("name", ["basis", "laplacian", "losses"])
    def test_the_cheap_ones_run(self, name: str, monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
        recorded = (BENCHMARKS / "results" / f"{name}.json").read_bytes()
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--device", "cpu", "--repeats", "1"])
        load(f"bench_{name}").main()
        assert [path.name for path in results.iterdir()] == [f"{name}-quick.json"]
        found = read(results / f"{name}-quick.json")
        assert found["complete"]
        assert len(found["rows"]) >= 5
        assert (BENCHMARKS / "results" / f"{name}.json").read_bytes() == recorded

    def test_the_peer_gives_the_same_pairs_each_time(self) -> None:
        basis = load("bench_basis")
        laplacian = lfm.build_graph(torch.randn(600, 16), n_neighbors=30).laplacian().to_scipy()
        _, evecs = basis.arpack(basis.smooth_of(laplacian), 16)
        _, again = basis.arpack(basis.smooth_of(laplacian), 16)
        assert abs(evecs - again).max() <= 2e-6  # from two random starts they differ in their signs, and in 1e-5
        closer = basis.arpack(basis.smooth_of(laplacian, float), 16, tol=1e-10)[0]
        assert abs(closer - basis.oracle(laplacian, 16)).max() <= 1e-7  # rounding to float32 is not symmetric

    # layers of a network without training lie far from the origin
    @pytest.mark.filterwarnings("ignore:.*the mean of the rows:lfm_torch.LFMWarning")
    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["knn", "similarity", "maps", "pipeline", "training"])
    def test_the_others_run(self, name: str, monkeypatch: pytest.MonkeyPatch, results: Path) -> None:
        monkeypatch.setattr(sys, "argv", [name, "--quick", "--device", "cpu", "--repeats", "1"])
        load(f"bench_{name}").main()
        assert read(results / f"{name}-quick.json")["complete"]


class TestOnDevice:
    """What the benchmarks do on a GPU, on the CPU and small."""

    def test_solvers(self, monkeypatch: pytest.MonkeyPatch) -> None:
        basis = load("bench_basis")
        monkeypatch.setattr(basis, "LOBPCG_SECONDS", 0.5)
        monkeypatch.setattr(load("harness"), "_WHOLE", 0.1)
        rows = list(basis.single_on_device(900, 15, 10, 1, "cpu"))
        rows += list(basis.batched_on_device(2, 550, 8, 1, "cpu"))
        assert not [row for row in rows if "error" in row]
        assert sum("krylov" in row["what"] for row in rows) == 2
        for row in rows:
            assert "note" in row or row["seconds"] > 0
            assert "lfm_torch" not in row["what"] or row["residual"] <= 1.2e-5

    def test_wrong_pairs_are_refused(self) -> None:
        basis = load("bench_basis")
        x = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(0))
        graph = lfm.build_graph(x, n_neighbors=9)
        right = lfm.spectral_basis(graph, n_basis=6)
        known = [right.evals, right.evals[-1]]
        assert basis.check_on_device(graph, right.evals, right.evecs, known)["residual"] <= 1e-5
        skewed = right.evecs.clone()
        skewed[1, :, 3] = (skewed[1, :, 3] + skewed[1, :, 4]) / 2**0.5
        for evals, evecs in (
            (right.evals + 1e-3, right.evecs),
            (right.evals, skewed),
            (right.evals, right.evecs * 1.001),
            (right.evals.flip(-1), right.evecs.flip(-1)),
        ):
            with pytest.raises(AssertionError):
                basis.check_on_device(graph, evals, evecs, [])
        more = lfm.spectral_basis(graph, n_basis=7)
        chosen = [0, 1, 2, 3, 4, 6]  # right pairs, of which one is left out
        with pytest.raises(AssertionError, match="eigenvalues differ"):
            basis.check_on_device(graph, more.evals[:, chosen], more.evecs[..., chosen], known)

    def test_a_solver_that_fails_costs_no_other(self) -> None:
        basis = load("bench_basis")
        graph = lfm.build_graph(torch.randn(200, 4), n_neighbors=8)

        def broken() -> lfm.Basis:
            raise RuntimeError("an illegal memory access")

        solvers = {"broken": (graph, broken), "ours": (graph, lambda: lfm.spectral_basis(graph, n_basis=4))}
        rows = list(basis.ours_on_device({}, solvers, {}, 1))
        assert rows[0] == {"what": "broken", "error": "RuntimeError: an illegal memory access"}
        assert rows[1]["what"] == "ours"
        assert rows[1]["residual"] <= 1e-5

    def test_neighbors_of_some_rows_in_float64(self) -> None:
        knn = load("bench_knn")
        x = torch.randn(500, 16, generator=torch.Generator().manual_seed(0))
        assert knn.difference_of_rows(x, 12) < 1e-6
        assert knn.differences(x, 12, "euclidean", {knn.INEXACT: knn.matmul_tf32_topk})[knn.INEXACT] < 1e-3
        assert torch.get_float32_matmul_precision() == "highest"
        rows = list(knn.search_rows((300, 4), 5, "euclidean", {}, 1, "cpu"))
        assert [row["who"] for row in rows] == ["lfm_torch"]


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    module = load("gpu")
    monkeypatch.setattr(module, "TICK", 0.1)
    return module  # type: ignore[no-any-return]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


class TestRunForAGPU:
    def part(self, gpu: Any, what: str, code: str, limit: float = 20.0, **more: Any) -> Any:
        return gpu.Part(what, [sys.executable, "-S", "-c", code], limit, **more)

    def run(self, gpu: Any, tmp_path: Path, seconds: float) -> Any:
        return gpu.Run(load("harness").Record("run"), tmp_path / "gpu.log", time.perf_counter() + seconds)

    @pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="no /proc here")
    def test_what_hangs_is_killed_with_its_children_and_the_rest_goes_on(
        self, gpu: Any, tmp_path: Path, results: Path
    ) -> None:
        pids = tmp_path / "pids"
        grandchild = f"import os, time; open({str(pids)!r}, 'a').write(f'{{os.getpid()}} '); time.sleep(60)"
        code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', {grandchild!r}]); {grandchild}"
        run = self.run(gpu, tmp_path, 30)
        run.parts([self.part(gpu, "hangs", code, 2.5), self.part(gpu, "fine", "print('done')")])
        found = [int(pid) for pid in pids.read_text().split()]
        assert len(found) == 2
        end = time.perf_counter() + 5
        while any(map(alive, found)) and time.perf_counter() < end:
            time.sleep(0.05)
        assert not any(map(alive, found))
        rows = read(results / "run.json")["rows"]
        assert [row["what"] for row in rows] == ["hangs", "fine"]
        assert rows[0]["status"].startswith("stopped after")
        assert rows[1]["status"] == 0
        assert "done" in (tmp_path / "gpu.log").read_text()

    def test_rows_of_a_benchmark_are_in_the_record_while_it_runs(self, gpu: Any, tmp_path: Path, results: Path) -> None:
        results.mkdir()
        mine = results / "bench-cuda.json"
        mine.write_text(json.dumps({"rows": [{"seconds": 1.0}]}))
        os.utime(mine, (0, 0))  # of a run before this one
        seen = []
        write = gpu.harness.Record.write

        def watched(record: Any, pending: Any = ()) -> None:
            seen.append([*pending])
            write(record, pending)

        code = f"import time; open({str(mine)!r}, 'w').write('{{\"rows\": [{{\"seconds\": 2.0}}]}}'); time.sleep(60)"
        run = self.run(gpu, tmp_path, 30)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu.harness.Record, "write", watched)
            run.parts([self.part(gpu, "bench", code, 1.5, results=mine)])
        wanted = {"benchmark": "bench", "seconds": 2.0}
        assert [{"what": "bench", "status": "running"}, wanted] in seen
        assert read(results / "run.json")["rows"][1:] == [wanted]

    def test_what_failed_says_why(self, gpu: Any, tmp_path: Path) -> None:
        row, _ = self.run(gpu, tmp_path, 30).part(self.part(gpu, "fails", "raise ValueError('the reason')"))
        assert row["status"] == 1
        assert row["said"].endswith("ValueError: the reason")

    def test_hanging_parts_end_with_the_whole(self, gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "GRACE", 0.2)
        start = time.perf_counter()
        run = self.run(gpu, tmp_path, 4)
        run.parts([self.part(gpu, str(i), HANG, 1.5, grows=i == 0) for i in range(4)])
        assert time.perf_counter() - start < 15  # 4 s and what a busy machine adds; a part alone would take 60
        assert [str(row["status"]).split()[0] for row in run.record.rows] == ["stopped", "stopped", "not", "not"]

    @pytest.mark.parametrize("building", [False, True])
    @pytest.mark.parametrize("used", [0.0, 0.3, 1.0])
    def test_the_limits_fit_into_nine_minutes(self, gpu: Any, building: bool, used: float) -> None:
        """Whatever share of its time each part takes, with the seconds in which what is killed has to go."""
        parts = [*gpu.tests(), *gpu.bench(), *gpu.limits(), *gpu.large()]
        assert [part.what for part in parts] == [name for name in gpu.LIMITS if name != "build"]
        assert sum(gpu.LIMITS.values()) <= gpu.WHOLE <= 535
        assert gpu.SANITIZING * len(gpu.runs.SANITIZERS) <= gpu.WHOLE
        first = [gpu.Part("build", [], gpu.LIMITS["build"])]
        first += [gpu.Part("building", [], gpu.BUILDING), *first] if building else []
        left, started = float(gpu.WHOLE), []
        for i, part in enumerate([*first, *parts]):
            seconds = gpu.allowed(part, [*first, *parts][i + 1 :], left)
            if seconds >= 1:
                started.append(part.what)
                assert part.grows or seconds <= part.limit
                left -= used * seconds + gpu.GRACE
        assert left >= 0
        if not building:
            assert started == list(gpu.LIMITS)

    def test_ends_of_tests_are_read_as_pytest_prints_them(self, gpu: Any) -> None:
        with_workers = (
            "scheduling tests via LoadScheduling\n\n"
            "tests/test_a.py::test_one[x must have 3] \n"
            "tests/test_a.py::test_two \n"
            "[gw1] [  9%] PASSED tests/test_a.py::test_one[x must have 3] \n"
            "[gw0] [ 18%] FAILED tests/test_a.py::test_two \n"
            "tests/test_a.py::test_three \n"
            "tests/test_a.py:12: AssertionError\n"
            "FAILED tests/test_a.py::test_two - AssertionError\n"
        )
        alone = (
            "tests/test_a.py::test_one[x must have 3] PASSED    [ 50%]\n"
            "tests/test_a.py::test_two FAILED    [ 50%]\ntests/test_a.py::test_three "
        )
        for text in (with_workers, alone):
            ends = gpu.runs.TestOutcomes()
            told = [name for line in text.splitlines() if (name := ends.add(line))]
            assert told == ends.failed == ["tests/test_a.py::test_two"]
            assert (ends.passed, ends.skipped) == (1, 0)
            assert ends.unfinished == ["tests/test_a.py::test_three"]
        assert gpu.runs.TestOutcomes().add("knn  lfm_torch  0.1") is None
        assert not gpu.runs.TestOutcomes()

    def test_the_summary_fits(self, gpu: Any) -> None:
        rows: list[dict[str, Any]] = [{"what": "tests", "status": 1, "seconds": 9.0, "failed": ["x" * 100] * 90}]
        for name, count in (("bench_a", 3), ("bench_b", 300), ("bench_c", 70)):
            rows.append({"what": name, "status": 0, "seconds": 1.23456})
            rows += [
                {"benchmark": name, "what": f"row {i}", "n": 10, "seconds": i / 7, "error": f"{i}" + "e" * 300}
                for i in range(count)
            ]
        text = gpu.summary(rows)
        assert len(text) < 10_000
        assert "lines more in the record" in text
        assert "bench_a n = 10" in text
        assert gpu.summary([]) == ""

    def test_libraries_that_cannot_be_used(self, gpu: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        answers = [["_cuda*.so is missing"], []]
        monkeypatch.setattr(gpu, "examined", lambda run, probe: answers.pop(0))
        monkeypatch.setattr(gpu, "nvcc_is_here", lambda: True)
        built = []
        monkeypatch.setattr(gpu.Run, "part", lambda run, part: built.append(part.what))
        gpu.build(self.run(gpu, tmp_path, 30))
        assert built == ["building"]
        answers[:] = [["_cuda*.so is missing"]]
        monkeypatch.setattr(gpu, "nvcc_is_here", lambda: False)
        with pytest.raises(SystemExit, match=r"_cuda\*\.so is missing"):
            gpu.build(self.run(gpu, tmp_path, 30))
        answers[:] = [[]]
        gpu.build(self.run(gpu, tmp_path, 30))
        assert built == ["building"]

    def test_the_libraries_are_asked_in_a_process_of_their_own(self, gpu: Any, tmp_path: Path) -> None:
        run = self.run(gpu, tmp_path, 60)
        problems = gpu.examined(run, gpu.Part("build", [sys.executable, "-c", gpu.PROBE], 50))
        info = lfm.build_info()
        assert bool(problems) or (info.cpu_kernels and info.cuda_kernels)
        assert run.record.rows[0].get("cpu") == info.cpu_build
        assert gpu.examined(run, self.part(gpu, "build", "raise OSError('no GLIBC')"))[0].endswith("no GLIBC")

    def test_the_whole_run_leaves_its_files_in_the_folder_for_them(
        self,
        gpu: Any,
        monkeypatch: pytest.MonkeyPatch,
        tmp_path: Path,
        results: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        out = tmp_path / "out"
        out.mkdir()
        monkeypatch.setenv("OUT", str(out))
        monkeypatch.setattr(sys, "argv", ["gpu.py"])
        monkeypatch.setattr(gpu, "BEGUN", time.perf_counter())
        monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA Test 80GB")
        monkeypatch.setattr(gpu, "build", lambda run: None)
        code = "import os; print(os.environ.get('OUT', 'none'))"
        for name, limit in (("tests", 20.0), ("bench", 20.0), ("limits", 1.0), ("large", 20.0)):
            part = self.part(gpu, name, HANG if name == "limits" else code, limit)
            monkeypatch.setattr(gpu, name, lambda part=part: [part])
        monkeypatch.setattr(gpu, "WHOLE", 60)
        assert gpu.main() == 1
        assert sorted(path.name for path in out.iterdir()) == ["gpu.log", "test-80gb.json"]
        found = read(out / "test-80gb.json")
        assert found == read(results / "test-80gb.json")
        assert found["complete"]
        assert found["machine"]["gpu"] == "NVIDIA Test 80GB"
        assert [row["status"] for row in found["rows"]][0::3] == [0, 0]
        assert (out / "gpu.log").read_text() == "none\n" * 3
        assert "limits" in capsys.readouterr().out

    def test_without_a_gpu_it_says_so(self) -> None:
        if torch.cuda.is_available():
            pytest.skip("there is one")
        ended = subprocess.run(
            [sys.executable, str(BENCHMARKS / "gpu.py")], capture_output=True, text=True, check=False
        )
        assert ended.returncode == 2
        assert "needs a CUDA device" in ended.stderr
