"""The weighted edges of symmetric graphs as a CSR matrix, and what follows from them alone: degrees and components."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lfm_torch import _checks, ops


class Edges:
    """What a Laplacian needs of a graph; :class:`Graph` adds how it was built.

    A batch of equal graphs is one block-diagonal matrix: row ``b * n_nodes + i`` is node ``i`` of graph ``b``. A ragged
    batch is one graph of all nodes, of which graph ``b`` has those from ``offsets[b]`` to ``offsets[b + 1]``.
    """

    rowptr: Tensor
    col: Tensor
    weight: Tensor
    n_nodes: int
    batch_shape: tuple[int, ...]
    offsets: Tensor | None

    @abstractmethod
    def unbatch(self) -> Sequence[Edges]:
        """Return the graphs of a batch one by one."""

    @property
    def degree(self) -> Tensor:
        """Sum of the weights at each node, ``[..., n]``."""
        return self._cached_degree if self.is_constant else self._sum_weights()

    @property
    def is_constant(self) -> bool:
        """Whether what follows from the weights may be kept: not where gradients are recorded, or a program traced."""
        # a recorded one would outlive its first backward pass
        recorded = torch.is_grad_enabled() and self.weight.requires_grad
        return not recorded and _checks.has_values(self.weight)

    @functools.cached_property
    def _cached_degree(self) -> Tensor:
        with torch.no_grad():
            return self._sum_weights()

    def _sum_weights(self) -> Tensor:
        none = self.weight.new_zeros(self.rowptr.numel() - 1)
        ones = torch.ones_like(none)
        sums = ops.laplacian_product(self.rowptr, self.col, self.weight, none, -ones, ones, ones.unsqueeze(1))
        return sums.view(*self.batch_shape, self.n_nodes)

    @functools.cached_property
    def component_labels(self) -> Tensor:
        """Connected component of each node, ``[..., n]`` int64, numbered over the whole batch by the smallest node.

        An edge whose weight underflowed to 0 connects nothing.
        """
        rowptr, col = self.rowptr, self.col
        connects = self.weight.detach() > 0
        if not bool(connects.all()):
            before = torch.cat([rowptr.new_zeros(1), connects.cumsum(0)])
            rowptr, col = before[rowptr], col[connects]
        return ops.connected_components(rowptr, col).view(*self.batch_shape, self.n_nodes)

    @functools.cached_property
    def n_components(self) -> Tensor:
        """Number of connected components of each graph, ``[...]`` int64; ``[b]`` for a ragged batch."""
        labels = self.component_labels
        if self.offsets is not None:
            # numbered by their smallest node: so many begin before a graph does
            begun = torch.cat([labels.new_zeros(1), labels.cummax(0).values + 1])[self.offsets.to(labels.device)]
            return begun.diff()
        return labels.amax(-1) - labels.amin(-1) + 1
