"""The eigenvectors of eigenvalue 0, which are known: the constant comes first, and they are joined to the rest."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.linalg.eigenpairs import Eigenpairs, residual_norms
from lfm_torch.ops.knn import unit_rows


def constant_first(laplacian: Laplacian, known: Tensor) -> Tensor:
    """Turn the null vectors, one per component, so that the first is ``D^{1/2} 1`` (unnormalized: the constant).

    It is the function that every two spaces share, which measures leave out; any basis of the null space is one.
    """
    if known.shape[-1] == 1:
        return known
    degree, count = laplacian.graph.degree, laplacian.graph.n_components
    connected = degree > 0  # the root has no derivative at 0
    root = torch.where(connected, degree, 1.0).sqrt() * connected
    constant = unit_rows(root if laplacian.normalization == "symmetric" else torch.ones_like(degree))
    present = torch.arange(known.shape[-1], device=known.device) < count.unsqueeze(-1)
    wanted = (known * constant.unsqueeze(-1)).sum(-2) * present
    # the reflection that takes the first axis to the direction of `wanted`; none where it is there, or where the null
    # vectors asked for are all of nodes without edges
    norm = wanted.norm(dim=-1, keepdim=True)
    axis = wanted / torch.where(norm > 0, norm, 1.0)
    axis = torch.cat([axis[..., :1] - 1, axis[..., 1:]], -1) * (norm > 0)
    length = axis.square().sum(-1, keepdim=True).unsqueeze(-1)
    outer = axis.unsqueeze(-1) * axis.unsqueeze(-2)
    return known - 2 * product(known, outer) / torch.where(length > 0, length, 1.0)


def only_null_space(laplacian: Laplacian, known: Tensor, tol: float) -> tuple[Eigenpairs, Tensor]:
    """Eigenpairs of the null vectors alone, and which of them are within the tolerance."""
    zeros = known.detach().new_zeros(known.shape[:-2] + known.shape[-1:])
    residuals = residual_norms(laplacian, zeros, known).detach()
    return Eigenpairs(zeros, known, residuals, 0), residuals <= tol * laplacian.upper_bound / 2


def with_null_space(
    laplacian: Laplacian, known: Tensor, rest: Eigenpairs, converged: Tensor, n_basis: int, tol: float
) -> tuple[Eigenpairs, Tensor]:
    """Join the known eigenvectors of eigenvalue 0 and the computed rest, graph by graph of the batch."""
    null, found = only_null_space(laplacian, constant_first(laplacian, known), tol)
    evecs, *rows = (
        torch.cat(parts, -1)
        for parts in (
            (null.evecs, rest.evecs),
            (null.evals, rest.evals),
            (null.residuals, rest.residuals),
            (found, converged),
        )
    )
    if bool((laplacian.graph.n_components >= known.shape[-1]).all()):  # no padding to skip
        evecs, rows = evecs[..., :n_basis], [row[..., :n_basis] for row in rows]
    else:  # a graph with c components takes its first c null vectors, then skips the padding of the others
        position = torch.arange(n_basis, device=known.device)
        components = laplacian.graph.n_components.clamp_max(known.shape[-1]).unsqueeze(-1)
        column = torch.where(position < components, position, position - components + known.shape[-1])
        evecs = evecs.gather(-1, column.unsqueeze(-2).expand(*evecs.shape[:-1], n_basis))
        rows = [row.gather(-1, column) for row in rows]
    evals, residuals, converged = rows
    return rest._replace(evals=evals, evecs=evecs, residuals=residuals), converged
