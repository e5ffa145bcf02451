"""The Rayleigh-Ritz step on any set of vectors, dependent ones included."""

from __future__ import annotations

import torch
from torch import Tensor

from lfm_torch._precision import product
from lfm_torch.ops.krylov import batched_eigh


def rayleigh_ritz(vectors: Tensor, image: Tensor, n_pairs: int) -> tuple[Tensor, Tensor, Tensor]:
    """The smallest Ritz pairs of an operator on the span of ``vectors [..., n, k]``, given its ``image`` of them.

    The small problem is solved in float64 through the eigenvectors of the scaled Gram matrix, so that nothing can fail:
    directions that are rounding of others are left out.

    Returns:
        ``theta [..., p]`` ascending, Ritz vectors and their images ``[..., n, p]``, p at most k. Where the span has
        fewer than p dimensions the last vectors are 0 and their values infinite.
    """
    gram, projected = product(vectors.mT, vectors).double(), product(vectors.mT, image).double()
    norms = gram.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(norms > 0, norms, 1.0).rsqrt() * (norms > 0)
    evals, evecs = batched_eigh(scale.unsqueeze(-1) * gram * scale.unsqueeze(-2))
    present = evals > 4 * vectors.shape[-1] * torch.finfo(vectors.dtype).eps
    transform = scale.unsqueeze(-1) * evecs * (torch.where(present, evals, 1.0).rsqrt() * present).unsqueeze(-2)
    reduced = transform.mT @ (projected + projected.mT) @ transform / 2
    # a missing direction would be a Ritz value 0: push it beyond the others
    beyond = 2 * reduced.abs().sum(-1).amax(-1) + 1
    reduced = reduced + torch.diag_embed(~present * beyond.unsqueeze(-1))
    theta, rotation = batched_eigh(reduced)
    theta, rotation = theta[..., :n_pairs], (transform @ rotation[..., :n_pairs]).to(vectors.dtype)
    found = torch.arange(theta.shape[-1], device=theta.device) < present.sum(-1, keepdim=True)
    theta = torch.where(found, theta, torch.inf).to(vectors.dtype)
    return theta, product(vectors, rotation), product(image, rotation)
