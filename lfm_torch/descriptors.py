"""Functions ``f [..., n, p]`` that should correspond between two spaces: what a functional map is solved from.

Weak supervision: distances to anchors, diffusion from anchors, class indicators. Without supervision: heat and wave
kernel signatures. Descriptors of both spaces are joined with ``torch.cat`` along the last dimension.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.graphs.graph import build_graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.graphs.neighbors import Metric, note_zero_rows, power_into_range, zero_rows
from lfm_torch.ops.knn import unit_rows
from lfm_torch.spectral.basis import Basis

Times = ArrayLike | Sequence[float]


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
    anchors = _anchors(anchors, x.shape[-2], x.device)
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
    anchors = _anchors(anchors, x.shape[-2], x.device)
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
def heat_diffusion(
    source: Basis | Laplacian, anchors: IndexLike, *, times: Times | None = None, n_times: int = 8
) -> Tensor:
    """Heat that has flown from each anchor to every point, ``exp(-t L)[i, a]``.

    Args:
        source: A Laplacian: exact, by polynomials in L; or a Basis, ``evecs [..., n, m]``: cut to its eigenpairs,
            ``sum_j exp(-t lambda_j) phi_j(i) phi_j(a)``.
        anchors: ``[p]`` indices of rows.
        times: ``[q]`` diffusion times; None: :func:`heat_times` for a basis, powers of two from 1 for a Laplacian.
        n_times: How many, where no times are given.

    Returns:
        ``[..., n, p q]``, the times of one anchor side by side.

    Raises:
        TypeError, ValueError: anchors that are not integers, or out of range.
    """
    if isinstance(source, Basis):
        return heat_kernel_signature(source, times=times, n_times=n_times, landmarks=anchors)
    anchors = _anchors(anchors, source.graph.n_nodes, source.graph.weight.device)
    steps = [2.0**k for k in range(n_times)]
    if times is not None:
        steps = _times(times, source.graph.weight).tolist()
    delta = source.graph.weight.new_zeros(source.graph.n_nodes, len(anchors))
    delta[anchors, torch.arange(len(anchors), device=delta.device)] = 1
    batch = source.graph.batch_shape
    heat = source.heat(delta.expand(*batch, *delta.shape).contiguous(), time=steps)
    return heat.movedim(0, -1).flatten(-2)


@outside_autocast
def heat_times(basis: Basis, n_times: int = 8) -> Tensor:
    """Times from the scale of the smallest to that of the largest structure of the basis: ``[..., n_times]``.

    Geometric between ``4 ln 10 / lambda_max`` and ``4 ln 10 / lambda_2`` (Sun, Ovsjanikov & Guibas 2009), lambda_2 the
    first eigenvalue that is not 0.
    """
    evals = at_least_single(basis.evals)
    largest = evals.amax(-1).clamp_min(torch.finfo(evals.dtype).eps)
    positive = torch.where(evals > 1e-6 * largest.unsqueeze(-1), evals, torch.inf).amin(-1)
    low, high = (4 * math.log(10) / value for value in (largest, torch.minimum(positive, largest)))
    share = torch.linspace(0, 1, n_times, dtype=evals.dtype, device=evals.device)
    return low.unsqueeze(-1) * (high / low).unsqueeze(-1) ** share


@outside_autocast
def heat_kernel_signature(
    basis: Basis, *, times: Times | None = None, n_times: int = 8, landmarks: IndexLike | None = None
) -> Tensor:
    """Heat kernel signature ``sum_j exp(-t lambda_j) phi_j(i)^2``, or from landmarks ``... phi_j(i) phi_j(l)``.

    Args:
        basis: Basis, ``evecs [..., n, m]``.
        times: ``[q]`` or ``[..., q]``; None: :func:`heat_times`.
        n_times: How many, where no times are given.
        landmarks: ``[p]`` indices of rows; None for the global signature.

    Returns:
        ``[..., n, q]``, with landmarks ``[..., n, p q]``.

    Raises:
        TypeError, ValueError: landmarks that are not integers, or out of range.

    Source: Sun, Ovsjanikov & Guibas 2009 (SGP), equation 3.
    """
    basis = at_least_single(basis)
    times = heat_times(basis, n_times) if times is None else _times(times, basis.evals)
    return _filtered(basis, (-times.unsqueeze(-1) * basis.evals.unsqueeze(-2)).exp(), landmarks)


@outside_autocast
def wave_kernel_signature(basis: Basis, *, n_energies: int = 8, landmarks: IndexLike | None = None) -> Tensor:
    """Wave kernel signature: ``sum_j g_e(lambda_j) phi_j(i)^2`` with log-normal windows g_e of sum 1.

    The windows stand between the first eigenvalue that is not 0 and the last, seven of their distances wide.

    Args:
        basis: Basis, ``evecs [..., n, m]``.
        n_energies: Number of windows.
        landmarks: ``[p]`` indices of rows, as in :func:`heat_kernel_signature`.

    Returns:
        ``[..., n, q]``, with landmarks ``[..., n, p q]``.

    Source: Aubry, Schlickewei & Cremers 2011, equations 5 and 6.
    """
    basis = at_least_single(basis)
    evals = basis.evals
    largest = evals.amax(-1, keepdim=True).clamp_min(torch.finfo(evals.dtype).eps)
    logs = evals.clamp_min(1e-6 * largest).log()
    first = torch.where(evals > 1e-6 * largest, logs, torch.inf).amin(-1, keepdim=True).clamp_max(largest.log())
    last = logs.amax(-1, keepdim=True)
    share = torch.linspace(0, 1, n_energies, dtype=evals.dtype, device=evals.device)
    energies = first + (last - first) * share
    width = (7 * (last - first) / max(n_energies, 2)).clamp_min(1e-3)
    exponent = -(energies.unsqueeze(-1) - logs.unsqueeze(-2)).square() / (2 * width.unsqueeze(-1).square())
    return _filtered(basis, exponent.softmax(-1), landmarks)


def _filtered(basis: Basis, gains: Tensor, landmarks: IndexLike | None) -> Tensor:
    """``sum_j gains_qj phi_j(i)^2`` or ``phi_j(i) phi_j(l)``: ``[..., n, q]`` or ``[..., n, p q]``."""
    phi = basis.evecs
    if landmarks is None:
        return matmul(phi.square(), gains.mT)
    at = phi[..., _anchors(landmarks, basis.n, phi.device), :]
    weighted = (at.unsqueeze(-2) * gains.unsqueeze(-3)).flatten(-3, -2)
    return matmul(phi, weighted.mT)


@outside_autocast
def normalize(f: Tensor, basis: Basis) -> Tensor:
    """Project on the basis and scale each function to norm 1 there: noise beyond the basis has no part in its size."""
    smooth = basis.reconstruct(basis.project(f))
    norms = smooth.norm(dim=-2, keepdim=True)
    return smooth / torch.where(norms > 0, norms, 1.0)


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


def _times(times: Times, like: Tensor) -> Tensor:
    """Times on the device and in the dtype of ``like``."""
    return _checks.as_tensor("times", np.asarray(times) if isinstance(times, (list, tuple)) else times).to(like)


def _anchors(anchors: IndexLike, n: int, device: torch.device) -> Tensor:
    rows = _checks.check_rows("anchors", anchors, n, device)
    if rows.dim() != 1 or len(rows) == 0:
        raise ValueError(f"anchors must have shape [p], p at least 1, got {list(rows.shape)}")
    return rows
