"""The ways to a first matching of two spaces, its refinement, and the share of rows that it confirms."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.alignment import gromov
from lfm_torch.alignment.gromov import feature_scores, gromov_wasserstein, signature_scores
from lfm_torch.alignment.spaces import START_BASIS, Spaces, random_order
from lfm_torch.descriptors.anchors import anchor_distances, label_indicators
from lfm_torch.maps.correspondence import agreeing_pairs, mutual_pairs, nearest, pointwise_map
from lfm_torch.maps.refine import zoomout
from lfm_torch.maps.solve import functional_map
from lfm_torch.spectral.basis import Basis

# rounds of the refinement at most
_ROUNDS = 50


class Match(NamedTuple):
    """A refined matching: the rotation of the prepared rows, its mutual pairs, and the share that is confirmed."""

    method: str
    rotation: Tensor
    pairs: Tensor
    confidence: float

    @classmethod
    def of(cls, method: str, spaces: Spaces, pairs: Tensor, anchors: Tensor) -> Match:
        """Refine a first correspondence ``pairs``, with the anchors that are known."""
        rotation, pairs = _refined(spaces, pairs, anchors)
        return cls(method, rotation, pairs, _confirmed_share(spaces, pairs))


def best_match(
    spaces: Spaces,
    bases: tuple[Basis, Basis],
    anchors: Tensor,
    labels: tuple[Tensor, Tensor] | None,
    functions: tuple[Tensor, Tensor] | None,
    method: str,
) -> Match:
    """The most confirmed of the ways to a first correspondence; the cheap ones first, the others where they fail."""
    ways: list[tuple[str, Callable[[], Tensor]]] = []
    if functions is not None and method != "coupling":
        ways.append(("descriptors", lambda: functional_pairs(*bases, *functions)))
    pairs = len(spaces.x) * len(spaces.y)
    if method != "descriptors" and (not ways or pairs <= gromov.LARGEST_PLAN):
        gromov.check_size(len(spaces.x), len(spaces.y))
        scores = functools.cache(lambda: _start_scores(spaces, anchors, labels))
        ways.append(("signatures", lambda: agreeing_pairs(scores().argmax(1), scores().argmax(0))))
        ways.append(("coupling", lambda: _coupled_pairs(spaces, scores())))
    best: Match | None = None
    for name, way in ways:
        match = Match.of(name, spaces, way(), anchors)
        best = match if best is None or match.confidence > best.confidence else best
        if best.confidence > (1 + spaces.chance) / 2:
            break
    assert best is not None
    return best


def corresponding_functions(
    spaces: Spaces,
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


def functional_pairs(basis_x: Basis, basis_y: Basis, f_x: Tensor, f_y: Tensor) -> Tensor:
    """Pairs ``[n_y, 2]`` by the functional map of the descriptors, grown by ZoomOut."""
    small = min(START_BASIS, basis_x.n_basis)
    fmap = functional_map(basis_x.truncate(small), basis_y.truncate(small), f_x, f_y)
    fmap = zoomout(fmap, basis_x, basis_y)
    idx_yx = pointwise_map(fmap, basis_x, basis_y)
    return torch.stack([idx_yx, torch.arange(len(idx_yx), device=idx_yx.device)], 1)


def _coupled_pairs(spaces: Spaces, start: Tensor) -> Tensor:
    plan = gromov_wasserstein(spaces.x, spaces.y, start=start).plan
    return agreeing_pairs(plan.argmax(1), plan.argmax(0))


def _start_scores(spaces: Spaces, anchors: Tensor, labels: tuple[Tensor, Tensor] | None) -> Tensor:
    """Log-scores of all pairs from what does not depend on the pairing: kernel rows, anchors, classes."""
    x, y = spaces.x, spaces.y
    scores = signature_scores(x, y)
    if len(anchors):
        scores = scores + feature_scores(x @ x[anchors[:, 0]].mT, y @ y[anchors[:, 1]].mT)
    if labels is not None:
        scores = scores.masked_fill(labels[0].unsqueeze(1) != labels[1].unsqueeze(0), float(scores.min()) - 1)
    return scores


def _refined(spaces: Spaces, pairs: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Fit the rotation to the pairs and match again until the pairs stand still."""
    rotation = _rotation(spaces, torch.cat([pairs, anchors]))
    for _ in range(_ROUNDS):
        before, pairs = pairs, mutual_pairs(spaces.x @ rotation, spaces.y)
        if torch.equal(before, pairs):
            break
        rotation = _rotation(spaces, torch.cat([pairs, anchors]))
    return rotation, pairs


def _rotation(spaces: Spaces, pairs: Tensor) -> Tensor:
    """The rotation of x, ``[d_x, d_y]``, that brings the rows of the pairs closest (orthogonal Procrustes)."""
    cross = spaces.x[pairs[:, 0]].mT @ spaces.y[pairs[:, 1]]
    u, _, vh = torch.linalg.svd(cross, full_matrices=False)
    rotation: Tensor = u @ vh
    return rotation


def _confirmed_share(spaces: Spaces, pairs: Tensor) -> float:
    """Share of the smaller space's rows whose pair is mutual under the rotation fitted to the other half of the pairs.

    The anchors take no part in these fits.
    """
    half = random_order(len(pairs), pairs.device) % 2 == 0
    confirmed = 0
    for fitted in (half, ~half):
        if not bool(fitted.any()) or bool(fitted.all()):
            return 0.0
        moved, tested = spaces.x @ _rotation(spaces, pairs[fitted]), pairs[~fitted]
        forth = nearest(moved[tested[:, 0]], spaces.y) == tested[:, 1]
        back = nearest(spaces.y[tested[:, 1]], moved) == tested[:, 0]
        confirmed += int((forth & back).sum())
    return confirmed / spaces.rows
