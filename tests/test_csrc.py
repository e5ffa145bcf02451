"""The C++ and CUDA sources: laid out as lfm_torch/ops is, one file a matter, each with a word on it at its head."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from checkout import ROOT

import lfm_torch
from lfm_torch.ops import OPERATORS

CSRC = ROOT / "csrc"
OPS = Path(lfm_torch.__file__).parent / "ops"
FILES = [path for path in sorted(CSRC.rglob("*")) if path.suffix in (".h", ".cuh", ".cpp", ".cu")]
LONGEST = 330

pytestmark = pytest.mark.skipif(not FILES, reason="the sources are not beside the tests")


def head_of(path: Path) -> str:
    """The comment that a file begins with, empty where it begins with something else."""
    lines = path.read_text("utf-8").splitlines()
    end = next((i for i, line in enumerate(lines) if not line.startswith("//")), len(lines))
    return "\n".join(line.removeprefix("//").strip() for line in lines[:end])


def kernels(device: str) -> dict[str, Path]:
    """The file in which the kernel of each operator is defined."""
    found = {}
    for path in FILES:
        if path.stem.endswith(f"_{device}"):
            for name in re.findall(rf"^\S.* (\w+)_{device}\(Tensor [^;{{]*\{{", path.read_text("utf-8"), re.MULTILINE):
                found[name] = path
    return found


def test_every_file_begins_with_what_it_is_for() -> None:
    assert [str(path.relative_to(CSRC)) for path in FILES if not head_of(path)] == []


def test_no_file_grows_beyond_one_matter() -> None:
    lengths = {str(path.relative_to(CSRC)): len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert {name: length for name, length in lengths.items() if length > LONGEST} == {}


def test_every_folder_is_called_like_its_operators() -> None:
    folders = {path.parent for path in FILES} - {CSRC}
    assert {folder.name for folder in folders if not (OPS / f"{folder.name}.py").exists()} == set()
    assert {folder.name for folder in folders if not (folder / f"{folder.name}.h").exists()} == set()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kernel_stands_where_its_operator_says(device: str) -> None:
    """In the folder, or at least in a file, that is called like the operator's; its head names the twin."""
    found = kernels(device)
    assert set(found) == {name for name, operator in OPERATORS.items() if device == "cpu" or not operator.twin_on_gpu}
    for name, path in found.items():
        stage = OPERATORS[name].reference.__module__.rpartition(".")[2]
        assert stage in (path.parent.name, path.stem.removesuffix(f"_{device}")), name
        assert f"`{OPERATORS[name].reference.__name__}`" in head_of(path), name
