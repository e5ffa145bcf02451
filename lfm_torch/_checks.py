"""Input checks shared by every public function: each says the argument, what was wanted and what was got."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor
from torch.masked import MaskedTensor

FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# what wrong input raises: the message alone says it all
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def check_points(name: str, x: object) -> Tensor:
    """Return ``x`` as a tensor ``[..., n, d]`` of finite floating-point values, or raise.

    Raises:
        TypeError: ``x`` is not a dense tensor, or not floating point.
        ValueError: fewer than two dimensions, an empty one, or a value that is not finite (the first bad row is named).
    """
    return measured_points(name, x)[0]


def measured_points(name: str, x: object) -> tuple[Tensor, float]:
    """Check as :func:`check_points` does; return also the largest magnitude, which the check has seen anyway."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
    check_dense(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [..., n, d], got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must have shape [..., n, d] without empty dimensions, got {list(x.shape)}")
    return x, check_finite(name, x)


def check_dense(name: str, x: Tensor) -> None:
    """Raise TypeError for a tensor that has not one number for every place, and say how to get one that has."""
    if x.is_nested:
        raise TypeError(f"{name} must be a dense tensor, got a nested one; join its parts and give batch")
    if isinstance(x, MaskedTensor):
        raise TypeError(f"{name} must be a dense tensor, got a masked one; take {name}.to_tensor(value)")
    if x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor, got the layout {x.layout}; take {name}.to_dense()")
    if x.is_quantized:
        raise TypeError(f"{name} must be a dense tensor, got {x.dtype}; take {name}.dequantize()")


def check_finite(name: str, x: Tensor) -> float:
    """Raise ValueError naming the first row of ``x [..., n, d]`` that holds NaN or infinity.

    Returns:
        The largest magnitude.
    """
    # one pass, which NaN comes through; the exact look only where something is wrong
    largest = float(torch.stack(torch.aminmax(x.detach())).abs().amax())
    if math.isfinite(largest):
        return largest
    bad = ~x.detach().isfinite()
    where = bad.nonzero()[0].tolist()
    row, value = where[:-1], x.detach()[tuple(where)].item()
    at = f"row {row[0]}" if len(row) == 1 else f"row {row[-1]} of batch entry {row[:-1]}"
    raise ValueError(
        f"{name} must be finite, got {value} in {at} (column {where[-1]}); {int(bad.sum())} values are not finite"
    )


def check_same_device_dtype(first: str, x: Tensor, second: str, y: Tensor) -> None:
    """Raise TypeError for different dtypes and ValueError for different devices."""
    if x.dtype != y.dtype:
        raise TypeError(f"{second} must have the dtype of {first}, {x.dtype}, got {y.dtype}")
    if x.device != y.device:
        raise ValueError(f"{second} must be on the device of {first}, {x.device}, got {y.device}")


def check_choice(name: str, value: object, choices: Collection[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``choices``; a near match is suggested."""
    if value not in choices:
        wanted = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"{name} must be one of {wanted}, got {value!r}{did_you_mean(value, choices)}")


def check_range(name: str, value: int, low: int, high: int, why: str) -> None:
    """Raise unless the integer ``value`` lies in ``[low, high]``; ``why`` explains the upper end.

    Raises:
        TypeError: not an integer.
        ValueError: outside the range.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if not low <= value <= high:
        raise ValueError(f"{name} must be between {low} and {high} ({why}), got {value}")


def within(value: Tensor, low: float, high: float) -> Tensor:
    """Return ``value`` with what rounding took out of ``[low, high]`` put at its end; gradients are those of ``value``.

    Half of the digits of the dtype count as rounding. A value farther out is a mistake, and is left as it is.
    """
    given = value.detach()
    excess = given - given.clamp(low, high)
    return value - torch.where(excess.abs() <= torch.finfo(value.dtype).eps ** 0.5, excess, 0.0)


def one_line(error: BaseException, *, typed: bool = False) -> str:
    """Return an error's message on one line, with its type where that is none of ``USER_ERRORS`` or where ``typed``."""
    text = " ".join(str(error).split())
    if text and not typed and isinstance(error, USER_ERRORS):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def did_you_mean(value: object, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'a' or 'b'?"`` for names near ``value`` or with it in them, else an empty string."""
    written, names = str(value).lower(), list(choices)
    within = [name for name in names if len(written) > 2 and written in name.lower()]
    near = list(dict.fromkeys([*within, *difflib.get_close_matches(written, names, n=3, cutoff=0.5)]))[:3]
    return f"; did you mean {' or '.join(repr(name) for name in near)}?" if near else ""
