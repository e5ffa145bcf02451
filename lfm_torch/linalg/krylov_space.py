"""The space that block Lanczos builds: kept orthonormal, panel by panel, beside known vectors, and projected on."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.linalg.orthogonalize import orthonormalize, project_out
from lfm_torch.ops.krylov import BLOCK, batched_eigh, joined, orthonormalize_block

# what is left of an image is rounding where it is no more than so many times that of the image
_ROUNDING = 100
_CLEAR = 0.05


class KrylovSpace:
    """Orthonormal panels of 16 vectors, known ones first, and the projection of a symmetric operator on the others.

    Panel i is ``panels[..., i, :, :]``, ``[..., n, 16]``: a block as products take it.
    """

    def __init__(self, known: Tensor, capacity: int, generator: torch.Generator | None) -> None:
        *batch, n, count = known.shape
        self.first, self.used, self.generator = -(-count // BLOCK), 0, generator
        self.capacity = capacity // BLOCK
        # the known vectors come first, filled up with zeros, so that one projection removes them and the space
        self.panels = known.new_empty(*batch, self.first + self.capacity + 1, n, BLOCK)
        self._store(0, torch.nn.functional.pad(known, (0, self.first * BLOCK - count)))
        size = self.capacity * BLOCK
        self.projected = torch.empty((*batch, size, size), dtype=torch.float64, device=known.device)

    def start(self, block: Tensor) -> None:
        """Begin with this block, freed of the known vectors."""
        self._append(self._next(block, self.first, float(block.norm(dim=-2).max()))[0])

    @property
    def size(self) -> int:
        """Vectors whose images are known."""
        return self.used * BLOCK

    @property
    def full(self) -> bool:
        """Whether another block does not fit."""
        return self.used == self.capacity

    def extend(self, image: Tensor, scale: float) -> Tensor:
        """Take the last block in, given its image, and append the next; returns the coupling to that one.

        ``scale`` is the size of the terms that were summed to the image.
        """
        begin, count = self.size, self.first + self.used + 1
        following, coefficients, coupling = self._next(image, count, scale)
        self.used += 1
        last, column = self.size, coefficients[..., self.first * BLOCK :, :]
        self.projected[..., :last, begin:last] = column
        self.projected[..., begin:last, :last] = column.mT
        corner = self.projected[..., begin:last, begin:last]
        corner.copy_((corner + corner.mT) / 2)
        self._append(following)
        return coupling

    def ritz(self, graph: int | None = None, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
        """Ritz values and the rotation to their vectors, of all graphs or of one, counted along the batch."""
        projected = self.projected[..., : self.size, : self.size]
        if graph is not None:
            projected = projected.flatten(0, -3)[graph]
        theta, rotation = batched_eigh(projected.to(dtype))
        return theta.double(), rotation.double()

    def combine(self, rotation: Tensor) -> Tensor:
        """Vectors of the space with these coefficients."""
        panels = self.panels[..., self.first : self.first + self.used, :, :]
        return product(joined(panels), rotation.to(panels.dtype))

    def restart(self, theta: Tensor, rotation: Tensor, kept: int) -> None:
        """Shrink to the ``kept`` lowest Ritz vectors, whole panels, followed by the block that continues the space."""
        self._store(self.first, self.combine(rotation[..., :kept]))
        self.used = kept // BLOCK
        self._append(self.block)
        self.projected.zero_()
        self.projected.diagonal(dim1=-2, dim2=-1)[..., :kept] = theta[..., :kept]

    def _append(self, block: Tensor) -> None:
        """Put the last block, whose image is wanted next, after those whose images are known."""
        self.block = block
        self.panels[..., self.first + self.used, :, :] = block

    def _store(self, at: int, vectors: Tensor) -> None:
        panels = vectors.reshape(*vectors.shape[:-1], -1, BLOCK).transpose(-3, -2)
        self.panels[..., at : at + panels.shape[-3], :, :] = panels

    def _next(self, image: Tensor, count: int, scale: float) -> tuple[Tensor, Tensor, Tensor]:
        """Orthonormal block of what the image adds to the first panels; its coefficients in those, and in the block."""
        q, coefficients, coupling, sound = orthonormalize_block(self.panels[..., :count, :, :], image, scale)
        beyond = coupling.norm(dim=-2)
        # far above rounding, whatever there was within: no need to look
        clear = bool((sound & (beyond > _CLEAR * scale).all(-1)).all())
        if not clear:
            within = coefficients.norm(dim=-2).clamp_min(scale)
            clear = bool((sound & (beyond > _ROUNDING * torch.finfo(q.dtype).eps * within).all(-1)).all())
        if not clear:
            basis = joined(self.panels[..., :count, :, :])
            q, factor = _fill(image, basis, scale, self.generator)
            coupling = factor.double()
        return q, coefficients, coupling


def _fill(image: Tensor, basis: Tensor, scale: float, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Orthonormal block that spans what ``image`` adds to the basis, and the coefficients of that in it.

    Directions that image lacks, beside terms of size ``scale`` (the space is invariant, or nearly), are replaced by
    noise, with coefficient 0.
    """
    rounding = _ROUNDING * torch.finfo(image.dtype).eps * image.norm(dim=-2, keepdim=True).clamp_min(scale)
    image = _above(project_out(image, basis), rounding)
    q, present = orthonormalize(image, basis)
    if not bool(present.all()):
        # directions too small beside the others to be told from rounding: once those are removed they can be
        small, found = orthonormalize(_above(project_out(image, q), rounding), basis, q)
        # found ones come last there, missing ones first here
        q, present = q + small.flip(-1) * ~present.unsqueeze(-2), present | found.flip(-1)
    if not bool(present.all()):
        noise = torch.randn(image.shape, dtype=image.dtype, device=image.device, generator=generator)
        noise, _ = orthonormalize(noise, basis, q)
        missing = ((~present).cumsum(-1) - 1).clamp_min(0).unsqueeze(-2).expand_as(noise)
        q = torch.where(present.unsqueeze(-2), q, noise.flip(-1).gather(-1, missing))
    return q, product(q.mT, image)


def _above(block: Tensor, least: Tensor) -> Tensor:
    """The columns of at least these norms; zeros in the place of the others."""
    kept: Tensor = block * (block.norm(dim=-2, keepdim=True) > least)
    return kept
