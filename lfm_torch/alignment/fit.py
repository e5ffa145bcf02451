"""One call from two representations to a map between them, with few known pairs or none, and with its evidence."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import outside_autocast
from lfm_torch._warnings import warn
from lfm_torch.alignment.evidence import (
    FEWEST_ANCHORS,
    cross_validated_p_value,
    fisher_p_value,
    rank_shares,
    split_anchors,
)
from lfm_torch.alignment.matching import Match, best_match, corresponding_functions
from lfm_torch.alignment.result import Alignment, Correspondence
from lfm_torch.alignment.spaces import Spaces, checked_points, spectral_bases
from lfm_torch.alignment.translator import Translator, TranslatorKind, fit_translator, row_pairs
from lfm_torch.graphs.points import Metric
from lfm_torch.maps.correspondence import agreeing_pairs, nearest
from lfm_torch.maps.refine import projected_map
from lfm_torch.ops.knn import unit_rows

Method = Literal["auto", "descriptors", "coupling"]
METHODS = ("auto", "descriptors", "coupling")
METRICS = ("angular", "cosine", "euclidean")

# below this p-value of left-out anchors an alignment counts as found
_ANCHOR_LEVEL = 1e-4


@outside_autocast
def align(
    x: ArrayLike,
    y: ArrayLike,
    *,
    anchors: IndexLike | None = None,
    labels: tuple[IndexLike, IndexLike] | None = None,
    descriptors: tuple[ArrayLike, ArrayLike] | None = None,
    kind: TranslatorKind = "orthogonal",
    method: Method = "auto",
    metric: Metric | None = None,
    n_neighbors: int | None = None,
    n_basis: int | None = None,
) -> Alignment:
    """Align two spaces whose rows need not pair: few known pairs, labels, or nothing at all is enough.

    With anchors, labels or descriptors: their functional map (20 eigenvectors), grown by ZoomOut, gives a first
    correspondence. Without, or where that fails, the spaces are matched by their distances alone: by the sorted kernel
    rows of each point, then by annealed entropic Gromov-Wasserstein. Either is then refined in rounds: fit the best
    rotation to the pairs that are each other's nearest neighbours, and match again. The final translator is fitted to
    these pairs with robust weights.

    What comes out is tested: rows count as confirmed only under a translator fitted without them. In many dimensions
    a wrong alignment fails there because it does not generalise; in few dimensions, where any two clouds of one shape
    match somehow, because it confirms no more rows than two unrelated samples do, which is measured on the data.

    Args:
        x: ``[n_x, d_x]``.
        y: ``[n_y, d_y]``.
        anchors: ``[p, 2]`` known pairs (row of x, row of y).
        labels: Classes ``[n_x]`` and ``[n_y]``, integers; classes that only one side has are left out.
        descriptors: ``[n_x, p]`` and ``[n_y, p]`` functions that should correspond.
        kind: Kind of the final translator, see :func:`fit_translator`.
        method: "descriptors" alone, "coupling" alone, or "auto": the first, and the second where it does not convince
            and there are at most 1e8 pairs of rows.
        metric: "angular" or "cosine": rows are centred and scaled to norm 1; "euclidean": centred only; None: angular,
            and euclidean for the last matching where that confirms more rows.
        n_neighbors: Neighbours in the graphs; None takes 15% of the rows, at most 300.
        n_basis: Eigenvectors of the final map; None takes an eighth of the rows, 20 to 120.

    Returns:
        Alignment; ``alignment.found`` says whether to trust it.

    Raises:
        TypeError: not floating-point tensors, different dtypes, anchors or labels that are not integers.
        ValueError: shapes that do not fit, fewer than 10 rows, anchors out of range, "descriptors" without any,
            more than 1e8 pairs of rows where distances alone must do.

    Warns:
        LFMWarning: the result is no better than chance.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x, rotation = torch.randn(200, 5), torch.linalg.qr(torch.randn(5, 5)).Q
        >>> order = torch.randperm(200)
        >>> alignment = lfm.align(x, (x @ rotation)[order])
        >>> alignment.found, bool((alignment.idx_yx == order).all())
        (True, True)

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 4; the refinement rounds: Artetxe et al. 2018
    (arXiv 1805.06297).
    """
    _checks.check_choice("method", method, METHODS)
    if metric is not None:
        _checks.check_choice("metric", metric, METRICS)
    x, y = checked_points("x", x), checked_points("y", y)
    _checks.check_same_device_dtype("x", x, "y", y)
    known = torch.zeros(0, 2, dtype=torch.int64, device=x.device)
    if anchors is not None:
        known = row_pairs("anchors", anchors, x, y)
    classes = None if labels is None else (_classes("labels[0]", labels[0], x), _classes("labels[1]", labels[1], y))
    with torch.no_grad():
        spaces = Spaces.of(x, y, "euclidean" if metric == "euclidean" else "angular")
        used, tested = split_anchors(known)
        bases = spectral_bases(spaces, n_neighbors, n_basis)
        functions = corresponding_functions(spaces, used, classes, descriptors)
        if method == "descriptors" and functions is None:
            raise ValueError("method must be 'auto' or 'coupling' where no anchors, labels or descriptors are given")
        match = best_match(spaces, bases, used, classes, functions, method)
        if metric is None:
            spaces, match = _with_norms(x, y, spaces, match, used)
        slack = max(0.05, 5 * math.sqrt(spaces.chance * (1 - spaces.chance) / spaces.rows))
        found = match.confidence > spaces.chance + slack
        anchor_p = fisher_p_value(rank_shares(match, spaces, tested)) if len(tested) else None
        if not found and not len(tested) and len(used) >= FEWEST_ANCHORS and method != "coupling":
            anchor_p = cross_validated_p_value(spaces, bases, used, classes, descriptors)
        found = found or (anchor_p is not None and anchor_p < _ANCHOR_LEVEL)
        translator = fit_translator(x, y, pairs=torch.cat([match.pairs, known]), kind=kind, robust=True)
        idx_yx, idx_xy = _matched(x, y, translator, spaces.metric)
        fmap = projected_map(idx_yx, *bases)
        pairs = torch.unique(torch.cat([agreeing_pairs(idx_xy, idx_yx), known]), dim=0)
    result = Correspondence(fmap, translator, pairs, idx_yx, idx_xy)
    alignment = Alignment(found, match.confidence, spaces.chance, anchor_p, match.method, *bases, result)
    if not found:
        warn(
            f"align: no alignment found, no better than chance: {match.confidence:.3f} of the rows have a "
            f"confirmed match, unrelated spaces reach {spaces.chance:.3f}",
        )
    return alignment


def _with_norms(x: Tensor, y: Tensor, spaces: Spaces, match: Match, anchors: Tensor) -> tuple[Spaces, Match]:
    """Match once more with the norms of the rows, and keep that where it stands out more."""
    other = Spaces.of(x, y, "euclidean")
    again = Match.of(match.method, other, match.pairs, anchors)
    better = again.confidence - other.chance > match.confidence - spaces.chance
    return (other, again) if better else (spaces, match)


def _classes(name: str, labels: IndexLike, z: Tensor) -> Tensor:
    found = _checks.as_integers(name, labels, z.device)
    if found.shape != (len(z),) or bool((found < 0).any()):
        raise ValueError(f"{name} must be {len(z)} numbers from 0, a class per row, got shape {list(found.shape)}")
    return found


def _matched(x: Tensor, y: Tensor, translator: Translator, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest rows in both directions under the translator, in the geometry of the metric about y's mean."""
    center = y.mean(0)
    moved, target = translator(x) - center, y - center
    if metric != "euclidean":
        moved, target = unit_rows(moved), unit_rows(target)
    return nearest(target, moved), nearest(moved, target)
