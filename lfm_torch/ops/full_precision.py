"""Products of float32 matrices in float32, whatever the process allows.

``torch.set_float32_matmul_precision("high")``, which trainers recommend, lets every product of a process run in TF32 on
a GPU and, with "medium", in bfloat16 on some CPUs. An eigensolver that asks for residuals of 1e-5 cannot: its vectors
lose their orthogonality, and it ends with pairs that are none. The settings belong to the process, so that no thread
may change them for a while; where they allow less than float32, these products are taken in float64 instead.
"""

from __future__ import annotations

import torch
from torch import Tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """``a b``, ``[..., p, q]`` and ``[..., q, r]`` to ``[..., p, r]``."""
    if _reduced(a):
        return (a.double() @ b.double()).to(a.dtype)
    return a @ b


def minus_product(c: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """``c - a b`` in one pass where possible: what costs with long thin matrices is memory."""
    if _reduced(a):
        return (c.double() - a.double() @ b.double()).to(c.dtype)
    if c.dim() == 2:
        return torch.addmm(c, a, b, alpha=-1)
    flat = (t.flatten(0, -3) for t in (c, a, b))
    return torch.baddbmm(*flat, alpha=-1).view(c.shape)


def _reduced(x: Tensor) -> bool:
    backend = torch.backends.cuda if x.is_cuda else torch.backends.mkldnn
    return x.dtype == torch.float32 and backend.matmul.fp32_precision not in ("ieee", "none")
