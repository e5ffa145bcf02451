"""The flow of the library, composed: read this file first.

representation ``[..., n, d]`` -> graph -> basis -> functional map -> readings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import about, note, said_once
from lfm_torch.baselines.points import Points, State
from lfm_torch.graphs.graph import Graph, build_graph
from lfm_torch.graphs.points import ANGULAR, Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.maps.fmap import FunctionalMap, paired_map
from lfm_torch.measures.distortion import Distortion, map_distortion
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import DEFAULT_MEASURES, MAP_MEASURES, POINT_MEASURES, PointMeasure, check_measures
from lfm_torch.representations.nonfinite import Nonfinite, check_nonfinite, finite_pair
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.compute import spectral_basis

# Layers of CIFAR-10 networks, ReLU and pooled, have a mean of .6 to 2.5 times the spread, word vectors of .5, pixels of
# .8 to 1.9; only beyond is an offset likely that means nothing. It is told from a sample of the rows.
_FAR = 4
_ROWS = 512


@outside_autocast
def representation_basis(
    x: ArrayLike,
    *,
    n_neighbors: int | None = None,
    n_basis: int | None = None,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    tol: float | None = None,
    warm_start: Basis | None = None,
) -> Basis:
    """Graph and basis of a representation ``x [..., n, d]``: what every comparison needs once per representation.

    ``tol`` and ``warm_start``, the basis of a similar representation of the same samples, are :func:`spectral_basis`'s.

    Raises:
        ValueError: rows that are all equal, and what :func:`build_graph` and :func:`spectral_basis` refuse.
    """
    x = _checks.as_tensor("x", x)
    graph = representation_graph(x, n_neighbors=n_neighbors, metric=metric, weights=weights)
    return spectral_basis(graph, n_basis=n_basis, tol=tol, warm_start=warm_start)


def representation_graph(
    x: Tensor, *, n_neighbors: int | None = None, metric: Metric = "angular", weights: Weights = "gaussian"
) -> Graph:
    """The first half of :func:`representation_basis`."""
    if not _checks.has_values(x):
        return build_graph(x, n_neighbors=n_neighbors, metric=metric, weights=weights)
    # neighbours of equal rows would be arbitrary: numbers would come out, about nothing
    collapsed = (x == x[..., :1, :]).all(-1).all(-1).any()
    far = _is_far_from_origin(x) if metric in ANGULAR and x.numel() else torch.zeros_like(collapsed)
    is_collapsed, is_far = torch.stack([collapsed, far]).tolist()
    if is_collapsed:
        raise ValueError("x must have rows that differ, got equal ones throughout (a collapsed representation)")
    if is_far:
        note(
            f"the mean of the rows is more than {_FAR} times their spread around it, and angles see little but the "
            "mean: centre the rows (x - x.mean(0)), or take metric='euclidean', which no offset changes"
        )
    return build_graph(x, n_neighbors=n_neighbors, metric=metric, weights=weights)


def _is_far_from_origin(x: Tensor) -> Tensor:
    """Whether the mean row of a set is longer than ``_FAR`` times the root mean square distance of rows from it."""
    step = max(1, x.shape[-2] // _ROWS)
    rows = x.detach()[..., ::step, :]
    # over the largest, squares are numbers at any scale
    rows = (rows / rows.abs().amax((-2, -1), keepdim=True)).float()
    mean = rows.mean(-2).square().sum(-1)
    # by all of |x|^2 = mean^2 + spread^2: nothing is subtracted, so nothing cancels
    return ((_FAR**2 + 1) * mean > _FAR**2 * rows.square().sum(-1).mean(-1)).any()


def check_pair(
    x: object, y: object, *, batched: bool | None = None, nonfinite: Nonfinite = "raise"
) -> tuple[Tensor, Tensor]:
    """Return ``x [n, d_x]`` and ``y [n, d_y]``, or raise unless they are representations of the same samples.

    With ``batched`` they may have leading dimensions; None is for callers that take no batch.
    """
    check_nonfinite(nonfinite, batched=batched)
    if nonfinite == "drop":
        x, y = finite_pair(x, y)
    x, y = _checks.check_space("x", x, batched=batched), _checks.check_space("y", y, batched=batched)
    _checks.check_same_device_dtype("x", x, "y", y)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            f"y must have the rows of x, shape {[*x.shape[:-1], 'd']} (row i of both from the same input), "
            f"got {list(y.shape)}"
        )
    return x, y


def bases_of_pair(x: Tensor, y: Tensor, **settings: Any) -> tuple[Basis, Basis]:
    """:func:`representation_basis` of both; what is to be said of one is said under its name."""
    _checks.check_enough("x", x.shape[-2])
    with about("x"):
        basis_x = representation_basis(x, **settings)
    with about("y"):
        basis_y = representation_basis(y, **settings)
    return basis_x, basis_y


def states_of_pair(measure: PointMeasure, x: Points, y: Points) -> tuple[State, State]:
    """What the measure needs of both, said of as in :func:`bases_of_pair`."""
    with about("x"):
        state_x = measure.prepare(x)
    with about("y"):
        state_y = measure.prepare(y)
    return state_x, state_y


@said_once
@outside_autocast
def similarity(
    x: ArrayLike,
    y: ArrayLike,
    *,
    measures: str | Sequence[str] = DEFAULT_MEASURES,
    n_neighbors: int | None = None,
    n_basis: int | None = None,
    metric: Metric = "angular",
    weights: Weights = "gaussian",
    batched: bool = False,
    nonfinite: Nonfinite = "raise",
) -> dict[str, Tensor]:
    """Compare two representations of the same samples, tensors or arrays of NumPy.

    Args:
        x: ``[n, d_x]``; row i of ``x`` and row i of ``y`` come from the same input. Feature maps and tokens are to be
            flattened (``x.flatten(1)``) or pooled (``x.mean((2, 3))``, ``x.mean(1)``).
        y: ``[n, d_y]``.
        measures: One name or several; :data:`lfm_torch.measures.MEASURES` describes them all. "cka" and "cca" are short
            for "linear_cka" and "mean_cca", the names that the results bear.
        n_neighbors: Neighbours in the graphs; None takes 15% of the samples, at most 300.
        n_basis: Eigenvectors per space, less than n; None takes a quarter of the samples, at most 50.
        metric: Metric of the graphs, see :func:`knn`.
        weights: Edge weights, see :func:`build_graph`.
        batched: Compare many pairs at once, ``x [..., n, d_x]`` and ``y [..., n, d_y]`` with the same leading
            dimensions, each entry for itself.
        nonfinite: "drop" leaves samples with a NaN or an infinity out of both, and says how many; a side that has
            lost more than half of its samples is an error, as "raise" makes of any.

    Returns:
        The measures by name, each a scalar, or ``[...]`` where ``batched``.

    Raises:
        TypeError: not floating-point tensors, or different dtypes.
        ValueError: shapes or devices that do not pair, an unknown measure, values that are not finite, and what
            :func:`build_graph` and :func:`spectral_basis` refuse.

    Warns:
        LFMWarning: samples that are left out; rows of zeros, which have no angle (see :func:`knn`); an offset that all
            rows share and that dwarfs their differences, where ``metric`` goes by angles from the origin.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(200, 8, generator=torch.Generator().manual_seed(0))
        >>> rotation = torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(1))).Q
        >>> scores = lfm.similarity(x, x @ rotation, n_basis=10)
        >>> {name: round(float(value), 3) for name, value in scores.items()}
        {'lfm': 1.0, 'overlap': 1.0, 'heat': 1.0}
    """
    measures = check_measures(measures)
    x, y = check_pair(x, y, batched=batched, nonfinite=nonfinite)
    scores: dict[str, Tensor] = {}
    if any(name in MAP_MEASURES for name in measures):
        maps = Maps.of(
            paired_map(*bases_of_pair(x, y, n_neighbors=n_neighbors, n_basis=n_basis, metric=metric, weights=weights))
        )
        scores = {
            name: MAP_MEASURES[name].read(maps).reshape(x.shape[:-2]) for name in measures if name in MAP_MEASURES
        }
    parts = Points(x), Points(y)
    for name in measures:
        if name in POINT_MEASURES:
            measure = POINT_MEASURES[name]
            scores[name] = measure.score(*states_of_pair(measure, *parts)).to(parts[0].dtype)
    return {name: scores[name] for name in measures}


@overload
def distortion(x: ArrayLike, y: ArrayLike, **settings: Any) -> Distortion: ...
@overload
def distortion(x: FunctionalMap, y: Basis) -> Distortion: ...
@outside_autocast
def distortion(x: ArrayLike | FunctionalMap, y: ArrayLike | Basis, **settings: Any) -> Distortion:
    """Distortion of each sample of y: the share of the functions around it that does not arrive from x.

    ``distortion(x, y)`` builds graphs, bases and the map of two representations of the same samples, as
    :func:`similarity` does; ``distortion(fmap, basis_y)`` takes what is there. The formula is that of
    :func:`lfm_torch.measures.map_distortion`.

    Args:
        x: ``[n, d_x]``, or a map from x to y, ``C [..., m_y, m_x]``.
        y: ``[n, d_y]``, row i from the input of row i of ``x``; beside a map the basis of y, ``evecs [..., n, m_y]``.
        settings: ``n_neighbors``, ``n_basis``, ``metric`` and ``weights`` of :func:`similarity`, for points.

    Returns:
        Distortion, a value in [0, 1] per row of y.

    Raises:
        TypeError: neither two tensors nor a map and a basis; settings beside a map, which is made already.
        ValueError: what :func:`similarity` refuses, batch dimensions, or a basis of another size than the map.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> found = lfm.distortion(x, x @ x.mT, n_basis=10)
        >>> found.per_sample.shape, bool(found.per_sample.max() <= 1)
        (torch.Size([100]), True)
    """
    if isinstance(x, FunctionalMap) and isinstance(y, Basis):
        if settings:
            raise TypeError(f"settings must be left out beside a map, which is made already, got {', '.join(settings)}")
        return map_distortion(x, y)
    if not (isinstance(x, (Tensor, np.ndarray)) and isinstance(y, (Tensor, np.ndarray))):
        got = f"{type(x).__name__} and {type(y).__name__}"
        raise TypeError(f"x and y must be two representations, or a FunctionalMap and the Basis of y, got {got}")
    basis_x, basis_y = bases_of_pair(*check_pair(x, y), **settings)
    return map_distortion(paired_map(basis_x, basis_y), basis_y)
