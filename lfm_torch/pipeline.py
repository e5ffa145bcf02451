"""The flow of the library, composed: read this file first.

representation ``[..., n, d]`` -> graph -> basis -> functional map -> readings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from lfm_torch import _checks
from lfm_torch.baselines import linear_cka
from lfm_torch.basis import Basis, spectral_basis
from lfm_torch.functional_map import FunctionalMap, paired_map
from lfm_torch.graph import Weights, build_graph
from lfm_torch.neighbors import Metric
from lfm_torch.similarity import heat_overlap, lfm_similarity, subspace_overlap

MAP_MEASURES: dict[str, Callable[[FunctionalMap], Tensor]] = {
    "lfm": lfm_similarity,
    "overlap": subspace_overlap,
    "heat": heat_overlap,
}
POINT_MEASURES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"linear_cka": linear_cka}
MEASURES = (*MAP_MEASURES, *POINT_MEASURES)


def check_measures(measures: Sequence[str]) -> None:
    """Raise ValueError unless ``measures`` are names of measures, at least one."""
    if isinstance(measures, str):
        raise ValueError(f"measures must be a sequence of names, got the string {measures!r}; write [{measures!r}]")
    if not measures:
        raise ValueError("measures must name at least one measure, got none")
    for name in measures:
        _checks.check_choice("measures", name, MEASURES)


def representation_basis(
    x: Tensor,
    *,
    n_neighbors: int | None = None,
    n_basis: int = 50,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
) -> Basis:
    """Graph and basis of a representation ``x [..., n, d]``: what every comparison needs once per representation.

    Raises:
        ValueError: rows that are all equal, and what :func:`build_graph` and :func:`spectral_basis` refuse.
    """
    # their neighbours would be arbitrary: numbers would come out, about nothing
    if bool((x == x[..., :1, :]).all(-1).all(-1).any()):
        raise ValueError("x must have rows that differ, got equal ones throughout (a collapsed representation)")
    graph = build_graph(x, n_neighbors=n_neighbors, metric=metric, weights=weights)
    return spectral_basis(graph, n_basis=n_basis)


def similarity(
    x: Tensor,
    y: Tensor,
    *,
    measures: Sequence[str] = ("lfm", "overlap", "heat"),
    n_neighbors: int | None = None,
    n_basis: int = 50,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
) -> dict[str, Tensor]:
    """Compare two representations of the same samples.

    Args:
        x: ``[..., n, d_x]``; row i of ``x`` and row i of ``y`` come from the same input.
        y: ``[..., n, d_y]`` with the batch dimensions of ``x``.
        measures: Names among "lfm" (squared), "overlap", "heat" and "linear_cka".
        n_neighbors: Neighbours in the graphs; None takes 15% of the samples, at most 300.
        n_basis: Eigenvectors per space, less than n.
        metric: Metric of the graphs, see :func:`knn`.
        weights: Edge weights, see :func:`build_graph`.

    Returns:
        The measures by name, each ``[...]``.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: shapes or devices that do not pair, an unknown measure, values that are not finite, and what
            :func:`build_graph` and :func:`spectral_basis` refuse.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
        >>> scores = lfm.similarity(x, x @ rotation, n_basis=10)
        >>> {name: round(float(value), 3) for name, value in scores.items()}
        {'lfm': 1.0, 'overlap': 1.0, 'heat': 1.0}
    """
    check_measures(measures)
    x, y = _checks.check_points("x", x), _checks.check_points("y", y)
    _checks.check_same_device_dtype("x", x, "y", y)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"y must have the rows of x, shape {[*x.shape[:-1], 'd']} (row i of both from the same input), "
            f"got {list(y.shape)}"
        )
    scores: dict[str, Tensor] = {}
    if any(name in MAP_MEASURES for name in measures):
        bases = [
            representation_basis(points, n_neighbors=n_neighbors, n_basis=n_basis, metric=metric, weights=weights)
            for points in (x, y)
        ]
        fmap = paired_map(bases[0], bases[1])
        scores = {name: MAP_MEASURES[name](fmap) for name in measures if name in MAP_MEASURES}
    points_scores = {name: POINT_MEASURES[name](x, y) for name in measures if name in POINT_MEASURES}
    return {name: (scores | points_scores)[name] for name in measures}
