"""Translators: affine maps that carry representations from one space to another, fitted on corresponding rows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, matmul, outside_autocast

TranslatorKind = Literal["orthogonal", "linear", "affine", "ridge"]
KINDS = ("orthogonal", "linear", "affine", "ridge")

_ROBUST_ROUNDS = 10


@dataclass(frozen=True, repr=False, eq=False)
class Translator:
    """The map ``x -> (x - origin_x) matrix + origin_y``, from representations in x's space to y's.

    Attributes:
        matrix: ``[..., d_x, d_y]``.
        origin_x: ``[..., d_x]``.
        origin_y: ``[..., d_y]``.
        kind: how it was fitted.
        n_pairs: number of pairs it was fitted on.
    """

    matrix: Tensor
    origin_x: Tensor
    origin_y: Tensor
    kind: str
    n_pairs: int

    def __repr__(self) -> str:
        d_x, d_y = self.matrix.shape[-2:]
        return f"Translator({self.kind}, {d_x} -> {d_y}, from {self.n_pairs} pairs, {self.matrix.dtype})"

    @outside_autocast
    def __call__(self, x: ArrayLike) -> Tensor:
        """Carry ``x [..., n, d_x]`` to y's space, ``[..., n, d_y]``."""
        x = _checks.as_tensor("x", x)
        if x.shape[-1] != self.matrix.shape[-2]:
            raise ValueError(f"x must have {self.matrix.shape[-2]} features, got shape {list(x.shape)}")
        x, own = at_least_single(x), at_least_single(self)
        return matmul(x - own.origin_x.unsqueeze(-2), own.matrix) + own.origin_y.unsqueeze(-2)

    @outside_autocast
    def inverse(self) -> Translator:
        """The translator from y's space to x's.

        Raises:
            ValueError: different numbers of features, or a matrix that is singular.
        """
        d_x, d_y = self.matrix.shape[-2:]
        if d_x != d_y:
            raise ValueError(f"matrix must be square to be inverted, got {d_x} -> {d_y}; fit the other direction")
        own = at_least_single(self)
        values = torch.linalg.svdvals(own.matrix.detach())
        if bool((values[..., -1] <= d_x * torch.finfo(values.dtype).eps * values[..., 0]).any()):
            raise ValueError(f"matrix must have full rank to be inverted, got smallest singular value {values.min():g}")
        return replace(own, matrix=torch.linalg.inv(own.matrix), origin_x=own.origin_y, origin_y=own.origin_x)

    def to(self, target: torch.device | torch.dtype | str) -> Translator:
        """Move to a device (a str names one), or cast to a dtype."""
        moved = {name: getattr(self, name).to(target) for name in ("matrix", "origin_x", "origin_y")}
        return replace(self, **moved)

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _files.save_record(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Translator:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return _files.load_record(path, cls)


@outside_autocast
def fit_translator(
    x: ArrayLike,
    y: ArrayLike,
    *,
    pairs: IndexLike | None = None,
    kind: TranslatorKind = "orthogonal",
    weights: ArrayLike | None = None,
    robust: bool = False,
    ridge: float = 1e-2,
) -> Translator:
    """Fit a map from x's space to y's on corresponding rows.

    - "orthogonal": rotation or reflection with one scale, about the means: ``min |s (x - mean) Q - (y - mean)|``
      (orthogonal Procrustes; where d_x and d_y differ, Q is a partial isometry);
    - "linear": least squares through the origin; "affine": least squares about the means;
    - "ridge": affine with the penalty ``ridge * mean variance of x`` on the matrix.

    With fewer pairs than features the least squares solution of smallest norm is taken.

    Args:
        x: ``[..., n_x, d_x]``.
        y: ``[..., n_y, d_y]``.
        pairs: ``[p, 2]`` (row of x, row of y); None: row i of both belong together.
        kind: Kind of map.
        weights: ``[p]`` non-negative weights of the pairs.
        robust: Reweight the pairs by their residual (Geman-McClure, scale from the median), so that wrong pairs lose
            their say: ten rounds.
        ridge: Penalty of kind "ridge".

    Raises:
        TypeError: not floating-point tensors, different dtypes, pairs that are not integers.
        ValueError: shapes that do not pair, pairs or weights out of range, values that are not finite, no pair.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x, rotation = torch.randn(50, 3), torch.linalg.qr(torch.randn(3, 3)).Q
        >>> translator = lfm.fit_translator(x, 2 * x @ rotation + 1)
        >>> torch.allclose(translator(x), 2 * x @ rotation + 1, atol=1e-5)
        True

    Source: Schönemann 1966 (orthogonal); translators on correspondences of a latent functional map: Fumero et al. 2024
    (arXiv 2406.14183), section 4.3.
    """
    _checks.check_choice("kind", kind, KINDS)
    x, y = _checks.check_points("x", x), _checks.check_points("y", y)
    _checks.check_same_device_dtype("x", x, "y", y)
    x, y = at_least_single(x), at_least_single(y)
    if ridge < 0:
        raise ValueError(f"ridge must not be negative, got {ridge}")
    x, y = paired_rows(x, y, pairs)
    p = x.shape[-2]
    weight = x.new_ones(p) if weights is None else _checks.as_tensor("weights", weights).to(x)
    if weight.shape != (p,) or not bool((weight >= 0).all()) or not bool(weight.sum() > 0):
        raise ValueError(f"weights must be {p} non-negative numbers, not all zero, got shape {list(weight.shape)}")
    fitted = _fit(x, y, weight, kind, ridge)
    for _ in range(_ROBUST_ROUNDS if robust else 0):
        residual = (fitted(x) - y).square().sum(-1).detach()
        scale = residual.median(-1, keepdim=True).values.clamp_min(torch.finfo(x.dtype).tiny)
        fitted = _fit(x, y, weight / (1 + residual / (4 * scale)).square(), kind, ridge)
    return fitted


def paired_rows(x: Tensor, y: Tensor, pairs: IndexLike | None) -> tuple[Tensor, Tensor]:
    """The corresponding rows of both, ``[..., p, d]``; checks ``pairs``."""
    if pairs is None:
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"y must have the rows of x, {x.shape[-2]}, or pairs be given, got {list(y.shape)}")
        return x, y
    known = row_pairs("pairs", pairs, x, y)
    return x[..., known[:, 0], :], y[..., known[:, 1], :]


