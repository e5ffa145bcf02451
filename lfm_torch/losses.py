"""Losses that align a representation to a target: thin modules over graph, basis, map and readings.

Which one to take:

- :class:`DirichletAlignmentLoss` asks that the target's low eigenfunctions vary little along the edges of the
  student's graph. No eigenvector is differentiated: it is cheap and smooth, and the one to start with. Its value is an
  energy without a fixed optimum; watch a similarity beside it.
- :class:`LFMAlignmentLoss` differentiates the similarity itself, through graph, eigenpairs and map. It costs several
  times as much and optimises exactly what is reported; it also serves rows that do not correspond, through descriptors.

Both see one batch as one space: batches of a few hundred rows or more, with several rows of every class, work; batches
of 32 do not hold a neighbour graph worth the name.

``torch.compile(fullgraph=True)`` takes both: see :func:`lfm_torch.spectral_basis` for what that changes.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch._warnings import each_once
from lfm_torch.graphs.graph import Graph, Weights, build_graph
from lfm_torch.graphs.neighbors import Metric
from lfm_torch.maps.fmap import paired_map
from lfm_torch.maps.solve import functional_map
from lfm_torch.measures.map_readings import Maps
from lfm_torch.measures.table import MAP_MEASURES
from lfm_torch.pipeline import check_sizes, representation_basis, sizes_for_batch
from lfm_torch.spectral.basis import Basis, default_n_basis

# readings that mean something for a map solved from descriptors: the others take it for the product of two bases
_UNPAIRED = ("lfm", "lfm_paper", "lfm_unsquared", "orthogonality_error", "commutativity_error")


# enough for a target to be followed; a step costs as much as its eigenvectors
_N_BASIS = 32


class _AlignmentLoss(nn.Module):
    """What both losses share: the settings of the spaces, and the target's basis."""

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


class LFMAlignmentLoss(_AlignmentLoss):
    """``1 - similarity`` of two spaces, differentiated through graph, eigenpairs and map.

    The choice of neighbours is held fixed at each step; the gradient flows through the distances to them.

    Args:
        n_basis: Eigenvectors per space; None takes a quarter of the rows of a batch, at most 32. A number that a batch
            has no rows for (the last of an epoch) is cut to what it has, with a warning.
        n_neighbors: Neighbours in the graphs; None takes 15% of the rows, at most 300; else as ``n_basis``.
        metric: Metric of the graphs, see :func:`lfm_torch.knn`.
        weights: Edge weights, see :func:`lfm_torch.build_graph`.
        batched: Take leading dimensions ``[..., n, d]`` for separate spaces; the loss is their mean. Otherwise what a
            layer gives in more than two dimensions is to be flattened or pooled.
        reading: Which measure of the map; of a distance ("orthogonality_error", ...) the loss is its value. "heat" and
            "overlap" do not depend on the basis chosen inside a repeated eigenvalue; "lfm" does, and has no gradient
            there. With descriptors take "lfm" or "orthogonality_error".

    Raises:
        ValueError: settings that no graph or basis can have, a reading that is no measure of maps.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> loss = LFMAlignmentLoss(n_basis=10)
        >>> bool(loss(x, 3 * x.detach()).abs() < 1e-4)
        True
        >>> loss(x, x.detach().exp()).backward()
        >>> bool(x.grad.norm() > 0)
        True

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3.3 for "lfm"; the others are this library's readings.
    """

    def __init__(
        self,
        *,
        n_basis: int | None = None,
        n_neighbors: int | None = None,
        metric: Metric = "angular",
        weights: Weights = "gaussian",
        batched: bool = False,
        reading: str = "heat",
    ) -> None:
        super().__init__(n_basis=n_basis, n_neighbors=n_neighbors, metric=metric, weights=weights, batched=batched)
        _checks.check_choice("reading", reading, [name for name in MAP_MEASURES if MAP_MEASURES[name].paired])
        self.reading = reading

    def extra_repr(self) -> str:
        """Settings, as ``print`` shows them."""
        return f"{super().extra_repr()}, reading={self.reading!r}"

    @outside_autocast
    def forward(
        self, x: ArrayLike, target: ArrayLike | Basis, descriptors: tuple[ArrayLike, ArrayLike] | None = None
    ) -> Tensor:
        """Return the loss, a scalar in float32 or float64: 0 for equal spaces, about 1 for unrelated ones under "heat".

        Args:
            x: ``[n, d]``, any floating dtype; the work is done in float32 (float64 for float64), also under
                autocast.
            target: ``[n, d_target]`` whose row i comes from the input of row i of ``x``, or the Basis that
                :meth:`target_basis` made of it. A tensor that requires gradients is aligned as well: detach a teacher.
            descriptors: Functions that should correspond, ``(f_x [n, p], f_target [n_target, p])``, as
                :mod:`lfm_torch.descriptors` makes them. Then rows need not: the map is solved for, see
                :func:`functional_map`.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: rows that do not pair, a reading that needs them to, and what graph, basis and map refuse.
        """
        x, target = self._checked(x, target, paired=descriptors is None)
        basis_x = self._basis(x)
        basis_y = target if isinstance(target, Basis) else self._basis(target)
        basis_y = basis_y.to(basis_x.evecs.dtype)
        if descriptors is None:
            fmap = paired_map(basis_x, basis_y)
        else:
            _checks.check_choice("reading with descriptors", self.reading, _UNPAIRED)
            f_x, f_y = (_checks.as_tensor("descriptors", f).to(basis_x.evecs.dtype) for f in descriptors)
            fmap = functional_map(basis_x, basis_y, f_x, f_y)
        measure = MAP_MEASURES[self.reading]
        value = measure.read(Maps.of(fmap)).mean()
        return value if measure.is_distance else 1 - value


