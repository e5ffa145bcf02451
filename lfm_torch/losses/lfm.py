"""The similarity itself as a loss, differentiated through graph, eigenpairs and map."""

from __future__ import annotations

from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.losses.alignment_loss import AlignmentLoss
from lfm_torch.maps.fmap import paired_map
from lfm_torch.maps.solve import functional_map
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import MAP_MEASURES
from lfm_torch.spectral.basis import Basis

# readings that mean something for a map solved from descriptors: the others take it for the product of two bases
_UNPAIRED = ("lfm", "lfm_paper", "lfm_unsquared", "orthogonality_error", "commutativity_error")


class LFMAlignmentLoss(AlignmentLoss):
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
