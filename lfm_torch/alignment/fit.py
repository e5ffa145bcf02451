"""One call from two representations to a map between them, with few known pairs or none, and with its evidence."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch._warnings import warn
from lfm_torch.alignment import gromov
from lfm_torch.alignment.gromov import feature_scores, gromov_wasserstein, signature_scores
from lfm_torch.alignment.result import Alignment, Correspondence
from lfm_torch.alignment.transfer import Translator, TranslatorKind, fit_translator, row_pairs
from lfm_torch.descriptors.anchors import anchor_distances, label_indicators
from lfm_torch.graphs.graph import build_graph
from lfm_torch.graphs.points import Metric
from lfm_torch.maps.correspondence import agreeing_pairs, mutual_pairs, nearest, pointwise_map
from lfm_torch.maps.refine import projected_map, zoomout
from lfm_torch.maps.solve import functional_map
from lfm_torch.ops.knn import unit_rows
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.compute import spectral_basis

Method = Literal["auto", "descriptors", "coupling"]
METHODS = ("auto", "descriptors", "coupling")
METRICS = ("angular", "cosine", "euclidean")

_START_BASIS, _FINAL_BASIS = 20, 120
_ROUNDS = 50
# with so many anchors every fifth is held out to test the result on; with fewer, a fifth in turn where it matters
_ENOUGH_ANCHORS, _FEWEST_ANCHORS, _HELD_OUT = 20, 3, 5
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
    x, y = _points("x", x), _points("y", y)
    _checks.check_same_device_dtype("x", x, "y", y)
    known = torch.zeros(0, 2, dtype=torch.int64, device=x.device)
    if anchors is not None:
        known = row_pairs("anchors", anchors, x, y)
    classes = None if labels is None else (_classes("labels[0]", labels[0], x), _classes("labels[1]", labels[1], y))
    with torch.no_grad():
        spaces = _Spaces.of(x, y, "euclidean" if metric == "euclidean" else "angular")
        used, tested = _split_anchors(known)
        bases = _bases(spaces, n_neighbors, n_basis)
        functions = _functions(spaces, used, classes, descriptors)
        if method == "descriptors" and functions is None:
            raise ValueError("method must be 'auto' or 'coupling' where no anchors, labels or descriptors are given")
        match = _best_match(spaces, bases, used, classes, functions, method)
        if metric is None:
            spaces, match = _with_norms(x, y, spaces, match, used)
        slack = max(0.05, 5 * math.sqrt(spaces.chance * (1 - spaces.chance) / spaces.rows))
        found = match.confidence > spaces.chance + slack
        anchor_p = _fisher_p_value(_rank_shares(match, spaces, tested)) if len(tested) else None
        if not found and not len(tested) and len(used) >= _FEWEST_ANCHORS and method != "coupling":
            anchor_p = _cross_validated_p_value(spaces, bases, used, classes, descriptors)
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


@dataclass(frozen=True)
class _Spaces:
    """Both spaces prepared for matching, and the share of rows that two unrelated samples of such spaces match."""

    x: Tensor
    y: Tensor
    metric: str
    chance: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, metric: str) -> _Spaces:
        x, y = _prepared(x, metric), _prepared(y, metric)
        return cls(x, y, metric, max(_mutual_share(x), _mutual_share(y)))

    @property
    def rows(self) -> int:
        return min(len(self.x), len(self.y))


@dataclass(frozen=True)
class _Match:
    """A refined matching: the rotation of the prepared rows, its mutual pairs, and the share that is confirmed."""

    method: str
    rotation: Tensor
    pairs: Tensor
    confidence: float

    @classmethod
    def of(cls, method: str, spaces: _Spaces, pairs: Tensor, anchors: Tensor) -> _Match:
        rotation, pairs = _refined(spaces, pairs, anchors)
        return cls(method, rotation, pairs, _confirmed_share(spaces, pairs))


def _best_match(
    spaces: _Spaces,
    bases: tuple[Basis, Basis],
    anchors: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    functions: tuple[Tensor, Tensor] | None,
    method: str,
) -> _Match:
    """The most confirmed of the ways to a first correspondence; the cheap ones first, the others where they fail."""
    ways: list[tuple[str, Callable[[], Tensor]]] = []
    if functions is not None and method != "coupling":
        ways.append(("descriptors", lambda: _functional_pairs(*bases, *functions)))
    pairs = len(spaces.x) * len(spaces.y)
    if method != "descriptors" and (not ways or pairs <= gromov.LARGEST_PLAN):
        gromov.check_size(len(spaces.x), len(spaces.y))
        scores = functools.cache(lambda: _start_scores(spaces, anchors, labels))
        ways.append(("signatures", lambda: agreeing_pairs(scores().argmax(1), scores().argmax(0))))
        ways.append(("coupling", lambda: _coupled_pairs(spaces, scores())))
    best: _Match | None = None
    for name, way in ways:
        match = _Match.of(name, spaces, way(), anchors)
        best = match if best is None or match.confidence > best.confidence else best
        if best.confidence > (1 + spaces.chance) / 2:
            break
    assert best is not None
    return best


def _with_norms(x: Tensor, y: Tensor, spaces: _Spaces, match: _Match, anchors: Tensor) -> tuple[_Spaces, _Match]:
    """Match once more with the norms of the rows, and keep that where it stands out more."""
    other = _Spaces.of(x, y, "euclidean")
    again = _Match.of(match.method, other, match.pairs, anchors)
    better = again.confidence - other.chance > match.confidence - spaces.chance
    return (other, again) if better else (spaces, match)


def _split_anchors(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors to use and, where there are enough, anchors to test the result on."""
    tested = torch.arange(len(anchors), device=anchors.device) % _HELD_OUT == 0
    if len(anchors) < _ENOUGH_ANCHORS:
        tested = torch.zeros_like(tested)
    return anchors[~tested], anchors[tested]


