"""Representational similarity analysis: correlation of dissimilarity matrices."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.baselines.points import Points, State, compared, normalized, safe_root, score_inner

DISSIMILARITIES = ("euclidean", "correlation")
COMPARISONS = ("spearman", "pearson")


def prepare_rsa(points: Points, *, dissimilarity: str = "euclidean", comparison: str = "spearman") -> State:
    """Dissimilarities between samples ``[..., n, n]``, centred over pairs, of norm 1, zero on the diagonal."""
    if points.n < 3:
        raise ValueError(f"x must have at least 3 rows to compare dissimilarities, got {points.n}")
    table = safe_root(points.squared_distances) if dissimilarity == "euclidean" else _one_minus_correlation(points)
    upper = torch.triu_indices(points.n, points.n, 1, device=table.device)
    values = table[..., upper[0], upper[1]]
    if comparison == "spearman":
        values = _ranks(values)
    values = values - values.mean(-1, keepdim=True)
    table = torch.zeros_like(table)
    table[..., upper[0], upper[1]] = values
    return (normalized(table + table.mT),)


def rsa(
    x: ArrayLike,
    y: ArrayLike,
    *,
    dissimilarity: Literal["euclidean", "correlation"] = "euclidean",
    comparison: Literal["spearman", "pearson"] = "spearman",
    batched: bool = False,
) -> Tensor:
    """Correlation between the dissimilarities of all pairs of samples in two representations: ``[...]`` in [-1, 1].

    With euclidean dissimilarities invariant to translations, rotations and isotropic scaling. Memory is ``n x n`` in
    float64. Differentiable with ``comparison="pearson"`` (ranks have no derivative).

    Args:
        x: ``[n, d_x]`` with at least 3 rows.
        y: ``[n, d_y]``.
        dissimilarity: "euclidean" distance, or 1 - "correlation" over features.
        comparison: "spearman" (of ranks, ties sharing their mean) or "pearson".
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: too few or different numbers of rows, values that are not finite, rows without variance under
            "correlation".

    Source: Kriegeskorte et al. 2008.
    """
    _checks.check_choice("dissimilarity", dissimilarity, DISSIMILARITIES)
    _checks.check_choice("comparison", comparison, COMPARISONS)
    prepare = functools.partial(prepare_rsa, dissimilarity=dissimilarity, comparison=comparison)
    return compared(x, y, prepare, score_inner, batched=batched)


def _one_minus_correlation(points: Points) -> Tensor:
    x = points.x.double()
    x = x - x.mean(-1, keepdim=True)
    norms = x.norm(dim=-1, keepdim=True)
    if bool((norms == 0).any()):
        row = int((norms == 0).nonzero()[0][-2])
        raise ValueError(f"x must have rows that vary for a correlation over features, got constant row {row}")
    x = x / norms
    correlation: Tensor = x @ x.mT
    return 1 - correlation


def _ranks(values: Tensor) -> Tensor:
    """Ranks along the last dimension, ties sharing the mean of theirs."""
    # distances equal up to rounding are ties: neither their order nor that of a rotated copy means anything
    rounded = (values.detach() / values.detach().amax(-1, keepdim=True).clamp_min(1e-300) * 2**40).round()
    ordered, order = rounded.sort(-1)
    places = torch.arange(rounded.shape[-1], device=values.device).expand_as(ordered)
    ends = torch.nn.functional.pad(ordered[..., 1:] != ordered[..., :-1], (1, 1), value=True)
    first = torch.where(ends[..., :-1], places, 0).cummax(-1).values
    last = torch.where(ends[..., 1:], places, places.shape[-1]).flip(-1).cummin(-1).values.flip(-1)
    return torch.zeros_like(values).scatter_(-1, order, (first + last).to(values.dtype) / 2)
