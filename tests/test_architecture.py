"""The house: imports go down one list, in no circle; what a user asks for by name is the exception."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import NamedTuple

import pytest

import lfm_torch

PACKAGE = Path(lfm_torch.__file__).parent
TESTS = Path(__file__).parent
# from the ground up; those in a row stand beside each other and do not know each other
ORDER = [
    ("_version", "_warnings"),
    ("_checks", "_files", "_precision"),
    ("ops", "representations"),
    ("linalg",),
    ("graphs",),
    ("spectral", "baselines"),
    ("descriptors",),
    ("maps",),
    ("measures", "alignment"),
    ("pipeline",),
    ("comparison", "losses"),
    ("training",),
    ("report", "integrations"),
    ("cli",),
    ("__main__",),
]
LEVEL = {name: level for level, row in enumerate(ORDER) for name in row}
# what a user asks for by name or by a method, imported inside the function: the only imports that go up
ASKED_FOR = {
    ("graphs.search", "integrations.faiss"),
    ("graphs.search", "integrations.torch_cluster"),
    ("comparison.jobs.engines", "integrations.ray"),
    ("comparison.result", "report"),
    ("training.monitor", "report.history"),
}
PACKAGES = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists())


class Import(NamedTuple):
    """``module`` imports ``imported``, both without the name of the package; ``inside`` a function or not."""

    module: str
    imported: str
    inside: bool

    @property
    def pair(self) -> tuple[str, str]:
        return self.module, self.imported


def imports() -> list[Import]:
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix("__init__").removesuffix(".")
        tree = ast.parse(path.read_text("utf-8"))
        functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
        inside = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{module} imports by a relative name"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            ours = [module_of(name) for name in names if name.split(".")[0] == "lfm_torch"]
            found += [Import(module, name, id(node) in inside) for name in ours]
    return found


def module_of(name: str) -> str:
    """The module, without the name of the package, that ``lfm_torch.a.b`` is or is defined in."""
    parts = name.split(".")[1:]
    while parts and not PACKAGE.joinpath(*parts).with_suffix(".py").exists():
        if PACKAGE.joinpath(*parts, "__init__.py").exists():
            break
        parts.pop()
    return ".".join(parts)


def stage(module: str) -> str:
    return module.split(".")[0]


def test_every_module_and_package_has_its_place() -> None:
    modules = {path.stem for path in PACKAGE.glob("*.py")}
    assert modules - {"__init__"} | set(PACKAGES) == set(LEVEL)
    assert len(modules) <= 8


def test_imports_go_down() -> None:
    up = {
        one
        for one in imports()
        if one.module
        and stage(one.module) != stage(one.imported)
        and LEVEL[stage(one.imported)] >= LEVEL[stage(one.module)]
    }
    assert {one.pair for one in up} == ASKED_FOR
    assert all(one.inside for one in up)


def test_nothing_imports_what_it_is_imported_from() -> None:
    """No circle between modules; a module that imports its own package's face would be in one."""
    below: dict[str, set[str]] = {}
    for one in imports():
        # Ray's workers need the class by the name it is imported by
        if one.pair not in ASKED_FOR and one.module != one.imported:
            below.setdefault(one.module, set()).add(one.imported)
    try:
        TopologicalSorter(below).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_nobody_imports_the_whole_house() -> None:
    assert [one.module for one in imports() if one.imported == ""] == []


@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_says_what_it_takes_and_gives(name: str) -> None:
    package = importlib.import_module(f"lfm_torch.{name}")
    assert len((package.__doc__ or "").strip().splitlines()) >= 3
    # by its own name a module can be imported; a function of the same name would stand in its place
    inside = {path.stem for path in (PACKAGE / name).iterdir()}
    assert inside & set(getattr(package, "__all__", [])) == set()
    assert all(hasattr(package, public) for public in getattr(package, "__all__", []))


def test_tests_stand_where_the_code_stands() -> None:
    folders = {path.name for path in TESTS.iterdir() if list(path.rglob("test_*.py"))}
    assert folders == {*PACKAGES, "csrc"}
    names = [path.name for path in TESTS.rglob("test_*.py")]
    assert len(names) == len(set(names))


def test_the_core_that_other_machines_run_is_there() -> None:
    script = TESTS.parent / ".ci" / "test-machines"
    if not script.exists():
        pytest.skip(".ci is not beside the tests")
    core = script.read_text("utf-8").partition('core="')[2].partition('"')[0].replace("\\\n", " ").split()
    assert core
    assert [part for part in core if not list(TESTS.rglob(f"test_{part}.py"))] == []


def test_text_is_utf_8_whatever_the_locale() -> None:
    found = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("read_text", "write_text"):
                given = len(node.args) > (node.func.attr == "write_text")  # type: ignore[attr-defined]
                if not given and "encoding" not in {keyword.arg for keyword in node.keywords}:
                    found.append(f"{path.relative_to(PACKAGE)}:{node.lineno}")
    assert found == []


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
