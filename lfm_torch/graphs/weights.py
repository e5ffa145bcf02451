"""Weights of directed edges from the distances of points to their neighbours."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

if TYPE_CHECKING:
    pass


Weights = Literal["gaussian", "self_tuning", "binary", "inverse_distance", "distance"]


WEIGHTS = ("gaussian", "self_tuning", "binary", "inverse_distance", "distance")


# self_tuning: the scale of a point is the distance to this neighbour (Zelnik-Manor & Perona 2004 use the seventh)
_SELF_TUNING_NEIGHBOR = 7


def directed_weights(distances: Tensor, indices: Tensor, weights: str) -> Tensor:
    """Weights of the edges from points to their neighbours, ``[..., n, k]``: the formulas of :func:`build_graph`."""
    last = distances[..., -1:]
    if weights == "gaussian":
        # where all neighbours coincide with the point every d is 0: the limit of the kernel for equal points is 1
        scale = torch.where(last > 0, last, 1.0)
        shares = distances / scale
        if not shares.requires_grad:  # in place: a large array less for every step
            return shares.square_().mul_(-4).exp_()
        return shares.square().mul(-4).exp()
    if weights == "self_tuning":
        scale = distances[..., min(_SELF_TUNING_NEIGHBOR, distances.shape[-1]) - 1]
        other = scale.gather(1, indices.flatten(1)).view_as(distances)
        positive = (scale.unsqueeze(-1) > 0) & (other > 0)
        # quotients, not a product of scales, which may vanish or overflow
        own, other = (torch.where(positive, part, 1.0) for part in (scale.unsqueeze(-1), other))
        return torch.where(positive, (-(distances / own) * (distances / other)).exp(), (distances == 0).to(distances))
    if weights == "binary":
        return torch.ones_like(distances)
    if weights == "inverse_distance":
        # never so small that the sum of the inverses overflows
        least = torch.finfo(distances.dtype).max ** -0.75
        floor = torch.where(last > 0, (1e-6 * last).clamp_min(least), 1.0)
        # by way of a scale: the derivative of a quotient near 1 has no square that overflows
        scale = torch.where(last > 0, last, 1.0).detach()
        return scale / torch.maximum(distances, floor) / scale
    return distances
