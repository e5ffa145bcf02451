"""How representations are compared, and the names that everything stored has under these settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lfm_torch import _checks
from lfm_torch.comparison.jobs.library import library_digest
from lfm_torch.graphs.neighbors import default_n_neighbors
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import MAP_MEASURES, POINT_MEASURES
from lfm_torch.representations.fingerprints import digest
from lfm_torch.spectral.sizes import default_n_basis


@dataclass(frozen=True)
class Settings:
    """How representations are compared, as :func:`compare` takes it."""

    measures: tuple[str, ...]
    n_neighbors: int | None
    n_basis: int | None
    metric: Metric
    weights: Weights

    @property
    def map_measures(self) -> list[str]:
        """The measures that read a functional map."""
        return [name for name in self.measures if name in MAP_MEASURES]

    @property
    def point_measures(self) -> list[str]:
        """The measures that read the points themselves."""
        return [name for name in self.measures if name in POINT_MEASURES]

    @property
    def kinds(self) -> list[str]:
        """What is stored of a representation: its basis, and what each measure of points needs of it."""
        return ["basis"] * bool(self.map_measures) + self.point_measures

    def measures_of(self, kind: str) -> list[str]:
        """The measures that read pieces of a kind."""
        return self.map_measures if kind == "basis" else [kind]

    def neighbors_of(self, n: int) -> int:
        """Neighbours in the graphs of ``n`` samples."""
        return default_n_neighbors(n) if self.n_neighbors is None else self.n_neighbors

    def basis_of(self, n: int) -> int:
        """Eigenvectors of the spaces of ``n`` samples."""
        return default_n_basis(n) if self.n_basis is None else self.n_basis

    def check_against(self, n: int) -> None:
        """Raise ValueError where ``n`` samples are too few."""
        if n < 2:
            raise ValueError(f"representations must have at least 2 rows, got {n}")
        if self.map_measures:
            _checks.check_enough("representations", n)
            n_basis = self.basis_of(n)
            _checks.check_range("n_basis", n_basis, 1, n - 1, f"less than the {n} samples")
            centered = [name for name in self.map_measures if MAP_MEASURES[name].centered]
            if centered and n_basis < 2:
                left_out = f"{centered[0]!r}, which leaves the constant function out"
                raise ValueError(f"n_basis must be at least 2 for {left_out}, got {n_basis}")
            if self.n_neighbors is not None:
                _checks.check_range("n_neighbors", self.n_neighbors, 1, n - 1, f"there are {n} samples")

    def key(self, kind: str, identity: str) -> str:
        """Name the piece of a representation with this identity, which stands for its values."""
        if kind != "basis":
            return digest("state", kind, identity, library_digest())
        # a number that is None follows from the samples, which the identity stands for
        graph = (self.n_neighbors, self.n_basis, self.metric, self.weights)
        return digest("basis", identity, *graph, library_digest())


def rows_key(identity: str) -> str:
    """Name the piece that holds which rows of a representation are not finite."""
    return digest("rows", identity, library_digest())


def identity_without(identity: str, left_out: Sequence[int]) -> str:
    """Name what a representation is without some of its rows."""
    return digest("without", identity, list(left_out)) if left_out else identity


def value_name(*parts: str | int) -> bytes:
    """Name what values are of, in the index: by its content and the code that reads it."""
    return bytes.fromhex(digest(*parts, library_digest()))[:20]
