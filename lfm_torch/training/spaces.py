"""A layer's representation reduced to what later comparisons need, and how it is kept in a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch.baselines.points import Points
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.maps.fmap import FunctionalMap, paired_map
from lfm_torch.measures.map_readings import heat_overlap
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import MAP_MEASURES, POINT_MEASURES
from lfm_torch.pipeline import representation_basis
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.sizes import check_sizes, sizes_for_batch

# Residuals a hundred times the solver's default. The error of a score goes with their square: on CIFAR-10 layers it is
# at most 2e-4, and where a layer moved little a warm start is there after one filter instead of six.
_TOL = 1e-3
# A warm start fails, and costs more than it saves, where a layer moved much: one that moved by more than this between
# the last two measurements (plain heat overlap) is started anew.
_NEAR = 0.96


@dataclass(frozen=True)
class SpaceSettings:
    """How representations become graphs and bases, and which measures will be asked for."""

    measures: tuple[str, ...] = ("heat", "overlap", "lfm")
    n_neighbors: int | None = None
    n_basis: int | None = None
    metric: Metric = "angular"
    weights: Weights = "gaussian"

    def __post_init__(self) -> None:
        check_sizes(self.n_neighbors, self.n_basis)

    def for_rows(self, n: int, told: set[str]) -> SpaceSettings:
        """Settings that fit ``n`` rows, see :func:`sizes_for_batch`."""
        if not self.map_measures:
            return self
        n_neighbors, n_basis = sizes_for_batch("Monitor", n, self.n_neighbors, self.n_basis, told)
        return replace(self, n_neighbors=n_neighbors, n_basis=n_basis)

    def reduce(self, x: Tensor, warm_start: Space | None = None) -> Space:
        """Reduce points ``[n, d]``.

        Raises:
            ValueError: points or settings that no graph or basis can be made of.
        """
        basis, stayed = None, 0.0
        if self.map_measures:
            last = None if warm_start is None or warm_start.basis is None else warm_start.basis.to(x.device)
            basis = representation_basis(
                x,
                n_neighbors=self.n_neighbors,
                n_basis=self.n_basis,
                metric=self.metric,
                weights=self.weights,
                tol=_TOL,
                warm_start=last if warm_start is not None and warm_start.stayed >= _NEAR else None,
            )
            stayed = 0.0 if last is None else float(heat_overlap(paired_map(last, basis), raw=True))
        return Space(basis, x if self.point_measures else None, stayed)

    def compare(self, reference: Space, now: Space) -> dict[str, float]:
        """Return the measures between two spaces of the same samples."""
        scores: dict[str, float] = {}
        if reference.basis is not None and now.basis is not None:
            scores |= self._read(paired_map(reference.basis.to(now.basis.evecs.device), now.basis))
        if reference.points is not None and now.points is not None:
            scores |= self._score(reference.points.to(now.points), now.points)
        return {name: scores[name] for name in self.measures}

    def chance(self, space: Space) -> dict[str, float]:
        """Return the measures of a space to itself with shuffled rows: no correspondence, the same spectrum."""
        generator = torch.Generator().manual_seed(0)
        scores: dict[str, float] = {}
        if space.basis is not None:
            order = torch.randperm(space.basis.n, generator=generator, device="cpu").to(space.basis.evecs.device)
            scores |= self._read(paired_map(replace(space.basis, evecs=space.basis.evecs[order]), space.basis))
        if space.points is not None:
            order = torch.randperm(len(space.points), generator=generator, device="cpu").to(space.points.device)
            scores |= self._score(space.points[order], space.points)
        return {name: scores[name] for name in self.measures}

    @property
    def map_measures(self) -> list[str]:
        """The measures that read a functional map."""
        return [name for name in self.measures if name in MAP_MEASURES]

    @property
    def point_measures(self) -> list[str]:
        """The measures that read the points themselves."""
        return [name for name in self.measures if name in POINT_MEASURES]

    def _read(self, fmap: FunctionalMap) -> dict[str, float]:
        maps = Maps.of(fmap)
        return {name: float(MAP_MEASURES[name].read(maps)) for name in self.map_measures}

    def _score(self, x: Tensor, y: Tensor) -> dict[str, float]:
        measures = {name: POINT_MEASURES[name] for name in self.point_measures}
        return {
            name: float(measure.score(measure.prepare(Points(x)), measure.prepare(Points(y))))
            for name, measure in measures.items()
        }


@dataclass(frozen=True)
class Space:
    """A basis where a measure reads maps, the points where one reads points, and how much of it was there before."""

    basis: Basis | None
    points: Tensor | None
    stayed: float = 0.0

    def state(self) -> dict[str, Any]:
        """Plain values and CPU tensors, for ``torch.load(weights_only=True)``."""
        basis = None
        if self.basis is not None:
            basis = {field.name: _on_cpu(getattr(self.basis, field.name)) for field in fields(Basis)}
        return {"basis": basis, "points": _on_cpu(self.points), "stayed": self.stayed}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Space:
        """Read what :meth:`state` gave."""
        return cls(None if state["basis"] is None else Basis(**state["basis"]), state["points"], state["stayed"])


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value


def dimension(x: Tensor) -> float:
    """Participation ratio ``(tr S)^2 / tr S^2`` of the covariance S of ``x [n, d]``: how many directions it uses.

    1 to min(n - 1, d); 0 where all rows are equal. Free of scale and rotation.
    """
    _checks.check_finite("the representation", x)
    # x - x[0] is exactly 0 for equal rows; dividing keeps squares of squares in range
    x = x - x[:1]
    largest = float(x.abs().max())
    if largest == 0:
        return 0.0
    x = (x / largest).float()
    x = x - x.mean(0, keepdim=True)
    gram = x.mT @ x if x.shape[1] <= x.shape[0] else x @ x.mT
    total = float(gram.diagonal().sum(dtype=torch.float64))
    return total**2 / float(gram.square().sum(dtype=torch.float64))
