"""How an operator enters the library: one schema, one pure PyTorch twin, one fake kernel, sample inputs.

The schema is written once, here in Python, so that the operators exist with and without the compiled library; the
libraries in ``csrc`` attach kernels to it (``csrc/ops.cpp`` lists them). Where no kernel is loaded the twin is
registered in its place; on a GPU that warns once, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from lfm_torch._extension import load
from lfm_torch._warnings import LFMWarning

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


def register(operator: Operator) -> Operator:
    """Define the schema, attach the fake kernel, and register the twin wherever no compiled kernel is loaded."""
    schema = f"{operator.name}{operator.schema}"
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))  # type: ignore[no-untyped-call]
    on_gpu = operator.reference if operator.twin_on_gpu else _with_warning(operator, load().notes)
    twins = {"CPU": operator.reference, "CUDA": on_gpu}
    for key, twin in twins.items():
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{operator.name}", key):
            _native.add((operator.name, key))
        else:
            _library.impl(operator.name, twin, key)  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"{NAMESPACE}::{operator.name}", operator.fake, lib=_library)
    OPERATORS[operator.name] = operator
    return operator


def has_native_kernel(name: str, device: torch.device) -> bool:
    """Tell whether a compiled kernel, not the twin, serves operator ``name`` on ``device``."""
    return (name, device.type.upper()) in _native


def _with_warning(operator: Operator, notes: tuple[str, ...]) -> Callable[..., Any]:
    warned = False

    def twin_on_cuda(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        if not warned:
            warned = True
            reason = "; ".join(notes)
            warnings.warn(
                f"{NAMESPACE}::{operator.name} runs as plain PyTorch on the GPU, without a CUDA kernel: {reason}",
                LFMWarning,
                stacklevel=3,
            )
        return operator.reference(*args, **kwargs)

    return twin_on_cuda
