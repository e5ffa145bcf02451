"""How well rows of one space are found among those of another: nearest candidates, and the rank of the right one."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.search import Neighbors
from lfm_torch.ops.knn import METRICS, unit_rows

# entries of one tile of similarities: 64 MiB of float32
_TILE = 1 << 24


@outside_autocast
def retrieve(
    queries: ArrayLike, candidates: ArrayLike, *, n_neighbors: int = 10, metric: Metric = "angular"
) -> Neighbors:
    """Find for each translated row its nearest candidates, best first: :func:`knn` of queries in candidates.

    Args:
        queries: ``[..., n, d]``, for instance ``translator(x_new)``.
        candidates: ``[..., m, d]``, rows of y.
        n_neighbors: How many.
        metric: As in :func:`knn`.
    """
    return knn(queries, candidates, n_neighbors=n_neighbors, metric=metric)


@outside_autocast
def mean_reciprocal_rank(
    queries: ArrayLike, candidates: ArrayLike, *, targets: IndexLike | None = None, metric: Metric = "angular"
) -> Tensor:
    """Mean over queries of 1 / rank, the rank being the place of the right candidate among all by distance.

    Candidates at the same distance share their mean rank, so that a collapsed representation scores like chance.

    Args:
        queries: ``[n, d]``.
        candidates: ``[m, d]``.
        targets: ``[n]`` index of the right candidate of each query; None: candidate i is that of query i.
        metric: As in :func:`knn`.

    Returns:
        A scalar in (0, 1]. About ``ln(m) / m`` by chance.

    Raises:
        TypeError: not floating-point tensors, different dtypes, or targets that are not integers.
        ValueError: shapes that do not pair, targets out of range, values that are not finite.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> float(lfm.mean_reciprocal_rank(torch.eye(3), torch.eye(3)))
        1.0
    """
    _checks.check_choice("metric", metric, METRICS)
    queries, candidates = _checks.check_points("queries", queries), _checks.check_points("candidates", candidates)
    _checks.check_same_device_dtype("queries", queries, "candidates", candidates)
    queries, candidates = at_least_single(queries), at_least_single(candidates)
    if queries.dim() != 2 or candidates.dim() != 2 or queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"candidates must have shape [m, d] with the d of queries [n, d], {list(queries.shape)}, "
            f"got {list(candidates.shape)}"
        )
    n, m = len(queries), len(candidates)
    if targets is None:
        if n != m:
            raise ValueError(f"targets must be given where queries and candidates differ in number, {n} and {m}")
        targets = torch.arange(n, device=queries.device)
    targets = _checks.check_rows("targets", targets, m, queries.device)
    if targets.shape != (n,):
        raise ValueError(f"targets must have shape [{n}], got {list(targets.shape)}")
    with torch.no_grad():
        queries, candidates = closeness_features(queries, candidates, metric)
        total = queries.new_zeros((), dtype=torch.float64)
        for rows in torch.split(torch.arange(n, device=queries.device), max(1, _TILE // m)):
            close = queries[rows] @ candidates.mT
            own = close.gather(1, targets[rows].unsqueeze(1))
            better, equal = (close > own).sum(1), (close == own).sum(1)
            total += (1 / (1 + better + (equal - 1).double() / 2)).sum()
    return (total / n).to(queries.dtype)


def closeness_features(x: Tensor, y: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Features whose inner product orders pairs of rows as the metric does, the closest largest."""
    if metric in ("cosine", "angular"):
        return unit_rows(x), unit_rows(y)
    if metric == "euclidean":
        center = y.mean(-2, keepdim=True)
        x, y = x - center, y - center
        return (
            torch.cat([x, torch.ones_like(x[..., :1])], -1),
            torch.cat([y, -y.square().sum(-1, keepdim=True) / 2], -1),
        )
    return x, y
