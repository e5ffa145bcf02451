"""Two spaces prepared for matching: points, bases, and what unrelated samples of such spaces reach."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single
from lfm_torch.graphs.graph import build_graph
from lfm_torch.maps.correspondence import mutual_pairs
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.compute import spectral_basis

# eigenvectors of the first map, and at most of the final one
START_BASIS = 20
_FINAL_BASIS = 120


class Spaces(NamedTuple):
    """Both spaces prepared for matching, and the share of rows that two unrelated samples of such spaces match."""

    x: Tensor
    y: Tensor
    metric: str
    chance: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, metric: str) -> Spaces:
        """Prepare checked points of both spaces."""
        x, y = _prepared(x, metric), _prepared(y, metric)
        return cls(x, y, metric, max(_mutual_share(x), _mutual_share(y)))

    @property
    def rows(self) -> int:
        """Rows of the smaller space."""
        return min(len(self.x), len(self.y))


def checked_points(name: str, x: ArrayLike) -> Tensor:
    """Return the points ``[n, d]`` of a space in single precision at least.

    Raises:
        TypeError: not floating point.
        ValueError: another shape, fewer than 10 rows, rows that are all equal, values that are not finite.
    """
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


def spectral_bases(spaces: Spaces, n_neighbors: int | None, n_basis: int | None) -> tuple[Basis, Basis]:
    """Return the bases of both spaces; ``n_basis`` None takes an eighth of the rows, 20 to 120."""
    size = min(_FINAL_BASIS, max(START_BASIS, spaces.rows // 8), spaces.rows - 1) if n_basis is None else n_basis
    # the rows are prepared: their Euclidean distance is the chord that "angular" means, and a row at the mean is no
    # error
    graphs = (build_graph(z, n_neighbors=n_neighbors, metric="euclidean") for z in (spaces.x, spaces.y))
    basis_x, basis_y = (spectral_basis(graph, n_basis=size) for graph in graphs)
    return basis_x, basis_y


def _mutual_share(z: Tensor) -> float:
    """Share of mutual nearest neighbours between two random halves: what unrelated samples of one shape reach."""
    half = random_order(len(z), z.device) % 2 == 0
    return len(mutual_pairs(z[half], z[~half])) / min(int(half.sum()), int((~half).sum()))


def random_order(n: int, device: torch.device) -> Tensor:
    """Return numbers from 0 to n - 1 in an order that is the same at every call."""
    return torch.randperm(n, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
