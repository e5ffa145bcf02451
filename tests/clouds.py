"""Clouds of points, the same for the same seed: alone, rotated, and two that are related."""

from __future__ import annotations

import torch
from torch import Tensor


def cloud(seed: int, d: int = 6, n: int = 80) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    rotation = torch.linalg.qr(cloud(seed, x.shape[1], x.shape[1])).Q
    return scale * x @ rotation


def related(n: int = 240, noise: float = 0.5) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator, dtype=torch.float64)
    return x, x.tanh() + noise * torch.randn(n, 5, generator=generator, dtype=torch.float64)
