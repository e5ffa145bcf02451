from __future__ import annotations

import csv
import json
import math
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from test_arrays import Bomb
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

    number = 3
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a module of the user's, two runs of checkpoints and probe files."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    sys.modules.pop("userland", None)
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
    np.savez(tmp_path / "both.npz", y=(2 * x).astype(np.float32), other=x[:30])
    return tmp_path


MODEL = ["--model", "userland:Net", "--data", "userland:probe"]
SMALL = ["--n-basis", "6", "--n-neighbors", "8"]
COMPARE = ["compare", "runs", *MODEL, "--layers", "one", "two", *SMALL]


def test_compare_writes_a_report_and_a_summary(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*COMPARE, "--out", "out"]) == 0
    names = {path.name for path in (place / "out").iterdir()}
    assert names == {"report.html", "similarity.csv", "layers.png", "checkpoints.png", "trajectory.png"}
    with (place / "out" / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8**2
    assert all(0 <= float(row["heat"]) <= 1.0001 for row in rows)
    shown = capsys.readouterr()
    assert "4 checkpoints of 2 runs, 2 layers, 40 samples" in shown.out
    assert "report.html" in shown.out
    assert shown.err == ""
    assert "userland:Net" in (place / "out" / "report.html").read_text()


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
    assert "must fit the model Net" in (place / "lfm-report" / "report.html").read_text()


def test_unsafe_pickle_is_the_way_out(place: Path) -> None:
    torch.save({"state_dict": Bomb(place / "executed")}, place / "runs/seed0/epoch=7.ckpt")
    assert main([*COMPARE, "--quiet", "--unsafe-pickle"]) == 3  # what the command gives back holds no weights
    assert (place / "executed").exists()


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
            ["compare", "runs", "--model", "userland:Net", "--data", "digit", "--layers", "one"],
            "must be 'digits', a file",
        ),
        (["compare", "runs", "--model", "userland:Net", "--data", "z.npy", "--layers", "one"], "did you mean 'x.npy'"),
        (["compare", "runs", *MODEL, "--layers", "one", "--n-basis", "40"], "n_basis must be between 1 and 39"),
        (["compare", "runs", *MODEL, "--layers", "one", "--measures", "hea"], "did you mean 'heat'"),
        (["compare", "runs", *MODEL, "--layers", "one", "--device", "xpu:9"], "device must be one of this machine"),
        (["compare", "runs", *MODEL, "--layers", "one", "--runs", "("], "pattern must be a regular expression"),
        (["compare", "runs", *MODEL, "--layers", "one", "--out", "x.npy"], "x.npy"),
        (["similarity", "x.npy", "both.npz", *SMALL], "one array, got 2 (y, other)"),
        (["similarity", "x.npy", "both.npz:other", *SMALL], "must have the rows of x.npy, 40, got 30"),
        (["similarity", "x.npy", "x.npy", *SMALL], "two different arrays"),
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


def test_debug_shows_where(place: Path) -> None:
    with pytest.raises(FileNotFoundError):
        main(["similarity", "nothing.npy", "x.npy", "--debug"])


def test_interrupt_is_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["compare", "runs", "--model", "userland:Net", "--data", "userland:interrupted", "--layers", "one"]) == 130
    )
    assert capsys.readouterr().err == "lfm-torch: interrupted\n"


def test_similarity_of_two_files(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(place / "z.npy", np.load(place / "both.npz")["y"])
    arguments = ["similarity", "x.npy", "z.npy", *SMALL, "--measures", "heat", "linear_cka"]
    assert main([*arguments, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["heat"]["similarity"] == pytest.approx(1, abs=1e-3)
    assert values["linear_cka"]["similarity"] == pytest.approx(1, abs=1e-3)
    assert values["heat"]["shuffled_rows"] < 0.8
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


@pytest.mark.parametrize(("package", "option"), [("rich", None), ("jinja2", None), ("pandas", "parquet")])
def test_a_missing_package_is_said_before_the_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, package: str, option: str | None
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    assert main([*COMPARE, "--out", "out", *(["--format", option] if option else [])]) == 1
    assert f"needs {package}: pip install" in capsys.readouterr().err
    assert not (place / "out").exists()


def test_runs_as_a_program_and_imports_nothing_heavy(place: Path) -> None:
    heavy = {"matplotlib", "rich", "pandas", "sklearn", "pytorch_lightning", "jinja2"}
    code = f"import sys, lfm_torch.compare, lfm_torch.cli; print({heavy} & set(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert loaded.stdout.strip() == "set()"
    done = subprocess.run([sys.executable, "-m", "lfm_torch.cli", *COMPARE, "--quiet"], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    failed = subprocess.run(
        [sys.executable, "-m", "lfm_torch.cli", "similarity", "no.npy", "x.npy"], capture_output=True, text=True
    )
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr
