"""Readings of a functional map as a number in [0, 1]."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch.functional_map import FunctionalMap


def lfm_similarity(fmap: FunctionalMap, *, squared: bool = True, symmetric: bool = False) -> Tensor:
    """Latent functional map similarity, ``1 - |off(C^T C)|_F^2 / |C^T C|_F^2`` (``squared=False``: ratio of the norms).

    1 where the map carries the eigenfunctions of x to orthogonal functions on y. It is not symmetric in x and y, and
    inside a nearly repeated eigenvalue it depends on the basis chosen there; :func:`subspace_overlap` and
    :func:`heat_overlap` do not.

    Read it beside the overlap: it asks whether the map is orthogonal on what it carries, not how much it carries. Two
    unrelated spaces share their first, nearly constant eigenfunction and little else, so the diagonal entry of that one
    dominates and the score is close to 1 (0.99 for Gaussian noise, n = 600, m = 20), where the overlap is close to
    ``m / n``.

    Args:
        fmap: A functional map, ``C [..., m_y, m_x]``.
        squared: Take the ratio of squared norms, as the paper writes it; False for the published code's ratio of norms.
        symmetric: Average with the value of the adjoint map, ``C C^T``.

    Returns:
        ``[...]`` in [0, 1]. A map that is zero carries nothing and has similarity 0.

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3.3.
    """
    value = _diagonality(fmap.C.mT @ fmap.C, squared)
    if symmetric:
        value = (value + _diagonality(fmap.C @ fmap.C.mT, squared)) / 2
    return value


def _diagonality(gram: Tensor, squared: bool) -> Tensor:
    total = gram.square().sum((-2, -1))
    on = gram.diagonal(dim1=-2, dim2=-1).square().sum(-1)
    present = total > 0
    off = ((total - on) / torch.where(present, total, 1.0)).clamp_min(0)
    if not squared:
        # the root has no derivative at 0; a perfect map is a maximum, where 0 is right
        off = torch.where(off > 0, torch.where(off > 0, off, 1.0).sqrt(), 0.0)
    return torch.where(present, 1 - off, 0.0)


def subspace_overlap(fmap: FunctionalMap) -> Tensor:
    """Share of the smaller basis that the other contains, ``|C|_F^2 / min(m_x, m_y)``: ``[...]`` in [0, 1].

    Symmetric, and free of the choice of basis inside either subspace. For random subspaces of n samples it is about
    ``max(m_x, m_y) / n``.
    """
    return fmap.C.square().sum((-2, -1)) / min(fmap.C.shape[-2:])


def heat_overlap(fmap: FunctionalMap, *, time: float = 2.0) -> Tensor:
    r"""Cosine between the two diffusion kernels ``exp(-t L_x)`` and ``exp(-t L_y)``, cut to the bases.

    ``sum_ij exp(-t (a_i + b_j)) C_ji^2 / sqrt(sum_i exp(-2 t a_i) sum_j exp(-2 t b_j))`` with eigenvalues a of x and b
    of y. Symmetric, in [0, 1], free of the choice of basis, and nearly free of where the spectrum is cut.

    Args:
        fmap: A functional map.
        time: Diffusion time t; 0 gives the subspace overlap of equally large bases.

    Returns:
        ``[...]``.

    Raises:
        ValueError: a time that is negative or not finite.
    """
    if not 0 <= time < math.inf:
        raise ValueError(f"time must be finite and not negative, got {time}")
    heat_x, heat_y = (-time * fmap.evals_x).exp(), (-time * fmap.evals_y).exp()
    shared = torch.einsum("...j,...ji,...i->...", heat_y, fmap.C.square(), heat_x)
    return shared / (heat_x.square().sum(-1) * heat_y.square().sum(-1)).sqrt()
