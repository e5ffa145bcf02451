"""What the alignment losses share: the settings of the spaces, the sizes of a batch, the basis of a target."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch._warnings import each_once
from lfm_torch.graphs.graph import Graph, build_graph
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.pipeline import representation_basis
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.sizes import check_sizes, default_n_basis, sizes_for_batch

# enough for a target to be followed; a step costs as much as its eigenvectors
_N_BASIS = 32


class AlignmentLoss(nn.Module):
    """A module with the settings of the spaces; a loss adds ``forward``."""

    def __init__(
        self,
        *,
        n_basis: int | None = None,
        n_neighbors: int | None = None,
        metric: Metric = "angular",
        weights: Weights = "gaussian",
        batched: bool = False,
    ) -> None:
        super().__init__()
        check_sizes(n_neighbors, n_basis)
        # what the graph refuses whatever the points is refused here, not at the first step
        build_graph(torch.eye(3, dtype=torch.float32, device="cpu"), n_neighbors=1, metric=metric, weights=weights)
        self.n_basis, self.n_neighbors, self.metric, self.weights = n_basis, n_neighbors, metric, weights
        self.batched = batched
        self._told: set[str] = set()

    def extra_repr(self) -> str:
        """Settings, as ``print`` shows them."""
        settings = ("n_basis", "n_neighbors", "metric", "weights", "batched")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in settings)

    @outside_autocast
    def target_basis(self, target: ArrayLike) -> Basis:
        """Graph and basis of a target ``[n, d]``, to give instead of it where the same rows come again."""
        with torch.no_grad():
            return self._basis(self._points("target", target))

    def _basis(self, x: Tensor) -> Basis:
        n_neighbors, n_basis = self._sizes(x)
        with self._once(x):
            return representation_basis(
                x, n_neighbors=n_neighbors, n_basis=n_basis, metric=self.metric, weights=self.weights
            )

    def _graph(self, x: Tensor) -> Graph:
        n_neighbors, _ = self._sizes(x)
        with self._once(x):
            return build_graph(x, n_neighbors=n_neighbors, metric=self.metric, weights=self.weights)

    def _once(self, x: Tensor) -> AbstractContextManager[None]:
        return each_once(self._told) if _checks.has_values(x) else nullcontext()

    def _sizes(self, x: Tensor) -> tuple[int | None, int]:
        """Neighbours and eigenvectors for a batch of this size."""
        n = x.shape[-2]
        n_neighbors, n_basis = sizes_for_batch(type(self).__name__, n, self.n_neighbors, self.n_basis, self._told)
        return n_neighbors, min(_N_BASIS, default_n_basis(n)) if n_basis is None else n_basis

    def _points(self, name: str, x: ArrayLike) -> Tensor:
        return at_least_single(_checks.check_space(name, x, batched=self.batched))

    def _checked(
        self, x: ArrayLike, target: ArrayLike | Basis, *, paired: bool = True
    ) -> tuple[Tensor, Tensor | Basis]:
        """Points of the student, and of the target where it is no basis already, after checking that they fit."""
        if not isinstance(target, (Tensor, np.ndarray, Basis)):
            raise TypeError(f"target must be a torch.Tensor, a numpy.ndarray or a Basis, got {type(target).__name__}")
        x = self._points("x", x)
        if not isinstance(target, Basis):
            target = self._points("target", target)
        given = target.evecs if isinstance(target, Basis) else target
        if paired and given.shape[:-1] != x.shape[:-1]:
            rows, got = [*x.shape[:-1]], [*given.shape[:-1]]
            raise ValueError(f"target must have the rows of x, {rows} (row i of both from the same input), got {got}")
        if given.device != x.device:
            raise ValueError(f"target must be on the device of x, {x.device}, got {given.device}")
        return x, target
