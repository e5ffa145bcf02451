"""The energy of a functional map and its minimiser: matrix-free, batched, with implicit gradients.

With descriptors ``A = Phi_x^T f_x``, ``B = Phi_y^T f_y`` of unit columns and ``S_k = Phi^T diag(f_k) Phi``:

    E(C) =      1 / p        |C A - B|^2
         + laplacian / m_x   sum_ij w_ij C_ij^2,                 w_ij = (b_i - a_j)^2, scaled to mean 1
         + commutativity / (m_x p)  sum_k |S_k^y C - C S_k^x|^2
         + orthogonality / m_x      |C^T C - I|^2
         + ridge / m_x              |C|^2

The second derivative of the quadratic part couples rows of C only through the commutativity term. Its diagonal blocks,
one ``m_x x m_x`` matrix for every row, are factorised once: they are the exact answer without that term and the
preconditioner of conjugate gradients with it. Nothing has ``(m_x m_y)^2`` entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lfm_torch._precision import matmul, outside_autocast

# bytes of one slice of the products S_k^y C S_k^x
_SLICE_BYTES = 1 << 28


@dataclass(frozen=True)
class MapEnergy:
    """The energy for fixed inputs; leading dimensions are a batch of pairs.

    Attributes:
        A: ``[..., m_x, p]`` descriptors on x in its basis.
        B: ``[..., m_y, p]``.
        penalty: ``[..., m_y, m_x]`` all elementwise weights of ``C^2``: Laplacian term and ridge.
        S_x: ``[..., p, m_x, m_x]`` multiplication operators, None without the commutativity term.
        S_y: ``[..., p, m_y, m_y]``.
        commutativity: scale of the commutativity term.
        orthogonality: scale of the orthogonality term.
    """

    A: Tensor
    B: Tensor
    penalty: Tensor
    S_x: Tensor | None
    S_y: Tensor | None
    commutativity: Tensor
    orthogonality: Tensor

    def detach(self) -> MapEnergy:
        """The same energy without gradients."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return MapEnergy(*(value.detach() if isinstance(value, Tensor) else value for value in values))

    @property
    def requires_grad(self) -> bool:
        """Whether anything the energy depends on asks for a gradient."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)

    @property
    def p(self) -> int:
        """Number of descriptors."""
        return self.A.shape[-1]

    @functools.cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """``sum_k S_k^2`` on x and on y."""
        assert self.S_x is not None
        assert self.S_y is not None
        wide_x, wide_y = (s.transpose(-3, -2).flatten(-2) for s in (self.S_x, self.S_y))
        return wide_x @ wide_x.mT, wide_y @ wide_y.mT

    @functools.cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """``A A^T / p`` and ``B A^T / p``."""
        return matmul(self.A, self.A.mT) / self.p, matmul(self.B, self.A.mT) / self.p

    def value(self, C: Tensor) -> Tensor:
        """E(C), ``[...]``."""
        total = _dot(C @ self.A - self.B, C @ self.A - self.B) / self.p + _dot(self.penalty * C, C)
        if self.S_x is not None:
            total = total + _dot(C, self._commutativity_product(C))
        gap = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        return total + self.orthogonality * _dot(gap, gap)

    def quadratic_product(self, C: Tensor) -> Tensor:
        """Half the second derivative of the quadratic part, applied to ``C``."""
        product = matmul(C, self.gram[0]) + self.penalty * C
        return product if self.S_x is None else product + self._commutativity_product(C)

    def _commutativity_product(self, C: Tensor) -> Tensor:
        """``sum_k S^y (S^y C - C S^x) - (S^y C - C S^x) S^x``, scaled: two GEMMs a slice of descriptors."""
        assert self.S_x is not None
        assert self.S_y is not None
        square_x, square_y = self.squares
        product = square_y @ C + C @ square_x
        m_y, m_x = C.shape[-2:]
        step = max(1, _SLICE_BYTES // (C.element_size() * m_x * m_y * max(1, C[..., 0, 0].numel())))
        for s_x, s_y in zip(torch.split(self.S_x, step, -3), torch.split(self.S_y, step, -3), strict=True):
            moved = (s_y.flatten(-3, -2) @ C).view(*s_y.shape[:-1], m_x)
            product = product - 2 * moved.transpose(-3, -2).flatten(-2) @ s_x.flatten(-3, -2)
        return self.commutativity[..., None, None] * product

    def half_gradient(self, C: Tensor) -> Tensor:
        """Half the derivative of E at ``C``."""
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        return (
            self.quadratic_product(C) - self.gram[1] + 2 * self.orthogonality[..., None, None] * (C @ (C.mT @ C - eye))
        )

    def curvature(self, C: Tensor) -> Callable[[Tensor], Tensor]:
        """Half the second derivative of E at ``C`` as an operator."""
        if not bool((self.orthogonality != 0).any()):
            return self.quadratic_product
        weight = 2 * self.orthogonality[..., None, None]
        gap = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)

        def apply(D: Tensor) -> Tensor:
            mixed = D.mT @ C
            return self.quadratic_product(D) + weight * (C @ (mixed + mixed.mT) + D @ gap)

        return apply

    @functools.cached_property
    def blocks(self) -> Tensor:
        """Diagonal blocks of the quadratic part, one for every row of C: ``[..., m_y, m_x, m_x]``."""
        gram = self.gram[0]
        blocks: Tensor = gram.unsqueeze(-3) + torch.diag_embed(self.penalty)
        if self.S_x is None:
            return blocks
        assert self.S_y is not None
        square_x, square_y = self.squares
        on_y = self.S_y.diagonal(dim1=-2, dim2=-1)  # [..., p, m_y]
        crossed = (on_y.mT @ self.S_x.flatten(-2)).reshape(*self.penalty.shape, self.penalty.shape[-1])
        own = torch.diag_embed(square_y.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).expand(self.penalty.shape))
        return blocks + self.commutativity[..., None, None, None] * (own + square_x.unsqueeze(-3) - 2 * crossed)

    def preconditioner(self, C: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Solve with the diagonal blocks of the quadratic part, at ``C`` with those of the orthogonality term too."""
        blocks = self.blocks
        if C is not None:
            length = C.square().sum(-1, keepdim=True).expand(C.shape)
            own = torch.diag_embed(length) + C.unsqueeze(-1) * C.unsqueeze(-2)
            blocks = blocks + 2 * self.orthogonality[..., None, None, None] * own
        factors = torch.linalg.cholesky(blocks)
        return lambda R: torch.cholesky_solve(R.unsqueeze(-1), factors).squeeze(-1)


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
    D, slope = Z, _dot(R, Z)
    active = torch.ones_like(slope, dtype=torch.bool)
    for used in range(max_iterations):
        active = active & (_norm(R) > limit)
        if not bool(active.any()):
            return C, used
        product = operator(D)
        bend = _dot(D, product)
        # bend <= 0 is rounding, or a saddle: that entry has come as far as it can
        active = active & (bend > 0)
        step = torch.where(active, slope / torch.where(active, bend, 1.0), 0.0)[..., None, None]
        C, R = C + step * D, R - step * product
        Z = precondition(R)
        new = _dot(R, Z)
        D = Z + torch.where(active, new / torch.where(active, slope, 1.0), 0.0)[..., None, None] * D
        slope = new
    return C, max_iterations


def _line_minimum(energy: MapEnergy, C: Tensor, D: Tensor) -> Tensor:
    """Exact step along D: E(C + t D) is a quartic in t; its derivative, a cubic, is followed to a root from t = 1."""
    weight = energy.orthogonality
    g0 = _dot(energy.quadratic_product(C) - energy.gram[1], D)
    g1 = _dot(energy.quadratic_product(D), D)
    P = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
    Q, R = D.mT @ C + C.mT @ D, D.mT @ D
    # |P + t Q + t^2 R|^2, half its derivative: PQ + t (QQ + 2 PR) + 3 t^2 QR + 2 t^3 RR
    c0, c1 = g0 + weight * _dot(P, Q), g1 + weight * (_dot(Q, Q) + 2 * _dot(P, R))
    c2, c3 = 3 * weight * _dot(Q, R), 2 * weight * _dot(R, R)
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


def _dot(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum((-2, -1))


def _norm(a: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(a)
    return norm
