"""Linear regression from one representation to the other, and relative representations."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.baselines.points import Points, State, compared, normalized, permute_rows
from lfm_torch.graphs.points import note_zero_rows, zero_rows
from lfm_torch.ops.knn import unit_rows

_ANCHORS = 300


def prepare_regression(points: Points) -> State:
    """Orthonormal basis of the features, and the features of Frobenius norm 1 in at most n columns."""
    return points.factors[0], normalized(points.reduced)


def score_regression(a: State, b: State) -> Tensor:
    """Share of y's variance in the span of x."""
    return _checks.within((a[0].mT @ b[1]).square().sum((-2, -1)), 0, 1)


def permute_regression(state: State, order: Tensor) -> State:
    """Both parts have a row per sample."""
    index = order.unsqueeze(-1)
    parts = [part.expand(*order.shape[:-1], *part.shape[-2:]) for part in state]
    return tuple(part.gather(-2, index.expand_as(part)) for part in parts)


def linear_regression(x: ArrayLike, y: ArrayLike, *, batched: bool = False) -> Tensor:
    """Share of the variance of y that a linear function of x explains, R^2 on these samples: ``[...]`` in [0, 1].

    Not symmetric. Any invertible linear map of x leaves it as it is; y may be rotated and scaled. It is 1 for every y
    as soon as x has as many features as samples.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite.

    Source: Kornblith et al. 2019, section 3 (with x and y exchanged).
    """
    return compared(x, y, prepare_regression, score_regression, batched=batched)


@outside_autocast
def relative_representation(x: ArrayLike, anchors: IndexLike) -> Tensor:
    """Cosine similarity of every row of ``x [..., n, d]`` to the rows numbered ``anchors [p]``: ``[..., n, p]``.

    That of a row of zeros, which has no direction, is 0.

    Raises:
        TypeError: not a floating-point tensor.
        ValueError: values that are not finite, nothing but zeros, an anchor that is no row.

    Warns:
        LFMWarning: rows of zeros, with their number.

    Source: Moschella et al. 2023 (arXiv 2209.15430), equation (2).
    """
    x = at_least_single(_checks.check_points("x", x))
    rows = _anchor_rows(anchors, x)
    x, zero = zero_rows("x", x)
    note_zero_rows("x", zero)
    unit = unit_rows(x)
    cosines: Tensor = unit @ unit[..., rows, :].mT
    return cosines


def _anchor_rows(anchors: IndexLike, x: Tensor) -> Tensor:
    rows = _checks.check_rows("anchors", anchors, x.shape[-2], x.device)
    if rows.dim() != 1 or not rows.numel():
        raise ValueError(f"anchors must be row numbers [p] of x, at least one, got shape {list(rows.shape)}")
    return rows


def prepare_relative(points: Points, *, anchors: IndexLike | None = None) -> State:
    """Relative representation of the samples that are no anchors, rows of norm 1: ``[..., n - p, p + 1]``.

    The last column is 1 for a sample that is orthogonal to all anchors, as codes may be, and 0 for the others: such
    samples are like one another, and like no other.
    """
    if points.n < 2:
        raise ValueError(f"x must have at least 2 rows, one of them an anchor, got {points.n}")
    if anchors is None:
        count = min(points.n // 2, _ANCHORS)
        anchors = torch.linspace(0, points.n - 1, count, dtype=torch.float32, device=points.x.device).round().long()
    rows = _anchor_rows(anchors, points.x)
    relative = relative_representation(points.x.double(), rows)
    # an anchor is similar to itself in every representation: it says nothing
    others = torch.ones(points.n, dtype=torch.bool, device=points.x.device).index_fill_(0, rows, False)
    if not bool(others.any()):
        raise ValueError(f"anchors must leave rows to compare, got all {points.n}")
    relative = relative[..., others, :]
    norms = relative.norm(dim=-1, keepdim=True)
    # up to the rounding of the given values: what remains of exact zeros under a rotation has no direction
    orthogonal = norms <= 8 * torch.finfo(points.x.dtype).eps * relative.shape[-1] ** 0.5
    relative = torch.where(orthogonal, 0.0, relative / torch.where(orthogonal, 1.0, norms))
    return (torch.cat([relative, orthogonal.to(relative.dtype)], -1),)


def permute_relative(state: State, order: Tensor) -> State:
    """State with the samples that are no anchors in another order; the anchors keep their partners."""
    return permute_rows(state, order[..., : state[0].shape[-2]].argsort(-1))


def score_relative(a: State, b: State) -> Tensor:
    """Mean cosine between the rows."""
    return _checks.within((a[0] * b[0]).sum(-1).mean(-1), -1, 1)


def relative_similarity(
    x: ArrayLike, y: ArrayLike, *, anchors: IndexLike | None = None, batched: bool = False
) -> Tensor:
    """Mean cosine between the relative representations of the samples that are no anchors: ``[...]`` in [-1, 1].

    Features that are all positive have cosines that are all positive, so unrelated layers come close to 1: read it
    against its chance level. Invariant to rotations and isotropic scaling. A sample orthogonal to all anchors counts 1
    where it is so in both spaces, and 0 where it is in one.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        anchors: Row numbers ``[p]`` of the anchors; None spreads 300, or half of the rows, evenly over them.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite, a row of zeros.

    Source: Moschella et al. 2023 (arXiv 2209.15430), section 3.
    """
    return compared(x, y, lambda points: prepare_relative(points, anchors=anchors), score_relative, batched=batched)
