"""Input checks shared by every public function: each says the argument, what was wanted and what was got."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.masked import MaskedTensor

# what is taken wherever points or functions are wanted; and for row numbers and labels
ArrayLike = Tensor | np.ndarray[Any, Any]
IndexLike = ArrayLike | Sequence[Any]
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
FEWEST_ROWS = 3
# what wrong input raises: the message alone says it all
USER_ERRORS = (ValueError, TypeError, OSError, ImportError)


def as_tensor(name: str, x: object) -> Tensor:
    """Return ``x``, an array of NumPy as a tensor on the CPU that shares its memory where torch can.

    Tables of other libraries, whose rows have labels of their own, are for their owner to turn into arrays.

    Raises:
        TypeError: something else, or an array of a dtype that torch has not.
    """
    if isinstance(x, Tensor):
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise TypeError(f"{name} must be an array without a mask, got a MaskedArray; fill it, or leave its rows out")
    if not isinstance(x, np.ndarray):
        advice = "; take its .to_numpy()" if hasattr(x, "to_numpy") else "; take numpy.asarray() of it"
        known = hasattr(x, "__array__") or isinstance(x, (list, tuple))
        kind = type(x).__name__
        raise TypeError(f"{name} must be a torch.Tensor or a numpy.ndarray, got {kind}{advice if known else ''}")
    try:
        return from_numpy(x)
    except TypeError:
        raise TypeError(f"{name} must be an array of a dtype that torch has, got {x.dtype}") from None


def from_numpy(array: np.ndarray[Any, Any]) -> Tensor:
    """Return an array of any layout and byte order as a tensor, without a copy where torch can share its memory.

    Raises:
        TypeError: a dtype that torch has not.
    """
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    # torch knows no memory that must not be written to, no steps backwards, and none inside a record
    shared = array.flags.writeable and all(step >= 0 and step % max(1, array.itemsize) == 0 for step in array.strides)
    return torch.from_numpy(array if shared else array.copy())


def as_integers(name: str, value: object, device: torch.device) -> Tensor:
    """Return integers, a tensor, an array or a (nested) list of them, as an int64 tensor on a device.

    Raises:
        TypeError: anything else.
    """
    if isinstance(value, (list, tuple, range)):
        value = np.asarray(value, dtype=None if len(value) else np.int64)
    found = as_tensor(name, value)
    if found.is_floating_point() or found.is_complex():
        raise TypeError(f"{name} must be integers, got {found.dtype}")
    return found.to(device, torch.int64)


def check_rows(name: str, index: object, count: int, device: torch.device) -> Tensor:
    """Return numbers of rows in ``[0, count)`` as :func:`as_integers` does: they may come from another device.

    Raises:
        TypeError: not integers.
        ValueError: out of range.
    """
    if isinstance(index, (Tensor, np.ndarray)) and index.dtype in (torch.bool, np.dtype(bool)):
        raise TypeError(f"{name} must be integers, got {index.dtype}; take mask.nonzero() of a mask")
    rows = as_integers(name, index, device)
    if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= count):
        raise ValueError(f"{name} must lie in [0, {count}), got {int(rows.min())} to {int(rows.max())}")
    return rows


def check_points(name: str, x: object) -> Tensor:
    """Return ``x`` as a tensor ``[..., n, d]`` of finite floating-point values, or raise.

    Raises:
        TypeError: ``x`` is neither a dense tensor nor an array of NumPy, or not floating point.
        ValueError: fewer than two dimensions, an empty one, or a value that is not finite (the first bad row is named).
    """
    return measured_points(name, x)[0]


def measured_points(name: str, x: object) -> tuple[Tensor, float]:
    """Check as :func:`check_points` does; return also the largest magnitude, which the check has seen anyway."""
    x = check_floating(name, x)
    return x, check_finite(name, x)


def check_floating(name: str, x: object) -> Tensor:
    """Check as :func:`check_points` does, but for the values."""
    x = as_tensor(name, x)
    check_dense(name, x)
    if x.dtype not in FLOATING:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {x.dtype}")
    if x.dim() < 2:
        raise ValueError(f"{name} must have shape [..., n, d], got {list(x.shape)}")
    if x.numel() == 0:
        raise ValueError(f"{name} must have shape [..., n, d] without empty dimensions, got {list(x.shape)}")
    return x


def check_space(name: str, x: object, *, batched: bool | None = False) -> Tensor:
    """Return ``x`` as :func:`check_points` does, after :func:`check_dims`."""
    check_dims(name, x, batched=batched)
    return check_points(name, x)


def check_dims(name: str, x: object, *, batched: bool | None) -> None:
    """Raise ValueError where points have more than the two dimensions of a space, unless they are said to be a batch.

    None is for callers that take no batch: it is not offered.
    """
    if isinstance(x, Tensor):
        check_dense(name, x)
    if not isinstance(x, (Tensor, np.ndarray)) or x.ndim < 3 or batched:
        return
    pooled = "over tokens, x.mean(1)" if x.ndim == 3 else f"over space, x.mean({tuple(range(2, x.ndim))})"
    many = "" if batched is None else "; batched=True takes leading dimensions for a batch of separate spaces"
    raise ValueError(
        f"{name} must have shape [n, d], a row per sample, got {list(x.shape)}: flatten each sample, x.flatten(1), or "
        f"pool it {pooled}{many}"
    )


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


def has_values(x: Tensor) -> bool:
    """Tell whether there are values to look at: not while torch.compile or torch.export trace, nor in a fake tensor."""
    return not (torch.compiler.is_compiling() or isinstance(x, FakeTensor) or x.device.type == "meta")


def check_finite(name: str, x: Tensor) -> float:
    """Raise ValueError naming the first row of ``x [..., n, d]`` that holds NaN or infinity.

    Returns:
        The largest magnitude of real numbers; 1 where there are none to look at.
    """
    if not has_values(x) or x.numel() == 0:
        return 1.0
    if x.is_floating_point():
        # one pass, which NaN comes through; the exact look only where something is wrong
        largest = float(torch.stack(torch.aminmax(x.detach())).abs().amax())
        if math.isfinite(largest):
            return largest
    bad = ~x.detach().isfinite()
    if not bool(bad.any()):
        return 1.0
    where = bad.nonzero()[0].tolist()
    row, value = where[:-1], x.detach()[tuple(where)].item()
    at = f"row {row[0]}" if len(row) == 1 else f"row {row[-1]} of batch entry {row[:-1]}"
    raise ValueError(
        f"{name} must be finite, got {value} in {at} (column {where[-1]}); {int(bad.sum())} values are not finite"
    )


def check_enough(name: str, n: int, advice: str = "") -> None:
    """Raise ValueError for too few rows to be a space: without the constant function nothing is left to compare."""
    if n < FEWEST_ROWS:
        raise ValueError(
            f"{name} must have at least {FEWEST_ROWS} rows to be a space that can be compared, got {n}{advice}"
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
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
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
