"""Orthogonalisation of batched blocks that cannot break down: rank-deficient directions are found, not divided by."""

from __future__ import annotations

import torch
from torch import Tensor


def project_once(block: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the orthonormal (or zero) columns of ``basis [..., n, p]``, up to rounding."""
    coefficients = basis.mT @ block
    if block.dim() == 2:  # in one pass: what costs in a long thin block is memory
        return torch.addmm(block, basis, coefficients, alpha=-1)
    flat = (t.reshape(-1, *t.shape[-2:]) for t in (block, basis, coefficients))
    return torch.baddbmm(*flat, alpha=-1).view(block.shape)


def project_out(block: Tensor, basis: Tensor) -> Tensor:
    """Remove the components along the orthonormal (or zero) columns of ``basis [..., n, p]``; twice, for accuracy."""
    return project_once(project_once(block, basis), basis)


def orthonormalize(block: Tensor) -> tuple[Tensor, Tensor]:
    """Orthonormal basis of the span of ``block [..., n, k]`` by SVQB (Stathopoulos & Wu 2002).

    The scaled Gram matrix is diagonalised in float64, so that no factorisation can fail. Where the block is rank
    deficient the spare columns come back as zeros.

    Returns:
        ``q [..., n, k]`` and ``present [..., k]`` bool, False for the zero columns.
    """
    present = torch.ones(block.shape[:-2] + block.shape[-1:], dtype=torch.bool, device=block.device)
    for sweep in range(2):
        gram = (block.mT @ block).double()
        norms = gram.diagonal(dim1=-2, dim2=-1)
        scale = torch.where(norms > 0, norms, 1.0).rsqrt() * (norms > 0)
        evals, evecs = torch.linalg.eigh(scale.unsqueeze(-1) * gram * scale.unsqueeze(-2))
        # below this a direction is rounding of the others; in the second sweep the columns are orthonormal already
        floor = (block.shape[-1] * torch.finfo(block.dtype).eps * 4) if sweep == 0 else 0.5
        present = evals > floor * evals.amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        inverse_root = torch.where(present, evals, 1.0).rsqrt() * present
        block = block @ (scale.unsqueeze(-1) * evecs * inverse_root.unsqueeze(-2)).to(block.dtype)
    return block, present
