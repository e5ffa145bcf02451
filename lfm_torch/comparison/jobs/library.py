"""Which library computed a piece: the digest of what decides the last bit beside the representations."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

import torch

from lfm_torch.ops._extension import simd_level
from lfm_torch.representations.fingerprints import digest, file_digest

_PACKAGE = Path(__file__).parents[2]
# from the files of a source to the value of a pair: whole packages, so that a new module of theirs is never forgotten.
# What is left out decides no number: the engines, since a piece depends on nobody who does it; the store, which gives
# back what it was given, in a format of its own number; the views of a result, which are not stored; what is reported
_NUMERICS = (
    "_checks.py", "_files.py", "_precision.py", "pipeline.py",
    "ops/**/*.py", "linalg/**/*.py", "representations/**/*.py", "graphs/**/*.py", "spectral/**/*.py",
    "baselines/**/*.py", "measures/**/*.py",
    "comparison/jobs/bases.py", "comparison/jobs/blocks.py", "comparison/jobs/chance.py", "comparison/jobs/job.py",
    "comparison/jobs/pieces.py", "comparison/jobs/settings.py", "comparison/jobs/tasks.py",
)  # fmt: skip


@functools.cache
def library_digest() -> str:
    """Return the digest of the library's numerics, its kernels, torch, and the processor's kind."""
    return digest(
        code_digest(numerics()),
        sorted(file_digest(path) for path in _PACKAGE.glob("*.so")),
        torch.__version__,
        torch.backends.cpu.get_cpu_capability(),
        simd_level(),
    )


def numerics() -> set[Path]:
    """Return the modules whose code decides the numbers; a change in a report must not throw away a day of work."""
    return {path for pattern in _NUMERICS for path in _PACKAGE.glob(pattern)}


def code_digest(modules: Iterable[Path]) -> str:
    """Return the digest of what modules define, wherever they stand: neither their names nor their imports count."""
    return digest(sorted(digest(_without_imports(path.read_text("utf-8"))) for path in modules))


def _without_imports(source: str) -> list[str]:
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    left_out = {line for node in imports for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)}
    return [line for number, line in enumerate(source.splitlines(), 1) if number not in left_out and line.strip()]
