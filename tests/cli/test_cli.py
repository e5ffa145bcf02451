from __future__ import annotations

import csv
import errno
import json
import math
import os
import re
import sqlite3
import stat
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from extras import CLI, needs
from hostile_files import Bomb
from processes import environment
from terminals import unwrapped
from torch import nn

from lfm_torch.cli import main

FACTORY = """
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two = torch.nn.Linear(4, 6), torch.nn.Linear(6, 5)

        def forward(self, x):
            return self.two(self.one(x).tanh())

    def probe():
        return torch.randn(40, 4, generator=torch.Generator().manual_seed(0))

    def interrupted():
        raise KeyboardInterrupt

    def broken():
        raise ValueError("no such width")

    number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's, two runs of checkpoints and probe files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for module in ("userland", "script", "typo"):
        sys.modules.pop(module, None)
    (tmp_path / "userland.py").write_text(textwrap.dedent(FACTORY))
    for seed in range(2):
        for epoch in range(2):
            torch.manual_seed(seed + 5 * epoch)
            net = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(6, 5)})
            file = tmp_path / f"runs/seed{seed}/epoch={epoch}.ckpt"
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({"state_dict": {f"model.{k}": v for k, v in net.state_dict().items()}}, file)
    x = np.random.default_rng(0).normal(size=(40, 4))
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "complex.npy", 1j * x)
    (tmp_path / "script.py").write_text("raise SystemExit(5)")
    (tmp_path / "typo.py").write_text("def f(:")
    np.savez(tmp_path / "both.npz", y=(2 * x).astype(np.float32), other=x[:30])
    return tmp_path


MODEL = ["--model", "userland:Net", "--data", "userland:probe"]
SMALL = ["--n-basis", "6", "--n-neighbors", "8"]
COMPARE = ["compare", "runs", *MODEL, "--layers", "one", "two", *SMALL]


@needs(*CLI)
def test_compare_writes_a_report_and_a_summary(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out"]) == 0
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {"report.html", "similarity.csv", "layers.png", "checkpoints.png", "trajectory.png", "store"}
    with (place / "out" / "similarity.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8**2
    assert all(0 <= float(row["heat"]) <= 1.0001 for row in rows)
    shown = capsys.readouterr()
    assert "4 checkpoints of 2 runs, 2 layers, 40 samples" in unwrapped(shown.out)
    assert "report.html" in shown.out
    assert shown.err == ""
    assert "userland:Net" in (place / "out" / "report.html").read_text("utf-8")


@needs(*CLI)
def test_a_directory_that_cannot_be_written_to_is_said_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(dir: Path) -> None:
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    monkeypatch.setattr("lfm_torch.cli.compare.compare", None)
    assert main([*COMPARE, "--out", "out"]) == 1
    assert "--out must be a place that can be written to, got 'out': Permission denied" in capsys.readouterr().err


@needs(*CLI)
def test_a_full_disk_is_named_and_the_same_command_goes_on(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, sync = [], os.fsync

    def full(handle: int) -> None:
        if stat.S_ISREG(os.fstat(handle).st_mode):
            if len(synced) >= 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            synced.append(handle)
        sync(handle)

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        assert main([*COMPARE, "--quiet"]) == 1
    said = capsys.readouterr().err
    assert re.search(r"No space left on device: '.*store.*'; what is finished is kept, and the same command goes", said)
    assert main([*COMPARE, "--dry-run"]) == 0
    assert "in the store: 3; to reduce: 5" in capsys.readouterr().out
    assert main([*COMPARE, "--quiet"]) == 0


@needs(*CLI)
def test_a_single_eigenvector_makes_a_report(place: Path) -> None:
    assert main([*COMPARE, "--quiet", "--n-basis", "1", "--measures", "overlap", "heat_raw"]) == 0
    assert (place / "lfm-report" / "report.html").exists()


@needs(*CLI)
def test_a_single_eigenvector_has_nothing_beside_the_constant(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--quiet", "--n-basis", "1"]) == 1
    assert "n_basis must be at least 2" in capsys.readouterr().err


@needs(*CLI)
def test_some_failures_exit_with_3_and_the_rest_is_compared(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": Bomb(place / "executed")}, place / "runs/seed0/epoch=7.ckpt")
    torch.save(nn.Linear(4, 6).state_dict(), place / "runs/seed1/epoch=7.ckpt")
    assert main([*COMPARE, "--json"]) == 3
    shown = capsys.readouterr()
    content = json.loads(shown.out)
    assert [failure["checkpoint"] for failure in content["failures"]] == ["seed0/epoch=7", "seed1/epoch=7"]
    assert "--unsafe-pickle" in content["failures"][0]["reason"]
    assert "must fit the model Net" in content["failures"][1]["reason"]
    assert len(content["checkpoints"]) == 4
    assert shown.err.count("warning: not compared") == 2
    assert not (place / "executed").exists()
    assert "must fit the model Net" in (place / "lfm-report" / "report.html").read_text("utf-8")


@needs(*CLI)
def test_unsafe_pickle_is_the_way_out(place: Path) -> None:
    torch.save({"state_dict": Bomb(place / "executed")}, place / "runs/seed0/epoch=7.ckpt")
    assert main([*COMPARE, "--quiet", "--unsafe-pickle"]) == 3  # what the command gives back holds no weights
    assert (place / "executed").exists()


@needs(*CLI)
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nothing.ckpt", *MODEL, "--layers", "one"], "nothing.ckpt must be an existing file"),
        (["compare", "*.pt", *MODEL, "--layers", "one"], "a glob that matches files, got '*.pt'"),
        (["compare", "runs", *MODEL, "--layers", "ones"], "got 'ones'; did you mean 'one'"),
        (["compare", "runs", *MODEL], "--layers must name layers or globs of them; the model has one, two"),
        (["compare", "runs", "--model", "userland", "--data", "x.npy"], "of the form package.module:name"),
        (["compare", "runs", "--model", "userland:Nett", "--data", "x.npy"], "did you mean 'Net'"),
        (["compare", "runs", "--model", "userlan:Net", "--data", "x.npy"], "No module named 'userlan'"),
        (
            ["compare", "runs", "--model", "userland:probe", "--data", "x.npy"],
            "must make a torch.nn.Module, got Tensor",
        ),
        (["compare", "runs", "--model", "userland:number", "--data", "x.npy"], "not callable"),
        (
            ["compare", "runs", "--model", "userland:broken", "--data", "x.npy"],
            "userland:broken must run without an error, got ValueError: no such width (--debug shows where)",
        ),
        (["compare", "runs", "--model", "script:Net", "--data", "x.npy"], "a module that imports, got SystemExit: 5"),
        (["compare", "runs", "--model", "typo:Net", "--data", "x.npy"], "got SyntaxError: "),
        (
            ["compare", "runs", "--model", "userland:Net", "--data", "userland:number", "--layers", "one"],
            "error: data must be a tensor, a tuple (inputs, ...), a dict of tensors, a Dataset or a DataLoader, got",
        ),
        (
            ["compare", "runs", "--model", "userland:Net", "--data", "digit", "--layers", "one"],
            "must be 'digits', a file",
        ),
        (["compare", "runs", "--model", "userland:Net", "--data", "z.npy", "--layers", "one"], "did you mean 'x.npy'"),
        (["compare", "runs", *MODEL, "--layers", "one", "--n-basis", "40"], "n_basis must be between 1 and 39"),
        (["compare", "runs", *MODEL, "--layers", "one", "--measures", "hea"], "did you mean 'heat'"),
        (["compare", "runs", *MODEL, "--layers", "one", "--device", "xpu:9"], "device must be one of this machine"),
        (["compare", "runs", *MODEL, "--layers", "one", "--runs", "("], "pattern must be a regular expression"),
        (
            ["compare", "runs", *MODEL, "--layers", "one", "--out", "x.npy"],
            "can be written to, got 'x.npy': File exists",
        ),
        (
            ["compare", "runs", *MODEL, "--layers", "one", "--out", "/dev/null/a"],
            "written to, got '/dev/null/a': Not a",
        ),
        (
            ["extract", "runs/seed0/epoch=0.ckpt", *MODEL, "--layers", "one", "--out", "x.npy/a.npz"],
            "written to, got 'x.npy': File exists",
        ),
        (["similarity", "x.npy", "both.npz", *SMALL], "one array, got 2 (y, other)"),
        (["similarity", "x.npy", "both.npz:other", *SMALL], "must have the rows of x.npy, 40, got 30"),
        (["similarity", "x.npy", "x.npy", *SMALL], "two different arrays"),
        (
            ["similarity", "x.npy", "complex.npy", *SMALL],
            "complex.npy must be float16, bfloat16, float32 or float64, got",
        ),
        (
            ["extract", "runs/seed0/epoch=0.ckpt", *MODEL, "--layers", "one", "--out", "a.txt"],
            "end on .safetensors or .npz",
        ),
    ],
)
def test_what_the_user_did_wrong_is_one_line(
    place: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("lfm-torch: error: ")
    assert message in shown.err
    assert len(shown.err.strip().splitlines()) == 1


@needs("rich")
def test_debug_shows_where(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["similarity", "nothing.npy", "x.npy", "--debug"])


@needs(*CLI)
def test_interrupt_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compare", "runs", "--model", "userland:Net", "--data", "userland:interrupted", "--layers", "one"]) == 130
    )
    assert capsys.readouterr().err == "lfm-torch: interrupted\n"


@needs("rich")
def test_similarity_of_two_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place / "z.npy", np.load(place / "both.npz")["y"])
    arguments = ["similarity", "x.npy", "z.npy", *SMALL, "--measures", "heat", "linear_cka"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["heat"]["similarity"] == pytest.approx(1, abs=1e-3)
    assert values["linear_cka"]["similarity"] == pytest.approx(1, abs=1e-3)
    assert values["heat"]["shuffled_rows"] < 0.8
    assert values["heat"]["low"] <= values["heat"]["similarity"] <= values["heat"]["high"]
    assert values["heat"]["z"] > 3
    assert values["linear_cka"]["p"] == pytest.approx(1 / 101)
    assert main(arguments) == 0
    assert "heat overlap" in capsys.readouterr().out
    assert main([*arguments, "--quiet"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("name", ["out/features.safetensors", "features.npz"])
def test_extract_writes_what_similarity_reads(place: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    arguments = ["extract", "runs/seed0/epoch=0.ckpt", *MODEL, "--layers", "one", "two", "--out", name]
    assert main(arguments) == 0
    assert "one  [40, 6]" in capsys.readouterr().out
    assert main(["similarity", f"{name}:one", f"{name}:two", *SMALL, "--json"]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["heat"]["similarity"] < 1.0001


def test_extract_refuses_values_that_are_not_finite(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = nn.ModuleDict({"one": nn.Linear(4, 6), "two": nn.Linear(6, 5)})
    nn.init.constant_(net["two"].bias, math.nan)
    torch.save(net.state_dict(), place / "nan.pt")
    assert main(["extract", "nan.pt", *MODEL, "--layers", "one", "two", "--out", "a.npz"]) == 1
    assert "the output of layer 'two' must be finite" in capsys.readouterr().err


def test_info_says_what_is_live(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info"]) == 0
    assert torch.__version__ in capsys.readouterr().out
    assert main(["info", "--json"]) == 0
    assert isinstance(json.loads(capsys.readouterr().out)["cpu_kernels"], bool)


def test_wrong_command_lines_exit_with_2_and_help_names_the_statuses(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, status in (([], 2), (["compare"], 2), (["compare", "--help"], 0)):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == status
    assert "3  some checkpoints could not be compared" in capsys.readouterr().out


@needs(*CLI)  # or another one is missed first
@pytest.mark.parametrize(
    ("package", "option"), [("rich", None), ("jinja2", None), ("matplotlib", None), ("pandas", "parquet")]
)
def test_a_missing_package_is_said_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, option: str | None
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*COMPARE, "--out", "out", *(["--format", option] if option else [])]) == 1
    assert f"needs {package}: pip install" in capsys.readouterr().err
    assert not (place / "out").exists()


@needs(*CLI)
def test_runs_as_a_program_and_imports_nothing_heavy(place: Path) -> None:
    heavy = {"matplotlib", "rich", "pandas", "sklearn", "pytorch_lightning", "jinja2"}
    code = f"import sys, lfm_torch.comparison, lfm_torch.cli; print({heavy} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
    command = [sys.executable, "-m", "lfm_torch.cli", *COMPARE, "--quiet"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    command = [sys.executable, "-m", "lfm_torch.cli", "similarity", "no.npy", "x.npy"]
    failed = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr


def test_a_reader_that_leaves_the_pipe_is_no_error_of_ours() -> None:
    # as `lfm-torch info | true`: little output stays in the buffer until the end
    buffered = environment()
    buffered.pop("PYTHONUNBUFFERED", None)
    command = [sys.executable, "-m", "lfm_torch.cli", "info"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=buffered) as running:
        assert running.stdout is not None
        assert running.stderr is not None
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1


@needs(*CLI)
def test_cache_lists_checks_and_thins_out_the_store(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out", "--quiet"]) == 0
    assert main(["cache", "ls", "out/store"]) == 0
    shown = capsys.readouterr().out
    assert "seed0/epoch=0, one" in shown
    assert "8 pieces, 108 values of pairs" in shown
    assert main(["cache", "verify", "out/store"]) == 0
    assert "are sound" in capsys.readouterr().out
    piece = next((place / "out/store/pieces").glob("??/*.safetensors"))
    piece.write_bytes(piece.read_bytes()[:-4] + b"worn")
    assert main(["cache", "verify", "out/store", "--json"]) == 1
    assert len(json.loads(capsys.readouterr().out)["damaged"]) == 1
    assert main([*COMPARE, "--out", "out", "--quiet", "--measures", "lfm", "heat"]) == 0  # nothing damaged is needed
    assert main([*COMPARE, "--out", "out", "--quiet", "--n-basis", "5"]) == 0
    assert main(["cache", "verify", "out/store", "--remove", "--quiet"]) == 0
    assert main(["cache", "prune", "out/store", "--max-size", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] > 0
    assert main(["cache", "ls", "runs"]) == 1
    assert "must be a directory that a comparison has filled, got 'runs'" in capsys.readouterr().err


@needs(*CLI)
def test_a_budget_and_a_store_are_options_of_compare(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out", "--quiet", "--no-store", "--memory", "8GiB"]) == 0
    assert not (place / "out/store").exists()
    assert main([*COMPARE, "--out", "out", "--quiet", "--store", "elsewhere"]) == 0
    assert (place / "elsewhere/index.sqlite").exists()
    assert main([*COMPARE, "--memory", "much"]) == 1
    assert "such as 2GiB or 500M, got 'much'" in capsys.readouterr().err


@needs(*CLI)
@pytest.mark.parametrize("ending", ["toml", pytest.param("yaml", marks=needs("yaml"))])
def test_a_run_file_holds_the_options(place: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    options = {"checkpoints": ["runs"], "model": "userland:Net", "data": "userland:probe", "layers": ["one", "two"]}
    lines = {**options, "n_basis": 6, "n-neighbors": 8, "measures": ["heat"], "quiet": True, "json": False}
    sign = " =" if ending == "toml" else ":"
    text = "\n".join(f"{name}{sign} {json.dumps(value)}" for name, value in lines.items())
    (place / f"run.{ending}").write_text(text)
    assert main(["compare", "--config", f"run.{ending}", "--out", "out", "--n-basis", "5"]) == 0
    with (place / "out/similarity.csv").open() as file:
        assert next(csv.reader(file))[-1] == "heat"
    assert "<dd>5</dd>" in (place / "out/report.html").read_text("utf-8")
    (place / f"run.{ending}").write_text(text.replace("layers", "layer"))
    assert main(["compare", "--config", f"run.{ending}"]) == 1
    assert "did you mean 'layers'" in capsys.readouterr().err
    (place / f"run.{ending}").write_text("[1: no")
    assert main(["compare", "--config", f"run.{ending}"]) == 1
    assert f"must be a readable {ending} file" in capsys.readouterr().err


@needs(*CLI)
def test_a_dry_run_writes_nothing(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out", "--dry-run"]) == 0
    shown = unwrapped(capsys.readouterr().out)
    assert "4 checkpoints, 8 representations, 40 samples" in shown
    assert "pairs to compare: 36" in shown
    assert not (place / "out").exists()
    assert main([*COMPARE, "--out", "out", "--quiet"]) == 0
    assert main([*COMPARE, "--out", "out", "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["stored"], plan["pairs"]) == (8, 0)


@needs(*CLI)
def test_a_dry_run_says_what_cannot_be_compared_and_not_all_of_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "saved").mkdir()
    for k in range(20):
        (place / f"saved/m{k}.npz").write_bytes(b"no arrays")
    assert main(["compare", "saved", "--activations", "--dry-run"]) == 3
    shown = capsys.readouterr().out
    assert "20 cannot be compared:" in shown
    assert "and 14 more, --json lists them" in shown
    assert len(shown.splitlines()) < 16


@needs(*CLI)
def test_a_store_of_another_format_is_said_once(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out", "--quiet"]) == 0
    with sqlite3.connect(place / "out/store/index.sqlite") as index:
        index.execute("PRAGMA user_version = 1")
    index.close()
    capsys.readouterr()
    for more in ((), ("--dry-run",)):
        assert main([*COMPARE, "--out", "out", *more]) == 1
        shown = capsys.readouterr()
        assert shown.out == ""
        (line,) = shown.err.splitlines()
        assert "must be a store of format 2, got format 1; take another directory" in line


@needs(*CLI)
def test_activations_need_neither_model_nor_data(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("m1", "m2"):
        assert main(["extract", "runs/seed0/epoch=0.ckpt", *MODEL, "--layers", "*", "--out", f"acts/{name}.npz"]) == 0
    assert main(["compare", "acts", "--activations", *SMALL, "--quiet", "--out", "out"]) == 0
    assert main(["compare", "runs", "--layers", "one"]) == 1
    assert "--model must be given, got none" in capsys.readouterr().err


@needs(*CLI)
def test_a_log_tells_what_happened_when(place: Path) -> None:
    (place / "runs/seed0/epoch=7.ckpt").write_bytes(b"no checkpoint")
    command = [sys.executable, "-m", "lfm_torch.cli", *COMPARE, "--quiet", "--log", "out.log"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 3
    assert len(done.stderr.splitlines()) == 1  # the warning of the command line, not the log's as well
    text = (place / "out.log").read_text("utf-8")
    assert "WARNING lfm_torch.compare: not compared: seed0/epoch=7" in text
    assert "INFO lfm_torch.compare: 8 representations of 4 checkpoints, 1 failures" in text


@needs(*CLI)
@pytest.mark.filterwarnings("default::lfm_torch.LFMWarning")
def test_samples_that_are_not_finite_are_left_out(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x, y = np.load("x.npy"), np.random.default_rng(0).normal(size=(40, 3))
    x[5, 0], y[[7, 8], 1] = np.nan, np.inf
    np.save("a.npy", x)
    np.save("b.npy", y)
    assert main(["similarity", "a.npy", "b.npy", *SMALL]) == 1
    assert "a.npy must be finite, got nan in row 5" in capsys.readouterr().err
    assert main(["similarity", "a.npy", "b.npy", *SMALL, "--nonfinite", "drop"]) == 0
    said = capsys.readouterr()
    assert "37 samples" in said.out
    wanted = "lfm-torch: warning: 3 of 40 samples are left out everywhere, not finite in x (row 5), y (row 7, 8)"
    assert said.err.splitlines()[0] == wanted
    (place / "acts").mkdir()
    for name in ("a", "b"):
        (place / f"{name}.npy").rename(place / "acts" / f"{name}.npy")
    command = ["compare", "acts", "--activations", *SMALL, "--out", "out", "--nonfinite", "drop"]
    assert main(command) == 0
    assert "3 samples left out everywhere, with values that are not finite: row 5, 7, 8" in capsys.readouterr().out
    page = (place / "out" / "report.html").read_text("utf-8")
    assert "compared on 37 samples (3 more are left out, with values that are not finite)" in page
    assert main([*command, "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["samples"], plan["stored"], plan["pairs"]) == (37, 2, 0)
    assert main([*command, "--json"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["settings"]["left_out"] == [5, 7, 8]
    assert "lfm-torch: warning: 3 samples left out everywhere" in said.err
