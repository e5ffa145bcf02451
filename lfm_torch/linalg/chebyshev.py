"""Polynomial filters in an operator whose spectrum is known to end at an upper bound."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfm_torch.linalg.eigenpairs import SymmetricOperator


def lanczos_upper_bound(operator: SymmetricOperator, start: Tensor, steps: int = 12) -> float:
    """A bound of the largest eigenvalue from a short Lanczos run on the columns of ``start [..., n, k]``.

    Largest Ritz value plus the norm of its residual (Zhou & Li 2011), never above the operator's own bound.
    """
    previous, beta = torch.zeros_like(start), start.new_zeros(())
    current = start / start.norm(dim=-2, keepdim=True)
    alphas: list[Tensor] = []
    betas: list[Tensor] = []
    for _ in range(steps):
        image = operator.apply(current)
        alpha = (image * current).sum(-2, keepdim=True)
        image = image - alpha * current - beta * previous
        beta = image.norm(dim=-2, keepdim=True)
        previous, current = current, image / torch.where(beta > 0, beta, 1.0)
        alphas.append(alpha)
        betas.append(beta)
    diagonal, off = torch.cat(alphas, -2).mT.double(), torch.cat(betas, -2).mT.double()
    tridiagonal = torch.diag_embed(diagonal) + torch.diag_embed(off[..., :-1], 1) + torch.diag_embed(off[..., :-1], -1)
    ritz, vectors = torch.linalg.eigh(tridiagonal)
    bound = ritz[..., -1] + off[..., -1] * vectors[..., -1, -1].abs()
    return min(operator.upper_bound, float(bound.max()) * 1.001)


def chebyshev_filter(
    operator: SymmetricOperator, block: Tensor, degree: int, low: float, high: float, pole: float
) -> Tensor:
    """Apply the scaled Chebyshev polynomial that is small on ``[low, high]`` and 1 at ``pole < low``.

    Three-term recurrence with one fused operator product per degree (Zhou, Saad, Tiago & Chelikowsky 2006, algorithm
    3.2); the scaling keeps the values near 1 for eigenvalues near ``pole``, so that nothing overflows.
    """
    half, centre = (high - low) / 2, (high + low) / 2
    first = half / (pole - centre)
    sigma = first
    steps = [(sigma / half, -centre * sigma / half, 0.0)]
    for _ in range(degree - 1):
        following = 1 / (2 / first - sigma)
        scale = 2 * following / half
        steps.append((scale, -centre * scale, -sigma * following))
        sigma = following
    return operator.recurrence(block, steps)


class Window(NamedTuple):
    """A spectrum as a filter sees it: its end, where the wanted pairs end, and the unwanted interval [cut, high]."""

    low: float
    wanted: float
    cut: float
    high: float

    def place(self, value: float) -> float:
        """Distance from the middle of the unwanted interval in units of half its length; above 1 is wanted."""
        half = max((self.high - self.cut) / 2, 1e-12 * abs(self.high) + 1e-300)
        return ((self.high + self.cut) / 2 - value) / half


def chebyshev_polynomial(operator: SymmetricOperator, block: Tensor, degree: int, window: Window) -> Tensor:
    """Apply ``T_d`` with the window's unwanted interval mapped to [-1, 1] and what lies below it to below -1."""
    half, centre = (window.high - window.cut) / 2, (window.high + window.cut) / 2
    steps = [(1 / half, -centre / half, 0.0)] + [(2 / half, -2 * centre / half, -1.0)] * (degree - 1)
    return operator.recurrence(block, steps)


def heat_coefficients(scale: float, tol: float) -> list[float]:
    """Chebyshev coefficients of ``exp(-scale (1 + s))`` on ``s in [-1, 1]``, cut where the rest sums to ``tol``.

    They are ``e^{-scale} I_0(scale)`` and ``2 (-1)^k e^{-scale} I_k(scale)``. The modified Bessel functions come from
    Miller's backward recurrence, normalised by ``I_0 + 2 sum I_k = e^scale``. As ``|T_k| <= 1``, the sum of what is cut
    bounds the error.
    """
    if scale == 0:
        return [1.0]
    last = int(12 * scale**0.5 + 60)  # what lies beyond is below exp(-72)
    values = [0.0] * (last + 2)
    values[last] = 1e-250
    for k in range(last, 0, -1):
        values[k - 1] = values[k + 1] + 2 * k / scale * values[k]
        if values[k - 1] > 1e250:
            values = [value * 1e-250 for value in values]
    total = values[0] + 2 * sum(values[1:])
    tail, degree = 0.0, last
    while degree > 0 and tail + 2 * values[degree] / total <= tol:
        tail += 2 * values[degree] / total
        degree -= 1
    return [values[0] / total] + [2 * (-1) ** k * values[k] / total for k in range(1, degree + 1)]


def chebyshev_sums(operator: SymmetricOperator, block: Tensor, series: list[list[float]]) -> list[Tensor]:
    """``sum_k c_k T_k(L / h - 1) block`` for each list of coefficients, h half the bound; products are shared."""
    half = operator.upper_bound / 2
    previous, current = block, block
    sums = [coefficients[0] * block for coefficients in series]
    for k in range(1, max(map(len, series))):
        if k == 1:
            current = operator.apply(block, a=1 / half, b=-1.0)
        else:
            previous, current = current, operator.apply(current, previous, a=2 / half, b=-2.0, c=-1.0)
        for i, coefficients in enumerate(series):
            if k < len(coefficients):
                sums[i] = torch.add(sums[i], current, alpha=coefficients[k])
    return sums
