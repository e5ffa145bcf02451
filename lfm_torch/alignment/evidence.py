"""What anchors that a matching was not told of say of it: their ranks, and how unlikely these are by chance."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch._checks import ArrayLike
from lfm_torch.alignment.matching import Match, corresponding_functions, functional_pairs
from lfm_torch.alignment.spaces import Spaces
from lfm_torch.spectral.basis import Basis

# with so many anchors every fifth is held out to test the result on; with fewer, a fifth in turn where it matters
_ENOUGH_ANCHORS, _HELD_OUT = 20, 5
FEWEST_ANCHORS = 3


def split_anchors(anchors: Tensor) -> tuple[Tensor, Tensor]:
    """Anchors to use and, where there are enough, anchors to test the result on."""
    tested = torch.arange(len(anchors), device=anchors.device) % _HELD_OUT == 0
    if len(anchors) < _ENOUGH_ANCHORS:
        tested = torch.zeros_like(tested)
    return anchors[~tested], anchors[tested]


def rank_shares(match: Match, spaces: Spaces, tested: Tensor) -> Tensor:
    """Rank of each tested partner among all rows of y, as a share: uniform where the match knows nothing."""
    distance = torch.cdist(spaces.x[tested[:, 0]] @ match.rotation, spaces.y)
    own = distance.gather(1, tested[:, 1:])
    ranks = (distance < own).sum(1) + ((distance == own).sum(1) + 1).double() / 2
    return ranks / len(spaces.y)


def cross_validated_p_value(
    spaces: Spaces,
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
        functions = corresponding_functions(spaces, kept, labels, descriptors)
        assert functions is not None
        match = Match.of("descriptors", spaces, functional_pairs(*bases, *functions), kept)
        shares.append(rank_shares(match, spaces, anchors[fold == part]))
    return fisher_p_value(torch.cat(shares))


def fisher_p_value(shares: Tensor) -> float:
    """Fisher's combined p-value that the shares are uniform rather than small."""
    half = -float(shares.log().sum())
    if half <= 0:
        return 1.0
    # survival function of chi squared with 2 k degrees of freedom: a Poisson sum
    terms = (j * math.log(half) - math.lgamma(j + 1) - half for j in range(len(shares)))
    return min(1.0, sum(math.exp(term) for term in terms))
