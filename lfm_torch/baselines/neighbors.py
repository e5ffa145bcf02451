"""Mutual nearest neighbours: how many of a sample's neighbours it keeps from one representation to another."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.baselines.points import Points, State, compared
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.points import Metric
from lfm_torch.ops.knn import METRICS


def prepare_neighbors(points: Points, *, n_neighbors: int = 10, metric: Metric = "cosine") -> State:
    """Indices of the neighbours, ``[..., n, k]``."""
    k = min(n_neighbors, points.n - 1)
    return (knn(points.x.detach(), n_neighbors=k, metric=metric).indices,)


def score_neighbors(a: State, b: State) -> Tensor:
    """Mean share of common neighbours."""
    x, y = a[0] + torch.zeros_like(b[0]), b[0] + torch.zeros_like(a[0])  # broadcast over the batch
    # both lists are without repeats, so a number that comes twice in a row is common
    ordered = torch.cat([x, y], -1).sort(-1).values
    common = (ordered[..., 1:] == ordered[..., :-1]).sum((-2, -1))
    share: Tensor = common.double() / (x.shape[-1] * x.shape[-2])
    return share


def permute_neighbors(state: State, order: Tensor) -> State:
    """Lists of the permuted representation: other rows, and other numbers for the same samples."""
    indices = state[0].expand(*order.shape[:-1], *state[0].shape[-2:])
    rows = indices.gather(-2, order.unsqueeze(-1).expand_as(indices))
    place = order.argsort(-1)
    return (place.gather(-1, rows.flatten(-2).long()).view_as(rows),)


def mutual_knn(
    x: ArrayLike, y: ArrayLike, *, n_neighbors: int = 10, metric: Metric = "cosine", batched: bool = False
) -> Tensor:
    """Mean share of each sample's nearest neighbours that two representations have in common: ``[...]`` in [0, 1].

    About ``n_neighbors / n`` for unrelated representations. With the cosine metric invariant to rotations and isotropic
    scaling. Not differentiable.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        n_neighbors: Neighbours of each sample; at most ``n - 1`` are there.
        metric: See :func:`lfm_torch.knn`.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite, and what :func:`lfm_torch.knn` refuses.

    Source: Huh et al. 2024 (arXiv 2405.07987), appendix A.
    """
    _checks.check_choice("metric", metric, METRICS)
    _checks.check_range("n_neighbors", n_neighbors, 1, 2**31 - 1, "of each sample")
    return compared(
        x,
        y,
        functools.partial(prepare_neighbors, n_neighbors=n_neighbors, metric=metric),
        score_neighbors,
        batched=batched,
    )
