"""The precision of a result is that of the data: float32 or float64, whatever surrounds the call.

Autocast is left by :func:`outside_autocast`, half types by :func:`at_least_single` and :func:`matmul`. What remains is
``torch.set_float32_matmul_precision("high")``, which trainers recommend: it lets every product of a process run in TF32
on a GPU and, with "medium", in bfloat16 on some CPUs. Scores can live with that. An eigensolver that asks for residuals
of 1e-5 cannot: its vectors lose their orthogonality, and it ends with pairs that are none. The settings belong to the
process, so that no thread may change them for a while; :func:`product` and :func:`minus_product` are taken in float64
where they allow less than float32.
"""

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


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, ``[..., p, q]`` and ``[..., q, r]`` to ``[..., p, r]``, in float32 or better whatever is allowed."""
    if _reduced(a):
        return (a.double() @ b.double()).to(a.dtype)
    return a @ b


def minus_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``c - a b`` like :func:`product`, in one pass where possible: what costs with long thin matrices is memory."""
    if _reduced(a):
        return (c.double() - a.double() @ b.double()).to(c.dtype)
    if c.dim() == 2:
        return torch.addmm(c, a, b, alpha=-1)
    flat = (t.flatten(0, -3) for t in (c, a, b))
    return torch.baddbmm(*flat, alpha=-1).view(c.shape)


def _reduced(x: Tensor) -> bool:
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.dtype == torch.float32 and backend.matmul.fp32_precision not in ("ieee", "none")
