"""Operators ``orthonormalize_block``, the next block of a Krylov space, and ``batched_eigh``, its small problems.

The space is kept in panels of 16 vectors, each a contiguous ``[n, 16]``: a panel is what a Laplacian product takes as
it is, and a row of it is what a processor works on at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.linalg import LinAlgError  # type: ignore[attr-defined]

from lfm_torch._precision import minus_product, product
from lfm_torch.ops._registry import Operator, register

BLOCK = 16
# a column that loses this much to the panels is projected once more; terms of the image count for so much
_KEPT, _TERMS = 0.7, 0.1
# the least that the other columns must leave of one, for a factorisation to be trusted
_INDEPENDENT = 1e-2
_NEAR = 2


def joined(panels: Tensor) -> Tensor:
    """The vectors of ``panels [..., p, n, 16]`` side by side, ``[..., n, 16 p]``."""
    return panels.transpose(-3, -2).flatten(-2)


def orthonormalize_block_reference(
    panels: Tensor, block: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.orthonormalize_block``.

    Gram-Schmidt against the last two panels and then all, twice where much cancels; two Cholesky factorisations in
    float64.

    Args:
        panels: ``[b, p, n, 16]``, orthonormal vectors and zeros; contiguous but for the first dimension.
        block: ``[b, n, 16]``.
        scale: Size of the terms that were summed to the block.

    Returns:
        ``q [b, n, 16]`` orthonormal and orthogonal to the panels; ``coefficients [b, 16 p, 16]`` and
        ``coupling [b, 16, 16]``, float64, with ``block = panels coefficients + q coupling``; ``sound [b]``: False where
        the columns are too dependent for that: only the coefficients are of use then.
    """
    basis, q = joined(panels), block
    coefficients = torch.zeros(block.shape[0], basis.shape[-1], BLOCK, dtype=torch.float64, device=block.device)
    if panels.shape[1] > _NEAR:  # an image of the last panel lies mostly in the last two
        near = basis[..., -_NEAR * BLOCK :]
        found = product(near.mT, q)
        q, coefficients[:, -_NEAR * BLOCK :] = minus_product(q, near, found), found.double()
    before = q.norm(dim=-2)
    again = torch.ones_like(before, dtype=torch.bool)
    for _ in range(2):
        found = product(basis.mT, q) * again.any(-1)[:, None, None]
        q, coefficients = minus_product(q, basis, found), coefficients + found
        again = q.norm(dim=-2) < _KEPT * before.clamp_min(_TERMS * scale)
    identity = torch.eye(BLOCK, dtype=torch.float64, device=block.device)
    coupling = identity.repeat(block.shape[0], 1, 1)
    sound = torch.ones(block.shape[0], dtype=torch.bool, device=block.device)
    for _ in range(2):
        gram = product(q.mT, q).double()
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        inverse = torch.where(norms > 0, norms, 1.0).reciprocal()
        factor, info = torch.linalg.cholesky_ex(inverse.unsqueeze(-1) * gram * inverse.unsqueeze(-2), upper=True)
        sound = sound & (info == 0) & (factor.diagonal(dim1=-2, dim2=-1).amin(-1) > _INDEPENDENT) & (norms > 0).all(-1)
        factor = torch.where(sound[:, None, None], factor * norms.unsqueeze(-2), identity)
        back = torch.linalg.solve_triangular(factor, identity, upper=True)
        q, coupling = product(q, back.to(q)), factor @ coupling
    return q, coefficients, torch.where(sound[:, None, None], coupling, 0.0), sound


def _samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")

    for b, panels, n in ((1, 0, 40), (3, 1, 60), (2, 3, 130), (1, 2, 5000), (9, 2, 70)):
        space, _ = torch.linalg.qr(randn(b, n, BLOCK * panels))
        space = space.unflatten(-1, (panels, BLOCK)).transpose(-3, -2).contiguous().to(device, dtype)
        yield space, randn(b, n, BLOCK).to(device, dtype), 1.0
        if panels:  # much cancels
            mixed = 0.1 * randn(b, n, BLOCK) + joined(space).cpu().double() @ randn(b, BLOCK * panels, BLOCK)
            yield space[:, : panels - 1], mixed.to(device, dtype), 1.0
            yield space, mixed.to(device, dtype), 100.0


def _fake(panels: Tensor, block: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, p = panels.shape[:2]
    coefficients = block.new_empty(b, BLOCK * p, BLOCK, dtype=torch.float64)
    coupling = block.new_empty(b, BLOCK, BLOCK, dtype=torch.float64)
    return torch.empty_like(block), coefficients, coupling, block.new_empty(b, dtype=torch.bool)


OPERATOR = register(
    Operator(
        "orthonormalize_block",
        "(Tensor panels, Tensor block, float scale) -> (Tensor, Tensor, Tensor, Tensor)",
        orthonormalize_block_reference,
        _fake,
        _samples,
        twin_on_gpu=True,
    )
)


def batched_eigh_reference(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Pure PyTorch twin of ``torch.ops.lfm_torch.batched_eigh``: eigenvalues and eigenvectors of ``[b, p, p]``."""
    evals, evecs = _eigh(matrices)
    return evals, evecs.contiguous()


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Decompose in float64 on a GPU: in float32 torch takes cuSOLVER's Jacobi iteration up to p = 512.

    It stops at residuals of about 1e-5, which is all that a basis may have.
    """
    evals, evecs = torch.linalg.eigh(matrices.double() if matrices.is_cuda else matrices)
    return evals.to(matrices.dtype), evecs.to(matrices.dtype)


def _symmetric_samples(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    for b, p in ((1, 5), (3, 16), (7, 40), (0, 4)):
        matrices = torch.randn(b, p, p, generator=torch.Generator().manual_seed(p), dtype=torch.float64, device="cpu")
        # distances that fix the eigenvectors but for their signs, and signs that the algorithm finds again
        values = torch.diag_embed(torch.arange(p, dtype=torch.float64, device="cpu").expand(b, p))
        rotation = torch.linalg.qr(matrices).Q
        yield ((rotation @ values @ rotation.mT).to(device, dtype),)


EIGH = register(
    Operator(
        "batched_eigh",
        "(Tensor matrices) -> (Tensor, Tensor)",
        batched_eigh_reference,
        lambda matrices: (matrices.new_empty(matrices.shape[:-1]), torch.empty_like(matrices)),
        _symmetric_samples,
        twin_on_gpu=True,
    )
)


def batched_eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues ``[..., p]`` and eigenvectors of symmetric ``matrices [..., p, p]``, not differentiable.

    Raises:
        LinAlgError: values that are not finite.
    """
    if matrices.dim() == 2:
        return _eigh(matrices)
    try:
        # the kernel's threads are outside inference mode, and may not write to what is made inside
        with torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext():
            evals, evecs = EIGH.compiled(matrices.flatten(0, -3))
    except RuntimeError as error:
        if bool(matrices.isfinite().all()):
            raise
        raise LinAlgError(str(error)) from error
    return evals.view(matrices.shape[:-1]), evecs.view(matrices.shape)


def orthonormalize_block(panels: Tensor, block: Tensor, scale: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Call the operator, the twin's signature with leading dimensions ``[...]`` of any number."""
    batch = block.shape[:-2]
    panels, block = panels.reshape(-1, *panels.shape[-3:]), block.reshape(-1, *block.shape[-2:]).contiguous()
    results: tuple[Tensor, ...] = OPERATOR.compiled(panels, block, scale)
    q, coefficients, coupling, sound = (result.reshape((*batch, *result.shape[1:])) for result in results)
    return q, coefficients, coupling, sound
