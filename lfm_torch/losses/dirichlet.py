"""The Dirichlet energy of the target's eigenfunctions on the student's graph as a loss."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch.losses.alignment_loss import AlignmentLoss
from lfm_torch.spectral.basis import Basis


class DirichletAlignmentLoss(AlignmentLoss):
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
