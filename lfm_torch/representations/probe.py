"""Running a model on probe inputs without leaving a trace in it, or in the training around it."""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn


def is_sharded(model: nn.Module) -> bool:
    """Tell whether FSDP has split the weights, so that every rank must take part in a forward pass."""
    # by name: importing the classes would cost every user of the library the distributed package
    kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
    return bool(kinds & {"FullyShardedDataParallel", "FSDPModule"})


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Eval mode and no gradients; afterwards, also when something raises, everything is as it was.

    Kept are the train/eval flag and the buffers of every submodule, and the generators of Python, NumPy and torch (all
    devices). ``torch.compile`` stands back, since compiled code does not run hooks that came after it, and the weight
    cache of an autocast region around the call is left alone: copies of weights made here carry no gradient (torch 2.10
    hands them to the training).
    """
    with ExitStack() as stack:
        for context in (_random_state_kept(), _flags_kept(model), _eager(), _cacheless_autocast(model)):
            stack.enter_context(context)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.no_grad())
        stack.enter_context(_buffers_kept(model))
        model.eval()
        yield


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    flags = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def _buffers_kept(model: nn.Module) -> Iterator[None]:
    saved = [
        (module._buffers, name, buffer, _version(buffer), buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for buffers, name, buffer, version, copy in saved:
            if _version(buffer) != version:
                buffer.copy_(copy)
            buffers[name] = buffer


def _version(buffer: Tensor) -> int:
    return -1 if buffer.is_inference() else buffer._version


@contextmanager
def _random_state_kept() -> Iterator[None]:
    # a DataLoader draws a seed for its workers, and a data set may augment: none of it may move the generators of a
    # training that goes on
    python, legacy = random.getstate(), np.random.get_state()  # noqa: NPY002 (the global state is what must be kept)
    try:
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()  # type: ignore[no-untyped-call]
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002


def _eager() -> AbstractContextManager[None]:
    # nothing is compiled where the compiler was never imported, and importing it takes seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


def _cacheless_autocast(model: nn.Module) -> AbstractContextManager[None]:
    kind = next((tensor.device.type for tensor in model.parameters()), "cpu")
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return nullcontext()
    region: AbstractContextManager[None] = torch.autocast(
        kind, dtype=torch.get_autocast_dtype(kind), cache_enabled=False
    )
    return region
