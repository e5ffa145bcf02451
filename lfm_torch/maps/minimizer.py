"""The minimiser of the energy of a functional map: conjugate gradients, Newton steps, and implicit gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm_torch._precision import outside_autocast
from lfm_torch.maps.energy import MapEnergy, dot


@dataclass(frozen=True)
class Solution:
    """A minimiser with what the solver says about it: Newton and inner steps, relative gradient norm ``[...]``."""

    C: Tensor
    iterations: int
    residual: Tensor


def minimize(energy: MapEnergy, *, tol: float, max_iterations: int) -> Solution:
    """Minimise a (detached) energy: a row-wise solve, then conjugate gradients, then Newton steps if it is quartic."""
    target = energy.gram[1]
    precondition = energy.preconditioner()
    C = precondition(target)
    scale = _norm(target).clamp_min(torch.finfo(C.dtype).tiny)
    used = 0
    if energy.S_x is not None:
        C, used = conjugate_gradients(energy.quadratic_product, target, precondition, C, tol, max_iterations)
    while bool((energy.orthogonality != 0).any()) and used < max_iterations:
        gradient = energy.half_gradient(C)
        if bool((_norm(gradient) <= tol * scale).all()):
            break
        # solved no more exactly than the quadratic model deserves (Eisenstat & Walker 1996)
        inner = float((_norm(gradient) / scale).max().sqrt().clamp(1e-4, 0.1))
        precondition = energy.preconditioner(C)
        operator = energy.curvature(C)
        step, count = conjugate_gradients(
            operator, -gradient, precondition, torch.zeros_like(C), inner, max_iterations - used
        )
        # no step: the energy bends down along the very first direction, which is then the one to go
        stuck = (_norm(step) == 0)[..., None, None]
        step = torch.where(stuck, precondition(-gradient), step)
        used += count + 1
        C = C + _line_minimum(energy, C, step)[..., None, None] * step
    return Solution(C, used, _norm(energy.half_gradient(C)) / scale)


def conjugate_gradients(
    operator: Callable[[Tensor], Tensor],
    target: Tensor,
    precondition: Callable[[Tensor], Tensor],
    start: Tensor,
    tol: float,
    max_iterations: int,
) -> tuple[Tensor, int]:
    """Preconditioned conjugate gradients on a batch of matrices; finished entries of the batch stand still."""
    C = start
    R = target - operator(C)
    limit = tol * _norm(target).clamp_min(torch.finfo(C.dtype).tiny)
    Z = precondition(R)
    D, slope = Z, dot(R, Z)
    active = torch.ones_like(slope, dtype=torch.bool)
    for used in range(max_iterations):
        active = active & (_norm(R) > limit)
        if not bool(active.any()):
            return C, used
        product = operator(D)
        bend = dot(D, product)
        # bend <= 0 is rounding, or a saddle: that entry has come as far as it can
        active = active & (bend > 0)
        step = torch.where(active, slope / torch.where(active, bend, 1.0), 0.0)[..., None, None]
        C, R = C + step * D, R - step * product
        Z = precondition(R)
        new = dot(R, Z)
        D = Z + torch.where(active, new / torch.where(active, slope, 1.0), 0.0)[..., None, None] * D
        slope = new
    return C, max_iterations


def _line_minimum(energy: MapEnergy, C: Tensor, D: Tensor) -> Tensor:
    """Exact step along D: E(C + t D) is a quartic in t; its derivative, a cubic, is followed to a root from t = 1."""
    weight = energy.orthogonality
    g0 = dot(energy.quadratic_product(C) - energy.gram[1], D)
    g1 = dot(energy.quadratic_product(D), D)
    P = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    Q, R = D.mT @ C + C.mT @ D, D.mT @ D
    # |P + t Q + t^2 R|^2, half its derivative: PQ + t (QQ + 2 PR) + 3 t^2 QR + 2 t^3 RR
    c0, c1 = g0 + weight * dot(P, Q), g1 + weight * (dot(Q, Q) + 2 * dot(P, R))
    c2, c3 = 3 * weight * dot(Q, R), 2 * weight * dot(R, R)
    slope = [coefficient.double() for coefficient in (c0, c1, c2, c3)]

    def derivative(t: Tensor) -> Tensor:
        return ((slope[3] * t + slope[2]) * t + slope[1]) * t + slope[0]

    # D goes downhill: the derivative is negative at 0 and positive far out; halving finds the first sign change kept
    low, high = torch.zeros_like(slope[0]), torch.ones_like(slope[0])
    for _ in range(60):
        high = torch.where(derivative(high) < 0, 2 * high, high)
    for _ in range(60):
        middle = (low + high) / 2
        below = derivative(middle) < 0
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return low.to(C.dtype)


class _ImplicitGradient(torch.autograd.Function):
    """C as a function of half the energy's derivative at C: backward solves with the second derivative."""

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, C: Tensor, energy: MapEnergy, tol: float, max_iterations: int) -> Tensor:
        ctx.save_for_backward(C)
        ctx.energy, ctx.tol, ctx.max_iterations = energy, tol, max_iterations
        return C.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @outside_autocast
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (C,) = ctx.saved_tensors
        energy: MapEnergy = ctx.energy
        precondition = energy.preconditioner(C if bool((energy.orthogonality != 0).any()) else None)
        operator = energy.curvature(C)
        solved, _ = conjugate_gradients(operator, grad, precondition, precondition(grad), ctx.tol, ctx.max_iterations)
        return -solved, None, None, None, None


def attach_gradient(energy: MapEnergy, solution: Solution, *, tol: float, max_iterations: int) -> Tensor:
    """The minimiser with gradients in everything the energy depends on (implicit function theorem)."""
    C = solution.C.detach()
    # asked first: the derivative costs as much as several steps of the solver
    if not (torch.is_grad_enabled() and energy.requires_grad):
        return C
    gradient = energy.half_gradient(C)
    return _ImplicitGradient.apply(gradient, C, energy.detach(), tol, max_iterations)  # type: ignore[no-any-return, no-untyped-call]


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(a)
    return norm