class DirichletAlignmentLoss(_AlignmentLoss):
    """Dirichlet energy of the target's basis on the graph of ``x``, ``Tr(Phi_T^T L_x Phi_T) / m``.

    The target's eigenfunctions are constants, and only ``L_x`` is differentiated: one Laplacian product forward, one
    edge pass backward. It is the mean of the target's eigenvalues where both graphs agree, and about 1 where they have
    nothing in common.

    Args:
        n_basis: Eigenvectors of the target; None takes a quarter of the rows of a batch, at most 32. A number that a
            batch has no rows for (the last of an epoch) is cut to what it has, with a warning.
        n_neighbors: Neighbours in the graphs; None takes 15% of the rows, at most 300; else as ``n_basis``.
        metric: Metric of the graphs, see :func:`lfm_torch.knn`.
        weights: Edge weights, see :func:`lfm_torch.build_graph`.
        batched: Take leading dimensions ``[..., n, d]`` for separate spaces; the loss is their mean. Otherwise what a
            layer gives in more than two dimensions is to be flattened or pooled.

    Raises:
        ValueError: settings that no graph or basis can have.

    Example:
        >>> import torch
        >>> x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
        >>> loss = DirichletAlignmentLoss(n_basis=10)
        >>> basis = loss.target_basis(x)
        >>> bool((loss(x, basis) - basis.evals.mean()).abs() < 1e-5)
        True
    """

    @outside_autocast
    def forward(self, x: ArrayLike, target: ArrayLike | Basis) -> Tensor:
        """Return the loss, a scalar in [0, 2] in float32 or float64.

        Args:
            x: ``[n, d]``, any floating dtype; the work is done in float32 (float64 for float64), also under
                autocast.
            target: ``[n, d_target]`` whose row i comes from the input of row i of ``x``, or the Basis that
                :meth:`target_basis` made of it. No gradient flows into it.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: rows that do not pair, and what the graph and the basis refuse.
        """
        x, target = self._checked(x, target)
        laplacian = self._graph(x).laplacian()
        with torch.no_grad():
            basis = target if isinstance(target, Basis) else self._basis(target)
        evecs = basis.evecs.detach().to(laplacian.graph.weight.dtype)
        return (evecs * laplacian.apply(evecs)).sum((-2, -1)).mean() / basis.n_basis
