"""``lfm-torch info``: versions, and which kernels are live."""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lfm_torch.cli.options import OK
from lfm_torch.ops._extension import build_info

# what the library uses or works with, as pip names it
_PACKAGES = (
    *("numpy", "safetensors", "rich", "matplotlib", "jinja2", "pandas", "scipy", "scikit-learn", "faiss-cpu"),
    *("faiss-gpu-cu12", "pytorch-lightning", "lightning", "torchmetrics", "transformers", "ray", "torch-geometric"),
    *("torch-cluster", "torch-sparse"),
)


def run(arguments: argparse.Namespace) -> int:
    """Print versions and kernels, and return the exit status."""
    values: dict[str, Any] = dataclasses.asdict(build_info())
    values["python"] = platform.python_version()
    values |= {name: _version_of(name) for name in _PACKAGES}
    if arguments.json:
        print(json.dumps(values, indent=2))
    elif not arguments.quiet:
        for name, value in values.items():
            print(f"{name.replace('_', ' '):<22}{_shown(name, value)}")
    return OK


def _version_of(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _shown(name: str, value: object) -> str:
    if isinstance(value, (list, tuple)):
        return "; ".join(map(str, value)) or "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ("not installed" if name in _PACKAGES else "none") if value is None else str(value)