def _classes(name: str, labels: IndexLike, z: Tensor) -> Tensor:
    found = _checks.as_integers(name, labels, z.device)
    if found.shape != (len(z),) or bool((found < 0).any()):
        raise ValueError(f"{name} must be {len(z)} numbers from 0, a class per row, got shape {list(found.shape)}")
    return found


def _points(name: str, x: ArrayLike) -> Tensor:
    x = _checks.check_space(name, x, batched=None)
    if len(x) < 10:
        raise ValueError(f"{name} must have shape [n, d] with at least 10 rows, got {list(x.shape)}")
    if bool((x == x[:1]).all()):
        raise ValueError(f"{name} must have rows that differ, got equal ones throughout (a collapsed representation)")
    return at_least_single(x)


def _prepared(x: Tensor, metric: str) -> Tensor:
    """Rows about their mean, of norm 1 or of mean squared norm 1: from here on all is Euclidean geometry."""
    x = x - x.mean(0)
    norms: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    if metric == "euclidean":
        return x / norms.square().mean().sqrt()
    # a row at the mean has no direction; it stays there
    return x / torch.where(norms > 0, norms, 1.0)


def _bases(spaces: _Spaces, n_neighbors: int | None, n_basis: int | None) -> tuple[Basis, Basis]:
    size = min(_FINAL_BASIS, max(_START_BASIS, spaces.rows // 8), spaces.rows - 1) if n_basis is None else n_basis
    # the rows are prepared: their Euclidean distance is the chord that "angular" means, and a row at the mean is no
    # error
    graphs = (build_graph(z, n_neighbors=n_neighbors, metric="euclidean") for z in (spaces.x, spaces.y))
    basis_x, basis_y = (spectral_basis(graph, n_basis=size) for graph in graphs)
    return basis_x, basis_y


def _functions(
    spaces: _Spaces,
    anchors: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    descriptors: tuple[ArrayLike, ArrayLike] | None,
) -> tuple[Tensor, Tensor] | None:
    """All descriptors side by side on both spaces, None where there are none."""
    z_x, z_y = spaces.x, spaces.y
    parts: list[tuple[Tensor, Tensor]] = []
    if len(anchors):
        distances = [
            anchor_distances(z, rows, metric="euclidean") for z, rows in ((z_x, anchors[:, 0]), (z_y, anchors[:, 1]))
        ]
        parts.append((distances[0], distances[1]))
    if labels is not None:
        shared = torch.tensor(
            sorted({*labels[0].tolist()} & {*labels[1].tolist()}), dtype=torch.int64, device=z_x.device
        )
        if len(shared) == 0:
            raise ValueError("labels must have a class that both spaces have, got none")
        indicators = [label_indicators(label, classes=shared, dtype=z_x.dtype) for label in labels]
        parts.append((indicators[0], indicators[1]))
    if descriptors is not None:
        given = tuple(_checks.check_points(f"descriptors[{i}]", f).to(z_x) for i, f in enumerate(descriptors))
        parts.append((given[0], given[1]))
    if not parts:
        return None
    # every kind has the same say, whatever the number of its columns
    columns = [
        torch.cat([f / f.norm(dim=0).clamp_min(torch.finfo(f.dtype).tiny) for f in side], 1)
        for side in zip(*parts, strict=True)
    ]
    return columns[0], columns[1]


def _functional_pairs(basis_x: Basis, basis_y: Basis, f_x: Tensor, f_y: Tensor) -> Tensor:
    small = min(_START_BASIS, basis_x.n_basis)
    fmap = functional_map(basis_x.truncate(small), basis_y.truncate(small), f_x, f_y)
    fmap = zoomout(fmap, basis_x, basis_y)
    idx_yx = pointwise_map(fmap, basis_x, basis_y)
    return torch.stack([idx_yx, torch.arange(len(idx_yx), device=idx_yx.device)], 1)


def _coupled_pairs(spaces: _Spaces, start: Tensor) -> Tensor:
    plan = gromov_wasserstein(spaces.x, spaces.y, start=start).plan
    return agreeing_pairs(plan.argmax(1), plan.argmax(0))


def _start_scores(spaces: _Spaces, anchors: Tensor, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    """Log-scores of all pairs from what does not depend on the pairing: kernel rows, anchors, classes."""
    x, y = spaces.x, spaces.y
    scores = signature_scores(x, y)
    if len(anchors):
        scores = scores + feature_scores(x @ x[anchors[:, 0]].mT, y @ y[anchors[:, 1]].mT)
    if labels is not None:
        scores = scores.masked_fill(labels[0].unsqueeze(1) != labels[1].unsqueeze(0), float(scores.min()) - 1)
    return scores


def _refined(spaces: _Spaces, pairs: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the rotation to the pairs and match again until the pairs stand still."""
    rotation = _rotation(spaces, torch.cat([pairs, anchors]))
    for _ in range(_ROUNDS):
        before, pairs = pairs, mutual_pairs(spaces.x @ rotation, spaces.y)
        if torch.equal(before, pairs):
            break
        rotation = _rotation(spaces, torch.cat([pairs, anchors]))
    return rotation, pairs


def _rotation(spaces: _Spaces, pairs: Tensor) -> Tensor:
    cross = spaces.x[pairs[:, 0]].mT @ spaces.y[pairs[:, 1]]
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    rotation: Tensor = u @ vh
    return rotation


def _confirmed_share(spaces: _Spaces, pairs: Tensor) -> float:
    """Share of the smaller space's rows whose pair is mutual under the rotation fitted to the other half of the pairs.

    The anchors take no part in these fits.
    """
    half = _random_order(len(pairs), pairs.device) % 2 == 0
    confirmed = 0
    for fitted in (half, ~half):
        if not bool(fitted.any()) or bool(fitted.all()):
            return 0.0
        moved, tested = spaces.x @ _rotation(spaces, pairs[fitted]), pairs[~fitted]
        forth = nearest(moved[tested[:, 0]], spaces.y) == tested[:, 1]
        back = nearest(spaces.y[tested[:, 1]], moved) == tested[:, 0]
        confirmed += int((forth & back).sum())
    return confirmed / spaces.rows


def _mutual_share(z: Tensor) -> float:
    """Share of mutual nearest neighbours between two random halves: what unrelated samples of one shape reach."""
    half = _random_order(len(z), z.device) % 2 == 0
    return len(mutual_pairs(z[half], z[~half])) / min(int(half.sum()), int((~half).sum()))


def _random_order(n: int, device: torch.device) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu").to(device)


def _rank_shares(match: _Match, spaces: _Spaces, tested: Tensor) -> Tensor:
    """Rank of each tested partner among all rows of y, as a share: uniform where the match knows nothing."""
    distance = torch.cdist(spaces.x[tested[:, 0]] @ match.rotation, spaces.y)
    own = distance.gather(1, tested[:, 1:])
    ranks = (distance < own).sum(1) + ((distance == own).sum(1) + 1).double() / 2
    return ranks / len(spaces.y)


def _cross_validated_p_value(
    spaces: _Spaces,
    bases: tuple[Basis, Basis],
    anchors: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    descriptors: tuple[ArrayLike, ArrayLike] | None,
) -> float:
    """Too few anchors to spare any: leave out a fifth in turn, and see where a map from the others puts them."""
    fold = torch.arange(len(anchors), device=anchors.device) % _HELD_OUT
    shares = []
    for part in range(min(_HELD_OUT, len(anchors))):
        kept = anchors[fold != part]
        functions = _functions(spaces, kept, labels, descriptors)
        assert functions is not None
        match = _Match.of("descriptors", spaces, _functional_pairs(*bases, *functions), kept)
        shares.append(_rank_shares(match, spaces, anchors[fold == part]))
    return _fisher_p_value(torch.cat(shares))


def _fisher_p_value(shares: Tensor) -> float:
    """Fisher's combined p-value that the shares are uniform rather than small."""
    half = -float(shares.log().sum())
    if half <= 0:
        return 1.0
    # survival function of chi squared with 2 k degrees of freedom: a Poisson sum
    terms = (j * math.log(half) - math.lgamma(j + 1) - half for j in range(len(shares)))
    return min(1.0, sum(math.exp(term) for term in terms))


def _matched(x: Tensor, y: Tensor, translator: Translator, metric: str) -> tuple[Tensor, Tensor]:
    """Nearest rows in both directions under the translator, in the geometry of the metric about y's mean."""
    center = y.mean(0)
    moved, target = translator(x) - center, y - center
    if metric != "euclidean":
        moved, target = unit_rows(moved), unit_rows(target)
    return nearest(target, moved), nearest(moved, target)
