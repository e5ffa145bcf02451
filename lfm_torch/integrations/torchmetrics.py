"""A metric for torchmetrics: similarity of two representations gathered batch by batch, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.measures.table import MAP_MEASURES, check_measures
from lfm_torch.pipeline import check_pair, similarity
from lfm_torch.representations.nonfinite import Nonfinite, check_nonfinite
from lfm_torch.spectral.sizes import check_sizes, sizes_for_batch

try:
    import torchmetrics
except ImportError as error:
    raise ImportError('LFMSimilarity needs torchmetrics: pip install "lfm-torch[lightning]"') from error


class LFMSimilarity(torchmetrics.Metric):  # type: ignore[misc]
    """Similarity of two representations of the same samples, over all batches since the last reset.

    A space needs all its samples at once, so the rows are kept (``compute_on_cpu=True`` keeps them off the GPU) and
    gathered from all ranks; order and number of batches do not matter.

    Args:
        measures: One name, for a scalar, or several, for a dict: see :func:`similarity`.
        n_neighbors: Neighbours in the graphs; None takes 15% of the samples, at most 300.
        n_basis: Eigenvectors per space; None takes a quarter of the samples, at most 50. A number that there are no
            samples for (Lightning's sanity check stops after two batches) is cut to what fits, with a warning; so is
            ``n_neighbors``.
        metric: Metric of the graphs, see :func:`knn`.
        weights: Edge weights, see :func:`build_graph`.
        nonfinite: "drop" leaves samples with a NaN or an infinity out, as in :func:`similarity`.
        **kwargs: Of ``torchmetrics.Metric``.

    Raises:
        ValueError: an unknown measure.

    Example:
        >>> import torch
        >>> metric = LFMSimilarity("heat", n_basis=10)
        >>> for batch in torch.randn(4, 32, 8, generator=torch.Generator().manual_seed(0)):
        ...     metric.update(batch, 2 * batch)
        >>> round(float(metric.compute()), 3)
        1.0
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    # lists of batches; one tensor each after a sync between ranks
    x: Any
    y: Any

    def __init__(
        self,
        measures: str | Sequence[str] = "heat",
        *,
        n_neighbors: int | None = None,
        n_basis: int | None = None,
        metric: Metric = "angular",
        weights: Weights = "gaussian",
        nonfinite: Nonfinite = "raise",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.names = check_measures(measures)
        self.scalar = isinstance(measures, str)
        check_sizes(n_neighbors, n_basis)
        check_nonfinite(nonfinite)
        self.nonfinite: Nonfinite = nonfinite
        self.settings: dict[str, Any] = {
            "n_neighbors": n_neighbors,
            "n_basis": n_basis,
            "metric": metric,
            "weights": weights,
        }
        self._told: set[str] = set()
        self.add_state("x", default=[], dist_reduce_fx="cat")
        self.add_state("y", default=[], dist_reduce_fx="cat")

    def update(self, x: ArrayLike, y: ArrayLike) -> None:
        """Add rows ``x [b, d_x]`` and ``y [b, d_y]`` of the same samples.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: shapes that do not pair, values that are not finite.
        """
        x, y = self._checked("x", x), self._checked("y", y)
        if len(x) != len(y):
            raise ValueError(f"x and y must have shape [b, d] with the same b, got {list(x.shape)} and {list(y.shape)}")
        self.x.append(x.detach())
        self.y.append(y.detach())

    def _checked(self, name: str, x: ArrayLike) -> Tensor:
        _checks.check_dims(name, x, batched=None)
        points = _checks.check_points(name, x) if self.nonfinite == "raise" else _checks.check_floating(name, x)
        # an array shares its memory, which its owner may fill with the next batch
        return points if isinstance(x, Tensor) else points.clone()

    def compute(self) -> Tensor | dict[str, Tensor]:
        """Return the similarity of everything that was added.

        Raises:
            ValueError: nothing was added, or too little for the settings.
        """
        if len(self.x) == 0:
            raise ValueError("x and y must have at least one batch before compute(), got none; call update()")
        x, y = (rows if isinstance(rows, Tensor) else torch.cat(rows) for rows in (self.x, self.y))
        dtype = torch.promote_types(x.dtype, y.dtype)
        x, y = check_pair(x.to(dtype), y.to(dtype), nonfinite=self.nonfinite)
        settings = dict(self.settings)
        if any(name in MAP_MEASURES for name in self.names):
            sizes = (settings["n_neighbors"], settings["n_basis"])
            fitting = sizes_for_batch(type(self).__name__, len(x), *sizes, self._told)
            settings["n_neighbors"], settings["n_basis"] = fitting
        found = similarity(x, y, measures=self.names, **settings)
        return found[self.names[0]] if self.scalar else found