def row_pairs(name: str, pairs: IndexLike, x: Tensor, y: Tensor) -> Tensor:
    """Return pairs ``[p, 2]`` of (row of x, row of y), on their device.

    Raises:
        TypeError: not integers.
        ValueError: another shape, no pair, out of range.
    """
    found = _checks.as_integers(name, pairs, x.device)
    if found.dim() != 2 or found.shape[-1] != 2 or len(found) == 0:
        raise ValueError(f"{name} must be [p, 2] (row of x, row of y), p at least 1, got {list(found.shape)}")
    _checks.check_rows(f"{name}[:, 0]", found[:, 0], x.shape[-2], x.device)
    _checks.check_rows(f"{name}[:, 1]", found[:, 1], y.shape[-2], x.device)
    return found


def _fit(x: Tensor, y: Tensor, weight: Tensor, kind: str, ridge: float) -> Translator:
    root, p = weight.sqrt().unsqueeze(-1), x.shape[-2]
    share = weight / weight.sum(-1, keepdim=True)
    origin_x, origin_y = ((share.unsqueeze(-2) @ z).squeeze(-2) for z in (x, y))
    if kind == "linear":
        origin_x, origin_y = torch.zeros_like(origin_x), torch.zeros_like(origin_y)
    a, b = ((z - origin.unsqueeze(-2)) * root for z, origin in ((x, origin_x), (y, origin_y)))
    if kind == "orthogonal":
        u, values, vh = torch.linalg.svd(a.mT @ b, full_matrices=False)
        matrix = u @ vh
        spread = (a @ u).square().sum((-2, -1))  # of the part of x that the isometry keeps
        scale = values.sum(-1) / torch.where(spread > 0, spread, 1.0)
        matrix = torch.where(scale > 0, scale, 1.0)[..., None, None] * matrix
    elif kind == "ridge":
        gram = a.mT @ a
        strength = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(gram.shape[-1], dtype=x.dtype, device=x.device)
        matrix = torch.linalg.solve(gram + strength[..., None, None] * eye, a.mT @ b)
    else:
        matrix = torch.linalg.pinv(a) @ b
    return Translator(matrix, origin_x, origin_y, kind, p)
