"""Fixing what an eigenbasis leaves open against another one: signs, and rotations inside repeated eigenvalues."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from lfm_torch._precision import matmul, outside_autocast
from lfm_torch.spectral.basis import Basis


@outside_autocast
def align_signs(basis: Basis, reference: Basis) -> Basis:
    """Flip eigenvectors so that each has a product of at least 0 with the vector of the same number in ``reference``.

    Args:
        basis: The basis to turn.
        reference: A basis of the same points, with at least as many pairs.

    Raises:
        ValueError: the bases do not fit together.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> basis = lfm.spectral_basis(lfm.build_graph(torch.randn(30, 3), n_neighbors=5), n_basis=4)
        >>> flipped = lfm.Basis(**(vars(basis) | {"evecs": -basis.evecs}))
        >>> torch.equal(lfm.align_signs(flipped, basis).evecs, basis.evecs)
        True
    """
    target = _target(basis, reference)
    products = (basis.evecs.detach() * target).sum(-2, keepdim=True)
    return replace(basis, evecs=basis.evecs * (1 - 2 * (products < 0).to(basis.evecs.dtype)))


@outside_autocast
def align_subspaces(basis: Basis, reference: Basis, *, tol: float = 1e-3) -> Basis:
    """Rotate inside each (nearly) repeated eigenvalue so that the vectors come as near ``reference`` as they can.

    Neighbouring eigenvalues of ``basis`` less than ``tol`` apart belong together; their vectors are rotated by the
    orthogonal Procrustes solution. Everywhere else this is :func:`align_signs`. The rotated vectors of a group are
    eigenvectors up to ``tol`` times the size of the group; ``residuals`` stay those of the basis given.

    Args:
        basis: The basis to turn.
        reference: A basis of the same points, with at least as many pairs.
        tol: Largest gap inside a group.

    Raises:
        ValueError: the bases do not fit together, or a negative ``tol``.
    """
    if tol < 0:
        raise ValueError(f"tol must not be negative, got {tol}")
    target = _target(basis, reference)
    group = torch.nn.functional.pad((basis.evals.detach().diff(dim=-1) >= tol).cumsum(-1), (1, 0))
    together = group.unsqueeze(-1) == group.unsqueeze(-2)
    # the polar factor of a block-diagonal matrix is block-diagonal: one decomposition for all groups
    left, _, right = torch.linalg.svd((basis.evecs.detach().mT @ target).double() * together)
    rotation = (left @ right * together).to(basis.evecs.dtype)
    return replace(basis, evecs=matmul(basis.evecs, rotation))


def _target(basis: Basis, reference: Basis) -> Tensor:
    if basis.evecs.shape[:-1] != reference.evecs.shape[:-1] or reference.n_basis < basis.n_basis:
        raise ValueError(
            f"reference must have evecs of shape {[*basis.evecs.shape[:-1], f'at least {basis.n_basis}']}, got "
            f"{list(reference.evecs.shape)}"
        )
    return reference.evecs[..., : basis.n_basis].detach().to(basis.evecs)
