"""How an operator enters the library: one schema, one pure PyTorch twin, one fake kernel, sample inputs.

The schema is written once, here in Python, so that the operators exist with and without the compiled library; the
libraries in ``csrc`` attach kernels to it (``csrc/ops.cpp`` lists them). Where no kernel is loaded the twin is
registered in its place; unless that was asked for (``LFM_TORCH_NO_EXT=1``) its first call on a device warns, with the
reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lfm_torch._warnings import LFMWarning
from lfm_torch.ops._extension import load

NAMESPACE = "lfm_torch"
_library = torch.library.Library(NAMESPACE, "DEF")  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Operator:
    """A registered operator and everything the twin law asks of it.

    With ``twin_on_gpu`` the twin is what a GPU is meant to run: it consists of matrix products that cuBLAS does best.
    """

    name: str
    schema: str
    reference: Callable[..., Any]
    fake: Callable[..., Any]
    sample_inputs: Callable[[torch.device, torch.dtype], Iterator[tuple[Any, ...]]]
    twin_on_gpu: bool = False

    @property
    def compiled(self) -> Any:
        """The operator as the dispatcher calls it: kernels where they are loaded, the twin elsewhere."""
        return getattr(getattr(torch.ops, NAMESPACE), self.name).default


OPERATORS: dict[str, Operator] = {}
_native: set[tuple[str, str]] = set()
_warned: set[str] = set()


def register(operator: Operator) -> Operator:
    """Define the schema, attach the fake kernel, and register the twin wherever no compiled kernel is loaded."""
    loaded = load()  # the libraries first: what they attach is not to be replaced
    schema = f"{operator.name}{operator.schema}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    for key in ("CPU", "CUDA"):
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator.name}", key):
            _native.add((operator.name, key))
        else:
            meant = loaded.by_choice or (key == "CUDA" and operator.twin_on_gpu)
            twin = operator.reference if meant else _with_warning(operator.reference, key)
            _library.impl(operator.name, twin, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}", operator.fake, lib=_library)
    OPERATORS[operator.name] = operator
    return operator


def has_native_kernel(name: str, device: torch.device) -> bool:
    """Tell whether a compiled kernel, not the twin, serves operator ``name`` on ``device``."""
    return (name, device.type.upper()) in _native


def _with_warning(twin: Callable[..., Any], key: str) -> Callable[..., Any]:
    def warning_twin(*args: Any, **kwargs: Any) -> Any:
        if key not in _warned:
            _warned.add(key)
            device, library = ("the CPU", load().cpu) if key == "CPU" else ("the GPU", load().cuda)
            warnings.warn(
                f"lfm_torch runs as plain PyTorch on {device}, many times slower than its kernels: {library.problem}. "
                "LFM_TORCH_NO_EXT=1 asks for plain PyTorch and silences this",
                LFMWarning,
                stacklevel=3,
            )
        return twin(*args, **kwargs)

    return warning_twin
