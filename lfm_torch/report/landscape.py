"""Many models as a landscape: a distance between them, clusters, a map in two dimensions, and who stands apart."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lfm_torch.comparison.result import Comparison
from lfm_torch.measures.table import MEASURES

Array = np.ndarray[tuple[int, ...], np.dtype[np.float64]]
# cosines between operators on the samples (diffusion, projection, Gram): the chord 2 - 2 s is a squared distance
_COSINES = ("heat", "overlap", "heat_raw", "linear_cka", "rbf_cka")
_NEIGHBORS = 5
# robust z-score above which a model stands apart (Iglewicz & Hoaglin 1993)
_OUTLYING = 3.5


@dataclass(frozen=True)
class Landscape:
    """Models by their distance.

    Attributes:
        measure: name of the measure the distance is made of.
        proper: whether it obeys the triangle inequality.
        distances: ``[C, C]``, in the order of the comparison's checkpoints.
        merges: ``[C - 1, 3]``: the two clusters joined (numbers from C on are clusters) and the height, in order.
        order: checkpoints in the order of the dendrogram's leaves.
        places: ``[C, 2]`` coordinates of the map.
        kept: share of the squared distances that the map shows.
        outliers: (checkpoint, median distance to its nearest models, robust z-score), the furthest first.
    """

    measure: str
    proper: bool
    distances: Array
    merges: Array
    order: list[int]
    places: Array
    kept: float
    outliers: list[tuple[int, float, float]]


def landscape(comparison: Comparison) -> Landscape | None:
    """Lay out the checkpoints of a comparison; None for fewer than three, or where no two can be compared."""
    if len(comparison.checkpoints) < 3:
        return None
    measure, proper, distances = _distances(comparison)
    if not np.isfinite(distances[~np.eye(len(distances), dtype=bool)]).any():
        return None
    # a pair that failed is taken to be as far apart as any: it must not hold clusters together
    distances = np.where(np.isfinite(distances), distances, np.nanmax(np.where(np.isfinite(distances), distances, 0)))
    merges = linkage(distances)
    places, kept = classical_scaling(distances)
    return Landscape(measure, proper, distances, merges, leaves(merges), places, kept, outliers(distances))


def _distances(comparison: Comparison) -> tuple[str, bool, Array]:
    """The distance the landscape is made of: a proper one where a measure gives one."""
    metrics = [name for name in comparison.measures if name in MEASURES and MEASURES[name].metric]
    cosines = [name for name in _COSINES if name in comparison.measures]
    measure = (cosines or metrics or list(comparison.measures))[0]
    values = comparison.between_checkpoints(measure).double().numpy()
    values = (values + values.T) / 2
    if measure in MEASURES and MEASURES[measure].is_distance:
        distances = values
    else:
        # of several layers the mean: squared distances add up
        distances = np.sqrt(np.clip(2 - 2 * values, 0, None))
    np.fill_diagonal(distances, 0)
    return measure, measure in (*cosines, *metrics), distances


def linkage(distances: Array) -> Array:
    """Average linkage by the nearest-neighbour chain, ``O(C^2)``: rows (cluster, cluster, height), lowest first.

    Source: Murtagh 1983; the merges are those of SciPy's ``linkage(method="average")``.
    """
    n = len(distances)
    d = distances.astype(np.float64).copy()
    np.fill_diagonal(d, np.inf)
    size = np.ones(n)
    found: list[tuple[int, int, float]] = []
    chain: list[int] = []
    alive = np.ones(n, dtype=bool)
    for _ in range(n - 1):
        if not chain:
            chain = [int(np.flatnonzero(alive)[0])]
        while True:
            x = chain[-1]
            y = int(np.argmin(d[x]))
            # the one before wins a tie, or the chain would never end
            if len(chain) > 1 and d[x, chain[-2]] <= d[x, y]:
                y = chain[-2]
                break
            chain.append(y)
        chain = chain[:-2]
        found.append((x, y, float(d[x, y])))
        row = (size[x] * d[x] + size[y] * d[y]) / (size[x] + size[y])
        size[y] += size[x]
        d[y], d[:, y] = row, row
        d[y, y] = np.inf
        d[x], d[:, x] = np.inf, np.inf
        alive[x] = False
    return _numbered(sorted(found, key=lambda merge: merge[2]), n)


def _numbered(found: list[tuple[int, int, float]], n: int) -> Array:
    """Name clusters by the merge that made them, as they are joined from the lowest up."""
    parent = list(range(n))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    name = {i: i for i in range(n)}
    merges = np.empty((n - 1, 3))
    for k, (x, y, height) in enumerate(found):
        a, b = root(x), root(y)
        merges[k] = (*sorted((name[a], name[b])), height)
        parent[a] = b
        name[b] = n + k
    return merges


def leaves(merges: Array) -> list[int]:
    """Checkpoints from left to right under the dendrogram."""
    n = len(merges) + 1
    order, stack = [], [2 * n - 2]
    while stack:
        node = stack.pop()
        if node < n:
            order.append(node)
        else:
            stack += [int(merges[node - n, 1]), int(merges[node - n, 0])]
    return order


def dendrogram(merges: Array, order: list[int]) -> list[tuple[float, float, float, float, float]]:
    """Brackets ``(left, left bottom, right, right bottom, top)``; leaf k of the order stands at ``k + 0.5``."""
    n = len(order)
    x = np.zeros(2 * n - 1)
    x[order] = np.arange(n) + 0.5
    y = np.zeros(2 * n - 1)
    brackets = []
    for k, (a, b, height) in enumerate(merges):
        left, right = sorted((int(a), int(b)), key=lambda node: x[node])
        brackets.append((float(x[left]), float(y[left]), float(x[right]), float(y[right]), float(height)))
        x[n + k], y[n + k] = (x[left] + x[right]) / 2, height
    return brackets


def classical_scaling(distances: Array) -> tuple[Array, float]:
    """Coordinates ``[C, 2]`` whose distances are closest to the given ones, and the share of squares they hold.

    Source: Torgerson 1952.
    """
    squares = distances**2
    gram = -(squares - squares.mean(0) - squares.mean(1)[:, None] + squares.mean()) / 2
    evals, evecs = np.linalg.eigh(gram)
    top = np.clip(evals[:-3:-1], 0, None)
    places = evecs[:, :-3:-1] * np.sqrt(top)
    # eigenvectors have no sign of their own: the largest coordinate is positive
    largest = places[np.abs(places).argmax(0), range(places.shape[1])]
    total = np.clip(evals, 0, None).sum()
    return places * np.where(largest < 0, -1.0, 1.0), float(top.sum() / total) if total > 0 else 1.0


def outliers(distances: Array) -> list[tuple[int, float, float]]:
    """Models whose nearest others are unusually far: (checkpoint, median distance to them, robust z-score)."""
    n = len(distances)
    k = min(_NEIGHBORS, n - 1)
    nearest = np.sort(distances + np.diag(np.full(n, np.inf)), axis=1)[:, :k]
    height = np.median(nearest, axis=1)
    middle = np.median(height)
    spread = np.median(np.abs(height - middle))
    if spread == 0:
        # more than half of all are equally far from their neighbours: the mean deviation in its place
        spread = np.abs(height - middle).mean() * math.sqrt(math.pi / 2) * 0.6745
    if spread == 0:
        return []
    score = 0.6745 * (height - middle) / spread
    apart = np.flatnonzero(score > _OUTLYING)
    return sorted(((int(i), float(height[i]), float(score[i])) for i in apart), key=lambda found: -found[2])
