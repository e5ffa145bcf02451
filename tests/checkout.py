"""The checkout that the tests are in, and copies of it."""

from __future__ import annotations

import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]
MADE = ("build", "dist", "*.egg-info", "results", "demo-output", "__pycache__", ".*")


def copied(to: Path, *without: str, root: Path = ROOT) -> Path:
    """Copy ``root`` without what was made in it, and without files and folders that are called like ``without``."""
    patterns = shutil.ignore_patterns(*MADE, *without)
    above = {to.resolve(), *to.resolve().parents}

    def ignored(folder: str, names: list[str]) -> set[str]:
        # a folder for temporary files may lie in the checkout: a copy of that would hold itself, without end
        return patterns(folder, names) | {name for name in names if Path(folder, name).resolve() in above}

    return Path(shutil.copytree(root, to, ignore=ignored))
