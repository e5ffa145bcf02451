"""Functions of known rows: distances to anchors, straight or along the graph, class indicators; landmarks to take."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.graphs.graph import build_graph
from lfm_torch.graphs.points import Metric, note_zero_rows, power_into_range, zero_rows
from lfm_torch.ops.knn import unit_rows
from lfm_torch.spectral.basis import Basis


@outside_autocast
def anchor_distances(x: ArrayLike, anchors: IndexLike, *, metric: Metric = "angular", kernel: bool = False) -> Tensor:
    """Distances of all points to the anchors, ``[..., n, p]``; ``kernel=True``: ``exp(-d^2)``.

    Args:
        x: ``[..., n, d]``.
        anchors: ``[p]`` indices of rows.
        metric: "euclidean", "cosine" or "angular".
        kernel: Return ``exp(-d^2)``, which sees the neighbourhood of the anchor only.

    Raises:
        TypeError, ValueError: not points, anchors out of range, "inner_product" (it is no distance).

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3.2.
    """
    _checks.check_choice("metric", metric, ("euclidean", "cosine", "angular"))
    x, power, zero = _comparable(x, metric)
    note_zero_rows("x", zero)
    anchors = anchor_rows(anchors, x.shape[-2], x.device)
    # by differences: the expansion in squares loses small distances, and the distance of an anchor to itself is 0
    distance = torch.cdist(x, x[..., anchors, :], compute_mode="donot_use_mm_for_euclid_dist")
    if zero is not None:  # orthogonal to all other rows
        others = torch.arange(x.shape[-2], device=x.device).unsqueeze(-1) != anchors
        distance = torch.where((zero.unsqueeze(-1) | zero[..., None, anchors]) & others, math.sqrt(2), distance)
    distance = distance.square() / 2 if metric == "cosine" else distance * power
    return (-distance.square()).exp() if kernel else distance


@outside_autocast
def geodesic_distances(
    x: ArrayLike, anchors: IndexLike, *, n_neighbors: int | None = None, metric: Metric = "angular"
) -> Tensor:
    """Lengths of the shortest paths to the anchors along the edges of the neighbour graph, ``[..., n, p]``.

    An edge is as long as the distance of its ends. Points in another component than the anchor get twice the largest
    distance that occurs, so that descriptors stay finite. Without gradient.

    Args:
        x: ``[..., n, d]``.
        anchors: ``[p]`` indices of rows.
        n_neighbors: Neighbours per point; None as in :func:`build_graph`.
        metric: "euclidean", "cosine" or "angular".

    Raises:
        TypeError, ValueError: not points, anchors out of range, what :func:`build_graph` refuses.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> line = torch.tensor([[0.0], [1.0], [3.0], [6.0]])
        >>> options = {"n_neighbors": 2, "metric": "euclidean"}
        >>> lfm.descriptors.geodesic_distances(line, torch.tensor([0]), **options).flatten().tolist()
        [0.0, 1.0, 3.0, 6.0]
    """
    _checks.check_choice("metric", metric, ("euclidean", "cosine", "angular"))
    x = _checks.check_points("x", x)
    anchors = anchor_rows(anchors, x.shape[-2], x.device)
    with torch.no_grad():
        graph = build_graph(x, n_neighbors=n_neighbors, metric=metric, weights="distance", symmetrize="union")
        batch = graph.batch_shape
        sources = anchors.expand(max(1, math.prod(batch)), -1)
        distances = ops.geodesics(graph.rowptr, graph.col, graph.weight, sources).view(*batch, x.shape[-2], -1)
        reached = distances.isfinite()
        largest = torch.where(reached, distances, 0.0).amax((-2, -1), keepdim=True)
        return torch.where(reached, distances, 2 * largest)


@outside_autocast
def label_indicators(
    labels: IndexLike,
    *,
    classes: IndexLike | None = None,
    dtype: torch.dtype = torch.float32,
    basis: Basis | None = None,
) -> Tensor:
    """One function per class, 1 on its points and 0 elsewhere: ``[..., n, n_classes]``.

    Args:
        labels: ``[..., n]`` integers; points of a class that is not among ``classes`` get zeros.
        classes: ``[c]`` the classes, in the order of the columns; None for all that occur, ascending.
        dtype: Of the result.
        basis: Smooth the indicators by projecting them on this basis.

    Raises:
        TypeError: labels that are not integers.
    """
    home = basis.evecs.device if basis is not None else labels.device if isinstance(labels, Tensor) else "cpu"
    labels = _checks.as_integers("labels", labels, torch.device(home))
    classes = torch.unique(labels) if classes is None else _checks.as_integers("classes", classes, labels.device)
    indicators = (labels.unsqueeze(-1) == classes).to(dtype)
    return indicators if basis is None else basis.reconstruct(basis.project(indicators))


@outside_autocast
def farthest_points(x: ArrayLike, count: int, *, start: int = 0, metric: Metric = "angular") -> Tensor:
    """Choose ``count`` landmarks, each the point farthest from those before it: indices ``[count]``.

    Args:
        x: ``[n, d]``.
        count: At most n.
        start: The first landmark.
        metric: "euclidean", "cosine" or "angular"; under the last two rows of zeros are chosen last.

    Raises:
        TypeError, ValueError: not points, a count out of range.

    Source: Gonzalez 1985.
    """
    _checks.check_choice("metric", metric, ("euclidean", "cosine", "angular"))
    x, _, zero = _comparable(x, metric)
    if x.dim() != 2:
        raise ValueError(f"x must have shape [n, d], got {list(x.shape)}")
    _checks.check_range("count", count, 1, len(x), "the number of rows")
    _checks.check_range("start", start, 0, len(x) - 1, "the last row")
    chosen = [start]
    gap = (x - x[start]).square().sum(1)
    if zero is not None:  # far from all, and no mark of where anything is
        gap = gap.masked_fill(zero, -1.0)
    for _ in range(count - 1):
        gap[chosen[-1]] = -torch.inf
        chosen.append(int(gap.argmax()))
        gap = torch.minimum(gap, (x - x[chosen[-1]]).square().sum(1))
    return torch.tensor(chosen, dtype=torch.int64, device=x.device)


def _comparable(x: ArrayLike, metric: Metric) -> tuple[Tensor, float, Tensor | None]:
    """Points whose Euclidean distances are those of the metric over a power of two; the power; rows that are zero."""
    x, largest = _checks.measured_points("x", x)
    x = at_least_single(x)
    if metric == "euclidean":
        power = power_into_range(x.dtype, largest)
        return x / power if power != 1 else x, power, None
    x, zero = zero_rows("x", x)
    return unit_rows(x), 1.0, zero


def anchor_rows(anchors: IndexLike, n: int, device: torch.device) -> Tensor:
    """Return the anchors ``[p]`` as indices of rows on a device, or raise unless they are some of the ``n``."""
    rows = _checks.check_rows("anchors", anchors, n, device)
    if rows.dim() != 1 or len(rows) == 0:
        raise ValueError(f"anchors must have shape [p], p at least 1, got {list(rows.shape)}")
    return rows
