"""A representation and what several classical measures need of it, computed once: centred features, factors, Grams."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast

State = tuple[Tensor, ...]
_TINY = 1e-300


class Points:
    """A representation ``x [..., n, d]`` in float64, with its parts computed when first asked for.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: wrong shape, values that are not finite.
    """

    def __init__(self, x: ArrayLike, *, name: str = "x") -> None:
        self.x = _checks.check_points(name, x)

    @property
    def n(self) -> int:
        """Number of rows."""
        return self.x.shape[-2]

    @property
    def dtype(self) -> torch.dtype:
        """That of scores: float32 where the points are of a half type."""
        return torch.promote_types(self.x.dtype, torch.float32)

    @cached_property
    def features(self) -> Tensor:
        """Column-centred features over their largest magnitude: a common factor cancels in every measure here.

        Without it squares of squares overflow or vanish at extreme scales.
        """
        x = self.x.double()
        x = x / x.abs().amax((-2, -1), keepdim=True).clamp_min(_TINY)
        x = x - x.mean(-2, keepdim=True)
        return x / x.abs().amax((-2, -1), keepdim=True).clamp_min(_TINY)

    @cached_property
    def gram(self) -> Tensor:
        """``[..., n, n]`` products of the centred features."""
        return self.features @ self.features.mT

    @cached_property
    def squared_distances(self) -> Tensor:
        """``[..., n, n]`` between rows, up to a common factor, with an exact zero diagonal."""
        own = self.gram.diagonal(dim1=-2, dim2=-1)
        squares = (own.unsqueeze(-1) + own.unsqueeze(-2) - 2 * self.gram).clamp_min(0)
        return squares * (1 - torch.eye(self.n, dtype=squares.dtype, device=squares.device))

    @cached_property
    def factors(self) -> tuple[Tensor, Tensor, Tensor]:
        """``U [..., n, r], S [..., r], V^T [..., r, d]`` with ``features = U S V^T`` and ``r = min(n, d)``.

        Directions below the rank have zeros in ``U`` and ``S``. More features than rows go through the Gram matrix,
        which is far smaller, at half the digits in the smallest directions.
        """
        n, d = self.features.shape[-2:]
        eps = torch.finfo(torch.float64).eps
        if d <= n:
            U, S, Vt = torch.linalg.svd(self.features, full_matrices=False)
            keep = S[..., :1] * n * eps < S
        else:
            squares, U = torch.linalg.eigh(self.gram)
            squares, U = squares.flip(-1), U.flip(-1)
            keep = squares > squares[..., :1] * n * eps
            S = torch.where(keep, squares, 1.0).sqrt()
            Vt = (U / S.unsqueeze(-2)).mT @ self.features
        return U * keep.unsqueeze(-2), torch.where(keep, S, 0.0), Vt * keep.unsqueeze(-1)

    @cached_property
    def reduced(self) -> Tensor:
        """The features, rotated into at most n columns: what measures that ignore rotations need of wide layers."""
        if self.features.shape[-1] <= self.n:
            return self.features
        U, S, _ = self.factors
        return U * S.unsqueeze(-2)


@outside_autocast
def compared(
    x: ArrayLike,
    y: ArrayLike,
    prepare: Callable[[Points], State],
    score: Callable[[State, State], Tensor],
    *,
    batched: bool,
) -> Tensor:
    """Score of a pair ``x [n, d_x]``, ``y [n, d_y]`` in the dtype of ``x``, at least float32; ``[...]`` of a batch."""
    for name, points in (("x", x), ("y", y)):
        _checks.check_dims(name, points, batched=batched)
    a, b = Points(x, name="x"), Points(y, name="y")
    if a.x.shape[:-1] != b.x.shape[:-1]:
        raise ValueError(f"y must have the rows of x, shape {[*a.x.shape[:-1], 'd']}, got {list(b.x.shape)}")
    return score(prepare(a), prepare(b)).to(a.dtype)


def normalized(x: Tensor) -> Tensor:
    """``x [..., n, r]`` over its Frobenius norm; zeros stay zeros."""
    return x / x.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(_TINY)


def score_inner(a: State, b: State) -> Tensor:
    """Inner product of two states of the same shape and of norm 1, in [-1, 1]."""
    return _checks.within((a[0].double() * b[0].double()).sum((-2, -1)), -1, 1)


def score_kernels(a: State, b: State) -> Tensor:
    """Inner product of two positive semidefinite states of norm 1, in [0, 1]."""
    return _checks.within(score_inner(a, b), 0, 1)


def permute_rows(state: State, order: Tensor) -> State:
    """State of the permuted representation where the first part has a row per sample; ``order [..., n]``."""
    rows = state[0].expand(*order.shape[:-1], *state[0].shape[-2:])
    return (rows.gather(-2, order.unsqueeze(-1).expand_as(rows)), *state[1:])


def permute_both(state: State, order: Tensor) -> State:
    """State of the permuted representation where the first part is samples by samples; ``order [..., n]``."""
    rows = permute_rows(state, order)[0]
    return (rows.gather(-1, order.unsqueeze(-2).expand_as(rows)), *state[1:])


def safe_root(value: Tensor) -> Tensor:
    """Square root of values that should not be negative, with derivative 0 where they are not positive."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)
