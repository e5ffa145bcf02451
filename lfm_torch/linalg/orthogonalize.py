"""Orthogonalisation of batched blocks that cannot break down: rank-deficient directions are found, not divided by."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._precision import minus_product, product


def project_once(block: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the orthonormal (or zero) columns of ``basis [..., n, p]``, up to rounding."""
    return minus_product(block, basis, product(basis.mT, block))


def project_out(block: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the orthonormal (or zero) columns of ``basis [..., n, p]``; twice, for accuracy."""
    return project_once(project_once(block, basis), basis)


def orthonormalize(block: Tensor, *bases: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of what ``block [..., n, k]`` adds to the bases, by SVQB (Stathopoulos & Wu 2002).

    The scaled Gram matrix is diagonalised in float64. What lies along the bases is removed before the columns are
    scaled and after: rounding that was small beside the columns may be all that the small ones consist of. Where the
    block is rank deficient the spare columns come back as zeros.

    Args:
        block: ``[..., n, k]``, finite.
        bases: Orthonormal (or zero) columns ``[..., n, p]``, orthogonal to each other.

    Returns:
        ``q [..., n, k]`` and ``present [..., k]`` bool, False for the zero columns.
    """
    present = torch.ones(block.shape[:-2] + block.shape[-1:], dtype=torch.bool, device=block.device)
    for sweep in range(2):
        for basis in bases:
            block = project_once(block, basis)
        gram = product(block.mT, block).double()
        norms = gram.diagonal(dim1=-2, dim2=-1)
        # a unit vector that shrinks in the second sweep lies along the bases after all
        kept = norms > (0 if sweep == 0 else 0.25)
        scale = torch.where(kept, norms, 1.0).rsqrt() * kept
        evals, evecs = torch.linalg.eigh(scale.unsqueeze(-1) * gram * scale.unsqueeze(-2))
        # below this a direction is rounding of the others
        floor = block.shape[-1] * torch.finfo(block.dtype).eps * 4 if sweep == 0 else 0.5
        present = evals > floor * evals.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        inverse_root = torch.where(present, evals, 1.0).rsqrt() * present
        block = product(block, (scale.unsqueeze(-1) * evecs * inverse_root.unsqueeze(-2)).to(block.dtype))
    return block, present
