"""What a process started by a test inherits."""

from __future__ import annotations

import os
from pathlib import Path

import lfm_torch


def environment(**changes: str) -> dict[str, str]:
    """Return the environment with ``changes``, in which Python imports this package and the modules of these tests."""
    # wherever the process runs: the package under test need not be the one that is installed
    tests = Path(__file__).parent
    modules = [Path(lfm_torch.__file__).parents[1], tests, *sorted(path for path in tests.iterdir() if path.is_dir())]
    found = [*map(str, modules), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, **changes, "PYTHONPATH": os.pathsep.join(filter(None, found))}
