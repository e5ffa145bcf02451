"""Which code names what is stored: all that decides a number, wherever it stands, and nothing that tells of it."""

from __future__ import annotations

import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from small_networks import OPTIONS, net, probe

import lfm_torch
from lfm_torch import LFMWarning
from lfm_torch.comparison.jobs import library
from lfm_torch.comparison.jobs.library import code_digest, library_digest, numerics
from lfm_torch.comparison.run import compare
from lfm_torch.measures.table import MEASURES
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.models import Models
from lfm_torch.representations.saved_activations import Activations

PACKAGE = Path(lfm_torch.__file__).parent


@pytest.fixture
def modules(tmp_path: Path) -> list[Path]:
    """Copies of some modules of the package."""
    chosen = ["graphs/graph.py", "measures/pairs.py", "comparison/jobs/bases.py"]
    return [Path(shutil.copy(PACKAGE / name, tmp_path / name.replace("/", "_"))) for name in chosen]


def rewritten(path: Path, old: str, new: str) -> None:
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def test_a_module_that_moves_is_the_same(modules: list[Path], tmp_path: Path) -> None:
    before = code_digest(modules)
    assert code_digest(reversed(modules)) == before
    (tmp_path / "deeper").mkdir()
    moved = [path.rename(tmp_path / "deeper" / f"renamed_{path.name}") for path in modules]
    assert code_digest(moved) == before
    for path in moved:
        rewritten(path, "from lfm_torch.", "from lfm_torch.another_place.")
        text = path.read_text("utf-8")
        # on several lines, and one more
        text = re.sub(r"^from (\S+) import (\w+)$", r"from \1 import (\n    \2,\n)", text, flags=re.MULTILINE)
        path.write_text(text.replace("\n\nfrom", "\n\nimport lfm_torch.one_more\n\nfrom", 1), "utf-8")
    assert code_digest(moved) == before


@pytest.mark.parametrize("change", ["a number", "a line more", "a line less", "a module more", "a module less"])
def test_code_that_changes_is_another(modules: list[Path], change: str) -> None:
    before, path = code_digest(modules), modules[2]
    if change == "a number":
        rewritten(path, "_SOLVER_BLOCKS = 12", "_SOLVER_BLOCKS = 13")
    elif change == "a line more":
        rewritten(path, "    taken = 0\n    for", "    taken = 0\n    room = room // 2\n    for")
    elif change == "a line less":
        rewritten(path, "            torch.cuda.empty_cache()\n", "")
    elif change == "a module more":
        modules.append(Path(shutil.copy(path, path.with_name("another.py"))))
    else:
        modules.pop()
    assert code_digest(modules) != before


def test_all_that_decides_a_number_counts() -> None:
    found = numerics()
    for stage in ("ops", "linalg", "representations", "graphs", "spectral", "baselines", "measures"):
        assert set((PACKAGE / stage).rglob("*.py")) <= found, stage
    for pattern in library._NUMERICS:
        # a module that moved would drop out without a word
        assert list(PACKAGE.glob(pattern)), pattern


def executed(work: Callable[[], object]) -> set[str]:
    """Files of the package in which a function is called while ``work`` goes on, in whatever thread."""
    called: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        if event == "call":
            called.add(frame.f_code.co_filename)

    sys.setprofile(note)
    threading.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return {Path(name).relative_to(PACKAGE).as_posix() for name in called if Path(name).is_relative_to(PACKAGE)}


def test_values_pass_through_no_other_code(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "arrays").mkdir()
    for seed in range(2):
        torch.save(net().state_dict(), tmp_path / f"weights/model_seed_{seed}.pt")
        torch.save({"0": net()(probe()).detach()}, tmp_path / f"arrays/model_seed_{seed}.pt")
    sources: list[Any] = [
        {"a": probe(), "b": probe().tanh()},
        Checkpoints(tmp_path / "weights", net(), probe(), layers="*"),
        Models({"a": net(), "b": net()}, probe(), layers="0"),
        Activations(tmp_path / "arrays"),
    ]

    def work() -> None:
        for number, source in enumerate(sources):
            for _ in range(2):  # computed, then read from the store
                compare(
                    source, measures=tuple(MEASURES), store=tmp_path / f"store{number}", nonfinite="drop", **OPTIONS
                )

    with warnings.catch_warnings():
        # what is said of so few samples is not what is asked here
        warnings.simplefilter("ignore", LFMWarning)
        found = executed(work)
    counted = {path.relative_to(PACKAGE).as_posix() for path in numerics()}
    assert {"graphs/laplacian.py", "representations/state_dicts.py", "measures/pairs.py"} <= found & counted
    # what is said, and what a result shows; in the jobs who does the work and where it is kept
    outside = {"_warnings.py", "comparison/items.py", "comparison/result.py", "comparison/run.py"}
    jobs = ("draws", "engines", "index", "library", "memory", "pair_values", "reductions", "store")
    assert found - counted <= outside | {f"comparison/jobs/{name}.py" for name in jobs}


def test_what_is_shown_does_not_count() -> None:
    stages = ("training", "report", "integrations", "cli")
    shown = [path for stage in stages for path in (PACKAGE / stage).rglob("*.py")]
    assert shown
    assert numerics().isdisjoint(shown)
    assert re.fullmatch(r"[0-9a-f]{64}", library_digest())
