"""Orthogonal Procrustes: how far two representations are apart after the best rotation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.baselines.points import Points, State, compared, normalized, safe_root

KINDS = ("distance", "angular")


def prepare_procrustes(points: Points) -> State:
    """Centred features of Frobenius norm 1, in at most n columns."""
    return (normalized(points.reduced),)


def _nuclear_norm(a: State, b: State) -> Tensor:
    values: Tensor = torch.linalg.svdvals(b[0].mT @ a[0])
    return values.sum(-1)


def score_distance(a: State, b: State) -> Tensor:
    """Frobenius distance after the best rotation."""
    own = a[0].square().sum((-2, -1)) + b[0].square().sum((-2, -1))
    return _checks.within(safe_root(own - 2 * _nuclear_norm(a, b)), 0, 2**0.5)


def score_angular(a: State, b: State) -> Tensor:
    """Angle after the best rotation."""
    cosine = _nuclear_norm(a, b)
    # arccos has no derivative at 1, where the angle is 0 and at its minimum
    inside = cosine < 1 - 1e-15
    return torch.where(inside, torch.where(inside, cosine, 0.0).acos(), 0.0)


def procrustes(
    x: ArrayLike, y: ArrayLike, *, kind: Literal["distance", "angular"] = "distance", batched: bool = False
) -> Tensor:
    """Distance between two representations, centred and of norm 1, after the best rotation: a metric.

    With N the nuclear norm of ``Y^T X``: "distance" is ``sqrt(2 - 2 N)`` in [0, sqrt 2], "angular" is ``arccos N`` in
    [0, pi / 2]. Invariant to translations, rotations and isotropic scaling; a narrower representation is padded with
    zeros.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        kind: Which of the two.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Returns:
        ``[...]`` in the dtype of ``x``.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite, an unknown kind.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> bool(procrustes(x, 3 * x.flip(1) + 1) < 1e-3)
        True

    Source: Williams et al. 2021 (arXiv 2110.14739), equations (4) and (7); Ding et al. 2021 (arXiv 2108.01661).
    """
    _checks.check_choice("kind", kind, KINDS)
    return compared(x, y, prepare_procrustes, score_distance if kind == "distance" else score_angular, batched=batched)
