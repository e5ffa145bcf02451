"""What CONTRIBUTING, README and the drawing say of the house is so: places, order, and the walk down to the kernels."""

from __future__ import annotations

import ast
import re
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
from checkout import ROOT
from test_architecture import ASKED_FOR, LEVEL, ORDER, PACKAGE, PACKAGES, imports, stage

from lfm_torch.ops import OPERATORS

NAME = re.compile(r"`([A-Za-z_]\w+)`")


def text_of(name: str) -> str:
    path = ROOT / name
    if not path.exists():
        pytest.skip(f"{name} is not beside the tests")
    return path.read_text("utf-8")


def section(document: str, title: str) -> str:
    return text_of(document).split(f"\n## {title}\n")[1].split("\n## ")[0]


def paths(text: str) -> list[str]:
    """Files and folders that a text names, from the root or from the package."""
    from_root = re.findall(
        r"(?<![\w/.])(?:\.ci|benchmarks|csrc|docs|examples|lfm_torch|tests)/(?:[\w./-]*[\w/])?", text
    )
    return from_root + re.findall(r"`([\w/]+(?:\.py|/))`", text)


def place(path: str) -> Path:
    return next((root / path for root in (ROOT, PACKAGE) if (root / path).exists()), ROOT / path)


def module(path: str) -> str:
    """The module of a file or folder, without the name of the package."""
    return ".".join(Path(path.removeprefix("lfm_torch/")).with_suffix("").parts)


def level(path: str) -> int:
    return -1 if path.startswith("csrc/") else LEVEL[stage(module(path))]


def defined(path: Path) -> set[str]:
    """Names at the top of the modules in a file or folder."""
    found = set()
    for file in path.rglob("*.py") if path.is_dir() else [path]:
        for node in ast.parse(file.read_text("utf-8")).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                found |= {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return found


def words(path: str) -> set[str]:
    return set(re.findall(r"\w+", (ROOT / path).read_text("utf-8")))


def used(path: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(path.read_text("utf-8"))))
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md"])
def test_what_is_named_is_there(document: str) -> None:
    named = paths(text_of(document))
    assert len(named) > 20
    assert [path for path in named if not place(path).exists()] == []


def test_the_order_is_the_one_that_is_tested() -> None:
    rows = [paths(line) for line in section("CONTRIBUTING.md", "The order of the packages").splitlines() if "|" in line]
    levels = [level(path) for row in rows for path in row]
    assert levels == sorted(levels, reverse=True)
    assert {module(path) for row in rows for path in row} == set(LEVEL) - {"__main__"}
    together = {tuple(sorted(map(module, row))) for row in rows}
    assert {tuple(sorted(row)) for row in ORDER if not row[0].startswith("_")} <= together


def test_imports_that_go_up_are_told() -> None:
    lines = section("CONTRIBUTING.md", "The order of the packages").splitlines()
    told = set()
    for line in lines:
        if "->" in line:
            first, *others = map(module, paths(line))
            told |= {(first, other) for other in others}
    assert told == ASKED_FOR


def walk() -> dict[str, list[tuple[str, str]]]:
    """Descents by title, a descent as its steps: the file, and what is said of it."""
    found: dict[str, list[tuple[str, str]]] = {}
    title = ""
    for line in section("CONTRIBUTING.md", "A walk from `similarity` to the kernel").splitlines():
        step = re.match(r"\d+\. `([\w/.]+)`[:,] (.+)", line)
        if step:
            found[title].append((step[1], step[2]))
        elif line.startswith("To "):
            title = line
            found[title] = []
    return found


def test_the_walk_goes_down_and_each_file_imports_the_next() -> None:
    edges = {(one.module, one.imported) for one in imports() if not one.inside}
    descents = walk()
    assert len(descents) == 4
    for title, steps in descents.items():
        files = [file for file, _ in steps]
        assert files[0] == "lfm_torch/pipeline.py", title
        assert [level(file) for file in files] == sorted(map(level, files), reverse=True), title
        for (above, _), (below, said) in pairwise(steps):
            a, b = module(above), module(below)
            if below.startswith("csrc/"):
                kernels = {name for name, one in OPERATORS.items() if one.reference.__module__ == f"lfm_torch.{a}"}
                assert any(f"{name}_cpu" in words(below) for name in kernels), below
            else:  # by its own name, or through the face of its package
                assert (a, b) in edges or {(a, stage(b)), (stage(b), b)} <= edges, (above, below)
                assert set(NAME.findall(said)) & used(ROOT / above), (above, below)
    assert sum(steps[-1][0].startswith("csrc/") for steps in descents.values()) == 3


def test_the_walk_names_what_is_in_its_files() -> None:
    for steps in walk().values():
        for file, said in steps:
            known = words(file) if file.startswith("csrc/") else defined(ROOT / file)
            names = set(NAME.findall(said))
            assert names
            assert names <= known, file


def test_recipes_name_what_is_in_their_files() -> None:
    recipes = section("CONTRIBUTING.md", "Adding something")
    steps = re.findall(r"^\d\. (.+)$", recipes, re.M)
    assert len(steps) == 5 * 5
    for step in steps:
        files = [
            file
            for path in paths(step)
            for file in (place(path).rglob("*") if place(path).is_dir() else [place(path)])
            if file.suffix in (".py", ".cpp", ".cu", ".h")
        ]
        known = {word for file in files for word in words(str(file))}
        assert not files or set(NAME.findall(step)) - {"test"} <= known, step


def listing() -> list[list[str]]:
    """The rows of README's table of packages, as cells."""
    rows = section("README.md", "What each part does").splitlines()
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows if row.startswith("| `")]


def test_readme_lists_the_packages_in_the_order_of_the_data() -> None:
    rows = [paths(cells[0]) for cells in listing()]
    listed = [module(row[0]) for row in rows]
    assert sorted(listed) == sorted([*PACKAGES, "pipeline"])
    ground = listed.index("cli") + 1
    levels = [LEVEL[name] for name in listed]
    assert levels[:ground] == sorted(levels[:ground])
    assert levels[ground:] == sorted(levels[ground:], reverse=True)


def test_readme_names_what_its_packages_have() -> None:
    for first, _, names in listing():
        assert set(NAME.findall(names)) <= defined(place(paths(first)[0])), first


def drawing() -> ElementTree.Element:
    text_of("docs/house.svg")
    return ElementTree.parse(ROOT / "docs" / "house.svg").getroot()


def test_the_drawing_has_every_package_above_what_it_imports() -> None:
    heights: dict[str, float] = {}
    for text in drawing().iter("{http://www.w3.org/2000/svg}text"):
        for part in text.iter():
            if "name" in part.get("class", "").split():
                heights[module(part.text or "")] = float(text.get("y", "nan"))
    assert set(heights) == {*PACKAGES, "pipeline", "csrc"}
    for one in imports():
        a, b = stage(one.module), stage(one.imported)
        if a in heights and b in heights and one.pair not in ASKED_FOR:
            assert heights[a] <= heights[b], one


def test_the_drawing_can_be_read() -> None:
    style = "".join(drawing().itertext())
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ([\d.]+)px", style)]
    assert sizes
    # GitHub shows it about as wide as it is
    assert drawing().get("width") == "830"
    assert min(sizes) >= 12
