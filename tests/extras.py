"""Packages the library does without: a test that needs one skips where it is missing, and says what installs it."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import pytest

EXTRAS = {
    "accelerate": "transformers",
    "faiss": "faiss",
    "jinja2": "cli",
    "lightning": "test",
    "matplotlib": "cli",
    "pandas": "pandas",
    "pyarrow": "pandas",
    "pytorch_lightning": "lightning",
    "ray": "ray",
    "rich": "cli",
    "scipy": "scipy",
    "sklearn": "demo",
    "tensorboard": "test",
    "torch_cluster": "pyg",
    "torchmetrics": "lightning",
    "transformers": "transformers",
    "yaml": "yaml",
}
REPORT = ("jinja2", "matplotlib")
CLI = (*REPORT, "rich")


def reason(package: str) -> str:
    """Why a test without this package skips."""
    return f'needs {package}: pip install "lfm-torch[{EXTRAS[package]}]"'


def needs(*packages: str) -> pytest.MarkDecorator:
    """Mark a test, or with ``pytestmark`` a module, that cannot run without these packages."""
    missing = next((package for package in packages if find_spec(package) is None), None)
    return pytest.mark.skipif(missing is not None, reason=reason(missing) if missing else "")


def need(package: str) -> ModuleType:
    """Return the package; where it is missing, skip the test that asks, or the module where it is imported."""
    found: ModuleType = pytest.importorskip(package, reason=reason(package.partition(".")[0]))
    return found
