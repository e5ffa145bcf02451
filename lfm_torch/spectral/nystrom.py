"""Eigenvectors at points that were not in the graph: the Nyström extension."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.graphs.graph import Graph
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import directed_weights

# 1 - lambda divides: what has to come out of it would be noise
_LEAST = 1e-3


def extend_eigenvectors(evals: Tensor, evecs: Tensor, x_new: ArrayLike, *, x: ArrayLike, graph: Graph) -> Tensor:
    """Values at new points ``[..., q, m]`` of eigenvectors ``[..., n, m]``; see :meth:`Basis.extend`."""
    x, x_new = _checks.check_points("x", x), _checks.check_points("x_new", x_new)
    _checks.check_same_device_dtype("x", x, "x_new", x_new)
    if x.shape[:-1] != evecs.shape[:-1]:
        raise ValueError(f"x must have the {list(evecs.shape[:-1])} points of the basis, got {list(x.shape)}")
    if (*graph.batch_shape, graph.n_nodes) != tuple(x.shape[:-1]):
        raise ValueError(f"graph must be that of x, with {list(x.shape[:-1])} nodes, got {graph!r}")
    if graph.weights in ("unknown", "self_tuning"):
        raise ValueError(
            "graph must come from build_graph with weights of the distance to a point's own neighbors, got "
            f"weights={graph.weights!r}"
        )
    largest = float(evals.detach().max())
    if largest > 1 - _LEAST:
        raise ValueError(
            f"basis must have eigenvalues below {1 - _LEAST} to be extended (1 - lambda divides), got {largest:.4g}; "
            "truncate it"
        )
    *batch, _, m = evecs.shape
    indices, distances = knn(x_new, x, n_neighbors=graph.n_neighbors, metric=cast(Metric, graph.metric))
    weight = directed_weights(distances, indices, graph.weights)
    picked = indices.flatten(-2)
    degree = graph.degree.gather(-1, picked).view_as(weight)
    # a node without edges has none to a new point either; roots one by one: their product may overflow
    connected = degree > 0
    share = weight / weight.sum(-1, keepdim=True).sqrt() / torch.where(connected, degree, 1.0).sqrt() * connected
    values = evecs.gather(-2, picked.unsqueeze(-1).expand(*batch, picked.shape[-1], m))
    sums: Tensor = (share.unsqueeze(-1) * values.view(*weight.shape, m)).sum(-2)
    return sums / (1 - evals).unsqueeze(-2)
