"""From the output of a layer to features of a sample: the mean over space or tokens, one token, or all values."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from lfm_torch._precision import at_least_single

Pooling = Literal["mean", "cls", "last", "flatten"]
POOLINGS = ("mean", "cls", "last", "flatten")


def pooled(name: str, x: Tensor, pooling: Pooling, mask: Any) -> Tensor:
    """Return features ``[n, d]`` of what layer ``name`` gave, in its own memory and at least in single precision.

    A ``mask [n, t]`` that has the length of the output says which tokens are no padding.

    Raises:
        ValueError: "cls" or "last" of an output that has no tokens.
    """
    x = at_least_single(x.detach())
    if x.dim() == 1:
        return x.unsqueeze(1).clone()
    if x.dim() == 2 or pooling == "flatten":
        return x.flatten(1).clone()
    if x.dim() == 3:
        return _of_tokens(x, pooling, mask)
    if pooling != "mean":
        raise ValueError(
            f"pooling must be 'mean' or 'flatten' for layer {name!r}, whose output {list(x.shape)} has no tokens "
            f"[n, t, c], got {pooling!r}"
        )
    return x.flatten(2).mean(2)


def _of_tokens(x: Tensor, pooling: Pooling, mask: Any) -> Tensor:
    masked = isinstance(mask, Tensor) and mask.shape == x.shape[:2]
    present = mask.to(x.device) != 0 if masked else x.new_ones(x.shape[:2], dtype=torch.bool)
    if pooling == "mean":
        if not masked:
            return x.mean(1)
        # not a product with the mask: padding may hold anything, also NaN
        return x.masked_fill(~present.unsqueeze(-1), 0.0).sum(1) / present.sum(1, keepdim=True).clamp_min(1)
    first = present.int().argmax(1)
    last = x.shape[1] - 1 - present.flip(1).int().argmax(1)
    return x[torch.arange(len(x), device=x.device), first if pooling == "cls" else last]
