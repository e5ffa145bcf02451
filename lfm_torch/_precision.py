"""The precision of a result is that of the data: float32 or float64, whatever surrounds the call."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")

# those that the operators have kernels for
_DEVICE_TYPES = ("cpu", "cuda")
_HALF_TYPES = (torch.float16, torch.bfloat16)


def outside_autocast(function: Callable[P, R]) -> Callable[P, R]:
    """Run ``function`` with autocast switched off, so that it computes in the dtype of what it is given.

    Distances, eigenvectors and scores do not survive half precision. Whatever is public and multiplies wears this; so
    does the backward pass of an autograd function, which runs where ``backward()`` is called.
    """

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        for kind in _DEVICE_TYPES:
            if torch.is_autocast_enabled(kind):
                with torch.autocast(kind, enabled=False):
                    return wrapper(*args, **kwargs)
        return function(*args, **kwargs)

    return wrapper


def at_least_single(x: T) -> T:
    """Return a tensor, or a record of tensors (a Basis, a FunctionalMap), with half types made float32."""
    if isinstance(x, Tensor):
        return x.float() if x.dtype in _HALF_TYPES else x  # type: ignore[return-value]
    values = {field.name: getattr(x, field.name) for field in fields(x)}  # type: ignore[arg-type]
    halves = {name: value for name, value in values.items() if isinstance(value, Tensor) and value.dtype in _HALF_TYPES}
    return replace(x, **{name: value.float() for name, value in halves.items()}) if halves else x  # type: ignore[type-var]


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """``a @ b`` of floating-point tensors in their common dtype, at least float32.

    Its derivative is taken in that dtype as well: that of torch's own product is in half precision where ``backward()``
    is called inside autocast.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    a, b = a.to(dtype), b.to(dtype)
    if min(a.dim(), b.dim()) < 2 or not (torch.is_grad_enabled() and (a.requires_grad or b.requires_grad)):
        return a @ b
    return _Product.apply(a, b)  # type: ignore[no-any-return, no-untyped-call]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(a, b)
        return a @ b

    @staticmethod
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        return (
            (grad @ b.mT).sum_to_size(a.shape) if ctx.needs_input_grad[0] else None,
            (a.mT @ grad).sum_to_size(b.shape) if ctx.needs_input_grad[1] else None,
        )
