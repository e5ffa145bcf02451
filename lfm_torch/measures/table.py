"""Every measure of similarity in one table: what it reads, what its numbers mean, what leaves it unchanged.

A measure is added here and nowhere else: :func:`lfm_torch.similarity`, :func:`lfm_torch.compare`, the report and the
command line read this table, and the tests check every invariance it claims.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch.baselines import cca, cka, neighbors, regression
from lfm_torch.baselines.dissimilarity import prepare_rsa
from lfm_torch.baselines.points import Points, State, permute_both, permute_rows, score_inner, score_kernels
from lfm_torch.baselines.shape import prepare_procrustes, score_angular, score_distance
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.measures import map_readings
from lfm_torch.measures.stacked_maps import Maps

Invariance = Literal["translation", "scaling", "orthogonal", "linear"]
DEFAULT_MEASURES = ("lfm", "overlap", "heat")


@dataclass(frozen=True)
class Measure:
    """A measure of similarity, or a distance, between two representations of the same samples.

    Attributes:
        name: As it is written in ``measures=``.
        title: For people.
        reading: What its value says, in a sentence or two.
        range: Smallest and largest value.
        closest: The value of two equal representations: the upper end for a similarity, 0 for a distance.
        symmetric: Whether x and y may be exchanged.
        metric: Whether it is 0 for equals, symmetric, and obeys the triangle inequality.
        paired: Whether it depends on which row of y belongs to which of x, so that shuffled rows give its chance level.
        invariances: Changes of one representation that leave it as it is, at default settings: "translation" (a vector
            added to every row), "scaling" (a common positive factor), "orthogonal" (a rotation or reflection of the
            features), "linear" (any invertible linear map of them).
        differentiable: Whether gradients flow to both representations (to the map, for a measure of maps).
        source: Where it comes from.
    """

    name: str
    title: str
    reading: str
    range: tuple[float, float]
    closest: float
    symmetric: bool
    metric: bool
    invariances: frozenset[Invariance]
    source: str
    paired: bool = True
    differentiable: bool = True

    @property
    def is_distance(self) -> bool:
        """Whether smaller values mean closer."""
        return self.closest == self.range[0]


@dataclass(frozen=True)
class MapMeasure(Measure):
    """A measure read from functional maps.

    Attributes:
        read: The value of every map, ``[A, B]``.
        centered: Whether it leaves the constant function out, so that it needs two.
    """

    read: Callable[[Maps], Tensor] = map_readings.overlap
    centered: bool = False


@dataclass(frozen=True)
class PointMeasure(Measure):
    """A measure of the points: ``prepare`` once per representation, ``score`` per pair.

    Attributes:
        prepare: What a pair needs of a representation, a tuple of tensors with its batch dimensions.
        score: The value of a pair, ``[...]``; batch dimensions broadcast.
        permute: The states of the representation with its rows in other orders ``[P, n]``, without preparing it again.
    """

    prepare: Callable[[Points], State] = cka.prepare_linear
    score: Callable[[State, State], Tensor] = cka.score_linear
    permute: Callable[[State, Tensor], State] = cka.permute_linear


_GRAPH = frozenset[Invariance]({"scaling", "orthogonal"})
_LFM = "Fumero et al. 2024, arXiv 2406.14183, section 3.3"
_OURS = "this library"
_MAPS = (
    MapMeasure(
        "lfm",
        "LFM similarity",
        "How close the map between the two neighbourhood graphs is to carrying each wave pattern of one to a pattern "
        "of its own on the other; mean of both directions, without the constant pattern, which any two spaces share. "
        "About 0.5 where nothing corresponds.",
        (0, 1), 1, True, False, _GRAPH, _LFM + ", symmetric and without the constant function",
        read=partial(map_readings.lfm, symmetric=True, centered=True), centered=True,
    ),
    MapMeasure(
        "lfm_paper",
        "LFM similarity (paper)",
        "The paper's formula, with the constant pattern and from x to y alone: rows are x, columns y. Near 1 also "
        "where nothing corresponds: read it against the value for shuffled rows, never against 0.",
        (0, 1), 1, False, False, _GRAPH, _LFM,
        read=map_readings.lfm,
    ),
    MapMeasure(
        "lfm_unsquared",
        "LFM similarity (published code)",
        "The ratio of norms, not of squares, that the published code computes; rows are x, columns y.",
        (0, 1), 1, False, False, _GRAPH, _LFM + ", as its code has it",
        read=partial(map_readings.lfm, squared=False),
    ),
    MapMeasure(
        "overlap",
        "subspace overlap",
        "The share of the slow wave patterns of one neighbourhood graph that the other has too. For unrelated "
        "representations about (eigenvectors) / (samples).",
        (0, 1), 1, True, False, _GRAPH, _OURS,
        read=map_readings.overlap,
    ),
    MapMeasure(
        "heat",
        "heat overlap",
        "How alike heat spreads on the two neighbourhood graphs, slow wave patterns first: the cosine between their "
        "diffusion kernels, corrected for chance and for the scale of each spectrum. 0 on average where nothing "
        "corresponds, at any number of samples.",
        (-1, 1), 1, True, False, _GRAPH, _OURS,
        read=map_readings.heat, centered=True,
    ),
    MapMeasure(
        "heat_raw",
        "heat overlap (plain)",
        "The plain cosine between the diffusion kernels, with the constant pattern and no correction: 0.2 to 0.5 where "
        "nothing corresponds, the more the fewer samples.",
        (0, 1), 1, True, False, _GRAPH, _OURS,
        read=partial(map_readings.heat, raw=True),
    ),
    MapMeasure(
        "orthogonality_error",
        "orthogonality error",
        "How far the map is from an isometry: 0 where all patterns are carried whole, 1 where none is.",
        (0, 1), 0, True, False, _GRAPH, "Ovsjanikov et al. 2012",
        read=map_readings.orthogonality,
    ),
    MapMeasure(
        "commutativity_error",
        "commutativity error",
        "By how much the frequencies of patterns differ that are carried to one another.",
        (0, 2), 0, True, False, _GRAPH, "Ovsjanikov et al. 2012",
        read=partial(map_readings.commutativity, centered=True), centered=True,
    ),
    MapMeasure(
        "spectral_distance",
        "spectral distance",
        "By how much the frequencies of the two neighbourhood graphs differ, in order; it knows nothing of which "
        "sample is which.",
        (0, 2), 0, True, True, _GRAPH, "Reuter et al. 2006",
        paired=False,
        read=map_readings.spectral,
    ),
)  # fmt: skip

_RIGID = frozenset[Invariance]({"translation", "scaling", "orthogonal"})
_LINEAR = frozenset[Invariance]({"translation", "scaling", "orthogonal", "linear"})
_ANGULAR = frozenset[Invariance]({"scaling", "orthogonal"})
_POINTS = (
    PointMeasure(
        "linear_cka",
        "linear CKA",
        "The classical comparison of all distances at once (centred kernel alignment with a linear kernel). Large "
        "directions of variance weigh most.",
        (0, 1), 1, True, False, _RIGID, "Kornblith et al. 2019, arXiv 1905.00414",
        prepare=cka.prepare_linear, score=cka.score_linear, permute=cka.permute_linear,
    ),
    PointMeasure(
        "rbf_cka",
        "RBF CKA",
        "Centred kernel alignment with a Gaussian kernel as wide as the median distance: nearer samples weigh more.",
        (0, 1), 1, True, False, _RIGID, "Kornblith et al. 2019, arXiv 1905.00414",
        prepare=cka.prepare_rbf, score=score_kernels, permute=permute_both,
    ),
    PointMeasure(
        "debiased_cka",
        "debiased CKA",
        "Linear CKA without the bias that makes wide layers look alike: around 0 where nothing corresponds.",
        (-1, 1), 1, True, False, _RIGID, "Nguyen et al. 2021, arXiv 2010.15327",
        prepare=cka.prepare_debiased, score=score_inner, permute=permute_both,
    ),
    PointMeasure(
        "minibatch_cka",
        "minibatch CKA",
        "Debiased linear CKA averaged over minibatches of 256 consecutive samples.",
        (-1, 1), 1, True, False, _RIGID, "Nguyen et al. 2021, arXiv 2010.15327",
        prepare=cka.prepare_minibatch, score=score_inner, permute=cka.permute_minibatch,
    ),
    PointMeasure(
        "mean_cca",
        "mean CCA",
        "Mean canonical correlation of the features. 1 for any two layers with as many features as samples.",
        (0, 1), 1, True, False, _LINEAR, "Hotelling 1936",
        prepare=cca.prepare_cca, score=cca.score_cca, permute=permute_rows,
    ),
    PointMeasure(
        "svcca",
        "SVCCA",
        "Mean canonical correlation of the directions that hold 99% of each variance.",
        (0, 1), 1, True, False, _RIGID, "Raghu et al. 2017, arXiv 1706.05806",
        prepare=cca.prepare_svcca, score=cca.score_cca, permute=permute_rows,
    ),
    PointMeasure(
        "pwcca",
        "PWCCA",
        "Canonical correlations weighted by what they mean to x; rows are x, columns y.",
        (0, 1), 1, False, False, frozenset[Invariance]({"translation", "scaling"}),
        "Morcos et al. 2018, arXiv 1806.05759",
        prepare=cca.prepare_pwcca, score=cca.score_pwcca, permute=permute_rows,
    ),
    PointMeasure(
        "procrustes",
        "Procrustes distance",
        "How far the samples are apart after the best rotation.",
        (0, 2**0.5), 0, True, True, _RIGID, "Williams et al. 2021, arXiv 2110.14739",
        prepare=prepare_procrustes, score=score_distance, permute=permute_rows,
    ),
    PointMeasure(
        "procrustes_angular",
        "Procrustes angle",
        "The angle between the two representations after the best rotation, 0 to pi/2.",
        (0, math.pi / 2), 0, True, True, _RIGID, "Williams et al. 2021, arXiv 2110.14739",
        prepare=prepare_procrustes, score=score_angular, permute=permute_rows,
    ),
    PointMeasure(
        "rsa",
        "RSA",
        "Rank correlation of the distances of all pairs of samples.",
        (-1, 1), 1, True, False, _RIGID, "Kriegeskorte et al. 2008",
        differentiable=False,
        prepare=prepare_rsa, score=score_inner, permute=permute_both,
    ),
    PointMeasure(
        "mutual_knn",
        "mutual nearest neighbours",
        "The share of each sample's ten nearest neighbours that it keeps. For unrelated representations about "
        "10 / (samples).",
        (0, 1), 1, True, False, _ANGULAR, "Huh et al. 2024, arXiv 2405.07987",
        differentiable=False,
        prepare=neighbors.prepare_neighbors, score=neighbors.score_neighbors, permute=neighbors.permute_neighbors,
    ),
    PointMeasure(
        "linear_regression",
        "linear regression",
        "The share of y's variance that a linear function of x explains; rows are x, columns y.",
        (0, 1), 1, False, False, _RIGID, "Kornblith et al. 2019, arXiv 1905.00414",
        prepare=regression.prepare_regression, score=regression.score_regression,
        permute=regression.permute_regression,
    ),
    PointMeasure(
        "relative",
        "relative representations",
        "Mean cosine of each sample's similarities to 300 anchors. Near 1 also for unrelated layers with positive "
        "features.",
        (-1, 1), 1, True, False, _ANGULAR, "Moschella et al. 2023, arXiv 2209.15430",
        prepare=regression.prepare_relative, score=regression.score_relative,
        permute=regression.permute_relative,
    ),
)  # fmt: skip

MAP_MEASURES: dict[str, MapMeasure] = {measure.name: measure for measure in _MAPS}
POINT_MEASURES: dict[str, PointMeasure] = {measure.name: measure for measure in _POINTS}
MEASURES: dict[str, Measure] = {**MAP_MEASURES, **POINT_MEASURES}
# what papers and other libraries call them; results bear the full name
ALIASES = {"cka": "linear_cka", "cca": "mean_cca"}


def below_chance(name: str, value: float, chance: float) -> str:
    """Say what it means that a measure lies significantly below chance, and what to read instead."""
    instead = "lfm" if name in ("lfm_paper", "lfm_unsquared") else "overlap" if name == "heat" else "heat"
    return (
        f"{name} is {value:.3f} where shuffled rows give {chance:.3f}, significantly on the wrong side of chance: it "
        f"does not order these spaces, and says neither that they are alike nor that they are not; read {instead!r}"
    )


@outside_autocast
def read(fmap: FunctionalMap, measure: str) -> Tensor:
    """Value of a measure of maps, ``[...]``.

    Raises:
        ValueError: no such measure, or one of points.
    """
    _checks.check_choice("measure", measure, MAP_MEASURES)
    return MAP_MEASURES[measure].read(Maps.of(fmap)).reshape(fmap.C.shape[:-2])


def check_measures(measures: str | Iterable[str]) -> tuple[str, ...]:
    """Return the names of the measures asked for, each once, in their order: one name or several, or :data:`ALIASES`.

    Raises:
        TypeError: neither a name nor several.
        ValueError: an unknown name, or none at all.

    Example:
        >>> check_measures("heat"), check_measures(["cka", "heat", "linear_cka"])
        (('heat',), ('linear_cka', 'heat'))
    """
    names = [measures] if isinstance(measures, str) else measures
    if not isinstance(names, Iterable):
        raise TypeError(f"measures must be a name or a sequence of names, got {type(measures).__name__}")
    found = tuple(dict.fromkeys(full_name(name) for name in names))
    if not found:
        raise ValueError("measures must name at least one measure, got none")
    for name in found:
        _checks.check_choice("measures", name, MEASURES)
    return found


def full_name(measure: str) -> str:
    """Return what :data:`MEASURES` calls a measure."""
    if not isinstance(measure, str):
        raise TypeError(f"a measure must be given by its name, got {type(measure).__name__}")
    return ALIASES.get(measure, measure)
