"""Choose the weights of a functional map by what they make of anchors that the map was not told about."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import outside_autocast
from lfm_torch.alignment.translator import row_pairs
from lfm_torch.maps.correspondence import spectral_points
from lfm_torch.maps.solve import functional_map
from lfm_torch.spectral.basis import Basis

NAMES = ("laplacian_weight", "commutativity_weight", "orthogonality_weight")


@dataclass(frozen=True)
class MapWeights:
    """What :func:`choose_weights` found.

    Attributes:
        weights: the best weights by name: ``functional_map(..., **chosen.weights)``.
        scores: for every choice ``(laplacian, commutativity, orthogonality)`` the mean over held-out anchors of
            ``log(rank) / log(n_y)``: 0 is perfect; chance is ``1 - 1 / log(n_y)``.
    """

    weights: dict[str, float]
    scores: dict[tuple[float, float, float], float]


@outside_autocast
def choose_weights(
    basis_x: Basis,
    basis_y: Basis,
    f_x: ArrayLike,
    f_y: ArrayLike,
    anchors: IndexLike,
    *,
    laplacian_weights: Sequence[float] = (1e-3, 1e-2, 1e-1, 1.0),
    commutativity_weights: Sequence[float] = (0.0, 1e-1),
    orthogonality_weights: Sequence[float] = (0.0,),
    n_folds: int = 5,
) -> MapWeights:
    """Leave anchors out, fold by fold, and take the weights whose map puts the left-out ones nearest to each other.

    Args:
        basis_x: Basis of x, ``evecs [n_x, m_x]``.
        basis_y: Basis of y, ``evecs [n_y, m_y]``.
        f_x: Descriptors ``[n_x, p q]`` of p anchors, the q functions of one anchor side by side.
        f_y: ``[n_y, p q]``.
        anchors: ``[p, 2]`` (row of x, row of y), in the order of the descriptors.
        laplacian_weights: Candidates, as the others; all combinations are tried.
        commutativity_weights: Candidates.
        orthogonality_weights: Candidates.
        n_folds: Parts into which the anchors are split, at most p.

    Raises:
        ValueError: fewer than two anchors, descriptors that are not a multiple of them, no candidates, and what
            :func:`functional_map` refuses.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> from lfm_torch.alignment import choose_weights
        >>> x = torch.randn(60, 3, generator=torch.Generator().manual_seed(0))
        >>> basis = lfm.spectral_basis(lfm.build_graph(x, n_neighbors=10), n_basis=8)
        >>> rows = torch.arange(10)
        >>> f = lfm.descriptors.anchor_distances(x, rows)
        >>> sorted(choose_weights(basis, basis, f, f, torch.stack([rows, rows], 1)).weights)
        ['commutativity_weight', 'laplacian_weight', 'orthogonality_weight']
    """
    pairs = row_pairs("anchors", anchors, basis_x.evecs, basis_y.evecs)
    f_x, f_y = _checks.as_tensor("f_x", f_x), _checks.as_tensor("f_y", f_y)
    p = len(pairs)
    _checks.check_range("n_folds", n_folds, 2, p, "the number of anchors")
    if f_x.shape[-1] % p or f_x.shape[-1] == 0:
        raise ValueError(f"f_x must have a multiple of {p} columns, the functions of each anchor, got {f_x.shape[-1]}")
    choices = list(itertools.product(laplacian_weights, commutativity_weights, orthogonality_weights))
    if not choices:
        raise ValueError("laplacian_weights, commutativity_weights and orthogonality_weights must not be empty")
    owner = torch.arange(f_x.shape[-1], device=f_x.device) // (f_x.shape[-1] // p)
    fold = torch.arange(p, device=f_x.device) % n_folds
    scores = dict.fromkeys(choices, 0.0)
    with torch.no_grad():
        for part, choice in itertools.product(range(n_folds), choices):
            kept = fold[owner] != part
            laplacian, commutativity, orthogonality = choice
            fmap = functional_map(
                basis_x,
                basis_y,
                f_x[:, kept],
                f_y[:, kept],
                laplacian_weight=laplacian,
                commutativity_weight=commutativity,
                orthogonality_weight=orthogonality,
            )
            points_x, points_y = spectral_points(fmap, basis_x, basis_y)
            left_out = pairs[fold == part]
            distance = torch.cdist(points_x[left_out[:, 0]], points_y)
            own = distance.gather(1, left_out[:, 1:])
            ranks = (distance < own).sum(1) + ((distance == own).sum(1) + 1).double() / 2
            scores[choice] += float(ranks.log().sum()) / (p * math.log(basis_y.n))
    best = min(choices, key=scores.__getitem__)
    return MapWeights(dict(zip(NAMES, best, strict=True)), scores)
