"""Block Lanczos with full reorthogonalisation and thick restart (Wu & Simon 2000), batched.

It keeps the whole Krylov space, so that every operator product counts: on graph Laplacians it needs several times fewer
than a method that forgets its past, and a small block makes a product nearly as cheap as one column.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch.linalg.eigenpairs import Eigenpairs, SymmetricOperator, dense_eigenpairs
from lfm_torch.linalg.orthogonalize import orthonormalize, project_out

_BLOCK = 16
_MAX_ITERATIONS = 1000


def krylov(
    operator: SymmetricOperator,
    n_pairs: int,
    *,
    tol: float,
    known: Tensor,
    start: Tensor | None = None,
    max_iterations: int | None = None,
    generator: torch.Generator | None = None,
) -> Eigenpairs:
    """The smallest eigenpairs in the complement of the known eigenvectors; arguments as in :func:`lobpcg`.

    ``iterations`` counts operator products of one block; 0 where the space would hold a quarter of the problem or more
    and the dense decomposition is taken instead.
    """
    room, block = operator.shape[-1] - known.shape[-1], _BLOCK
    if room < 4 * (n_pairs + block):
        return dense_eigenpairs(operator, n_pairs, known)
    capacity = min(room - block, max(8 * n_pairs, 256))
    kept = n_pairs + n_pairs // 2
    # enough steps for the space to hold what is asked for, whatever the limit
    limit = max(_MAX_ITERATIONS if max_iterations is None else max_iterations, n_pairs // block + 1)
    target = tol * operator.upper_bound / 2

    # the known vectors come first, so that one projection removes them and the space
    first = known.shape[-1]
    shape = operator.shape[:-1]
    space = torch.cat([known, known.new_empty(*shape, capacity + block)], -1)
    projected = torch.zeros(*shape[:-1], capacity, capacity, dtype=torch.float64, device=known.device)
    begin = torch.randn(*shape, block, dtype=known.dtype, device=known.device, generator=generator)
    # the sum of the given vectors, column by column, holds a component of each: a Krylov space finds them again at once
    if start is not None:
        for column in range(0, start.shape[-1], block):
            given = start[..., column : column + block]
            begin[..., : given.shape[-1]] += given * operator.shape[-1] ** 0.5
    space[..., first : first + block] = _fill(project_out(begin, known), known, generator)[0]
    size, next_check = 0, 3 * n_pairs
    history: list[tuple[int, float]] = []
    for iteration in range(1, limit + 1):
        coupling = _extend(operator, space, projected, size, first, generator)
        size += block
        full = size + block > capacity
        if not (full or size >= next_check or iteration == limit):
            continue
        theta, rotation = torch.linalg.eigh(projected[..., :size, :size])
        # residual of a Ritz pair: the part of L v that leaves the space
        worst = float((coupling @ rotation[..., -block:, :n_pairs]).norm(dim=-2).max())
        if worst <= 0.5 * target or iteration == limit:
            vectors = space[..., first : first + size] @ rotation[..., :n_pairs].to(space.dtype)
            pairs = _polish(operator, vectors, iteration)
            if iteration == limit or bool((pairs.residuals <= target).all()):
                return pairs
        history.append((size, worst))
        next_check = size + _blocks_to_wait(history, target) * block
        if full:
            _restart(space[..., first:], projected, theta, rotation, kept)
            size, history = kept, []
            next_check = size + 4 * block
    raise AssertionError("unreachable: the last iteration returns")


def _extend(
    operator: SymmetricOperator,
    space: Tensor,
    projected: Tensor,
    size: int,
    first: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Take the block at ``size`` into the space and append the next one; returns the coupling to that one.

    The operator is shifted to the middle of its spectrum, where most eigenvalues of a graph lie: little then cancels in
    the projection, and one pass of it is enough unless the norms say otherwise.
    """
    last = size + _BLOCK
    block = space[..., first + size : first + last].contiguous()
    image = operator.apply(block, b=-operator.upper_bound / 2)
    basis = space[..., : first + last]
    before = image.norm(dim=-2)
    coefficients = basis.mT @ image
    image = image - basis @ coefficients
    if bool((image.norm(dim=-2) < 0.7 * before).any()):
        second = basis.mT @ image
        image = image - basis @ second
        coefficients = coefficients + second
    column = coefficients[..., first:, :].double()
    projected[..., :last, size:last] = column
    projected[..., size:last, :last] = column.mT
    corner = projected[..., size:last, size:last]
    corner.copy_((corner + corner.mT) / 2)
    following, coupling = _fill(image, basis, generator)
    space[..., first + last : first + last + _BLOCK] = following
    return coupling.double()


def _fill(image: Tensor, basis: Tensor, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
    """Orthonormal block that spans ``image`` (already orthogonal to ``basis``), and the coefficients of image in it.

    Directions that image lacks (the space is invariant, or nearly) are replaced by noise, with coefficient 0.
    """
    q, present = orthonormalize(image)
    if not bool(present.all()):
        noise = torch.randn(image.shape, dtype=image.dtype, device=image.device, generator=generator)
        noise = project_out(project_out(noise * ~present.unsqueeze(-2), basis), q)
        q, _ = orthonormalize(q + noise)
    return q, q.mT @ image


def _restart(space: Tensor, projected: Tensor, theta: Tensor, rotation: Tensor, kept: int) -> None:
    """Shrink the space to its ``kept`` lowest Ritz vectors, followed by the block that continues it."""
    size = rotation.shape[-1]
    following = space[..., size : size + _BLOCK].clone()
    space[..., :kept] = space[..., :size] @ rotation[..., :kept].to(space.dtype)
    space[..., kept : kept + _BLOCK] = following
    projected.zero_()
    projected.diagonal(dim1=-2, dim2=-1)[..., :kept] = theta[..., :kept]


def _blocks_to_wait(history: list[tuple[int, float]], target: float) -> int:
    """Blocks until the next look, from the rate at which the residual fell between the last two."""
    if len(history) < 2 or not 0 < history[-1][1] < history[-2][1]:
        return 4
    (before, high), (now, low) = history[-2:]
    rate = (torch.tensor(high / low).log() / (now - before)).item()
    needed = torch.tensor(max(low / (0.5 * target), 1.0)).log().item() / rate
    # convergence speeds up as it goes: look a little before the straight line would be there
    return max(1, min(4, round(0.75 * needed / _BLOCK)))


def _polish(operator: SymmetricOperator, vectors: Tensor, iterations: int) -> Eigenpairs:
    """A last Rayleigh-Ritz step on orthonormalised vectors, with true residuals."""
    vectors, _ = orthonormalize(vectors)
    image = operator.apply(vectors)
    theta, rotation = torch.linalg.eigh((vectors.mT @ image).double())
    theta, rotation = theta.to(vectors.dtype), rotation.to(vectors.dtype)
    vectors, image = vectors @ rotation, image @ rotation
    residuals = torch.linalg.vector_norm(image - vectors * theta.unsqueeze(-2), dim=-2)
    return Eigenpairs(theta, vectors, residuals, iterations)
