"""Imports go one way through the house: what is below knows nothing of what is above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import lfm_torch

PACKAGE = Path(lfm_torch.__file__).parent
# where a user asks for it by name or by a method: imported inside a function
BY_NAME = {
    ("jobs.engines", "integrations.ray"),
    ("neighbors", "integrations.faiss"),
    ("neighbors", "integrations.pyg"),
    ("comparison", "report"),
}
# the history of a monitor is written as the report draws it
WRITTEN = {("training.monitor", "report.history")}


def imports() -> set[tuple[str, str]]:
    """Pairs (module, imported module) inside the package, without its name."""
    found = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lfm_torch"):
                base = node.module.removeprefix("lfm_torch").removeprefix(".")
                for alias in node.names:
                    whole = f"{base}.{alias.name}".strip(".").replace(".", "/")
                    is_module = (PACKAGE / f"{whole}.py").exists() or (PACKAGE / whole).is_dir()
                    found.add((module, whole.replace("/", ".") if is_module else base))
    return found


def below(module: str, packages: tuple[str, ...]) -> bool:
    return module.split(".")[0] in packages


def test_nothing_but_what_is_named_here_imports_what_stands_at_the_edge() -> None:
    edge = ("integrations", "report", "cli", "demo", "__main__")
    crossing = {(a, b) for a, b in imports() if below(b, edge[:3]) and not below(a, edge)}
    assert crossing == BY_NAME | WRITTEN


@pytest.mark.parametrize(
    ("package", "allowed"),
    [
        ("ops", {"ops", "_precision", "_version", "_warnings"}),
        ("linalg", {"linalg", "ops", "_checks", "_precision", "_warnings"}),
        ("baselines", {"baselines", "neighbors", "linalg", "ops", "_checks", "_precision", "_warnings"}),
    ],
)
def test_the_foundations_know_nothing_above_them(package: str, allowed: set[str]) -> None:
    assert {b.split(".")[0] for a, b in imports() if below(a, (package,))} <= allowed


def test_text_is_utf_8_whatever_the_locale() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                given = len(node.args) > (node.func.attr == "write_text")  # type: ignore[attr-defined]
                if not given and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


def test_the_flow_goes_one_way() -> None:
    flow = ["neighbors", "graph", "basis", "functional_map", "similarity", "pipeline", "compare"]
    backwards = {(a, b) for a, b in imports() if a in flow and b in flow and flow.index(a) < flow.index(b)}
    assert backwards == set()


def calls_of_torch() -> Iterator[tuple[str, ast.Call]]:
    """Yield the place and the node of every ``torch.name(...)`` in the package."""
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and ast.unparse(node.func.value) == "torch"
            ):
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}: torch.{node.func.attr}", node


def test_no_tensor_is_made_from_the_programs_defaults() -> None:
    of_integers = {"arange", "randperm", "randint", "tril_indices", "triu_indices"}
    of_data = {"as_tensor", "asarray", "sparse_coo_tensor", "sparse_csr_tensor", "sparse_compressed_tensor"}
    of_numbers = {"empty", "eye", "full", "linspace", "logspace", "ones", "rand", "randn", "tensor", "zeros"}
    found = []
    for place, node in calls_of_torch():
        name, given = place.rpartition(".")[2], {keyword.arg for keyword in node.keywords}
        if name in of_integers | of_data | of_numbers and "device" not in given:
            found.append(f"{place} without device=")
        if name in of_numbers and "dtype" not in given:
            found.append(f"{place} without dtype=")
        # two numbers give the default dtype; a number beside a tensor takes the tensor's
        numbers = (ast.Constant, ast.UnaryOp)
        if name == "where" and len(node.args) == 3 and all(isinstance(value, numbers) for value in node.args[1:]):
            found.append(f"{place} of two numbers")
    assert found == []
