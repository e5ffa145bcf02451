"""Canonical correlation analysis: mean CCA, SVCCA (arXiv 1706.05806) and PWCCA (arXiv 1806.05759)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.baselines.points import Points, State, compared


def prepare_cca(points: Points, *, variance: float = 1.0) -> State:
    """Orthonormal basis ``U [..., n, r]`` of the features, zero columns beyond its rank, and the rank."""
    U, S, _ = points.factors
    keep = S > 0
    if variance < 1:
        shares = S.square().cumsum(-1)
        keep = keep & (shares - S.square() < variance * shares[..., -1:])
    return U * keep.unsqueeze(-2), keep.sum(-1).to(U.dtype)


def score_cca(a: State, b: State) -> Tensor:
    """Mean of the canonical correlations, as many as the smaller rank."""
    correlations: Tensor = torch.linalg.svdvals(b[0].mT @ a[0])
    return _checks.within(correlations.sum(-1) / torch.minimum(a[1], b[1]).clamp_min(1), 0, 1)


def mean_cca(x: ArrayLike, y: ArrayLike, *, batched: bool = False) -> Tensor:
    """Mean canonical correlation between the features of two representations: ``[...]`` in [0, 1].

    Invariant to any invertible linear map of the features, so it needs many more samples than features: with as many
    features as samples every two representations are equal. Computed through orthonormal bases, never through inverse
    covariances, so near-dependent features do no harm.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Returns:
        ``[...]`` in the dtype of ``x``; the mean is over as many correlations as the smaller rank. A representation
        without variance has similarity 0 to everything.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
        >>> round(float(mean_cca(x, x @ torch.tensor([[1.0, 5, 0, 0], [0, 1, 0, 0], [2, 0, 3, 0], [0, 0, 0, 1]]))), 5)
        1.0

    Source: Hotelling 1936; Raghu et al. 2017.
    """
    return compared(x, y, prepare_cca, score_cca, batched=batched)


def svcca(x: ArrayLike, y: ArrayLike, *, variance: float = 0.99, batched: bool = False) -> Tensor:
    """Mean CCA between the leading singular directions that hold ``variance`` of each: ``[...]`` in [0, 1].

    Invariant to translations, rotations and isotropic scaling.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        variance: Share of the variance that the kept directions reach, in (0, 1].
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite, a share outside (0, 1].

    Source: Raghu et al. 2017 (arXiv 1706.05806), section 2.1.
    """
    if not 0 < variance <= 1:
        raise ValueError(f"variance must be in (0, 1], got {variance}")
    return compared(x, y, functools.partial(prepare_cca, variance=variance), score_cca, batched=batched)


prepare_svcca = functools.partial(prepare_cca, variance=0.99)


def prepare_pwcca(points: Points) -> State:
    """As for CCA, and the features in that basis, ``S V^T [..., r, d]``."""
    U, S, Vt = points.factors
    return U, (S > 0).sum(-1).to(U.dtype), S.unsqueeze(-1) * Vt


def score_pwcca(a: State, b: State) -> Tensor:
    """Canonical correlations, each weighted by how much of x's features its variate accounts for."""
    W, correlations, _ = torch.linalg.svd(a[0].mT @ b[0], full_matrices=False)
    weights: Tensor = (W.mT @ a[2]).abs().sum(-1)
    # beyond the smaller rank the variates are arbitrary
    count = torch.minimum(a[1], b[1]).unsqueeze(-1)
    weights = weights * (torch.arange(weights.shape[-1], device=weights.device) < count)
    weighted: Tensor = (weights * correlations).sum(-1)
    return _checks.within(weighted / weights.sum(-1).clamp_min(1e-300), 0, 1)


def pwcca(x: ArrayLike, y: ArrayLike, *, batched: bool = False) -> Tensor:
    """Projection-weighted CCA, ``sum a_i rho_i / sum a_i`` with ``a_i = sum_j |<h_i, x_j>|``: ``[...]`` in [0, 1].

    h_i are the canonical variates of x and x_j its features, so it is not symmetric: the directions that matter to x
    count. Any invertible linear map of y leaves it as it is; a rotation of x does not, because the sum of magnitudes
    depends on the axes.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite.

    Source: Morcos et al. 2018 (arXiv 1806.05759), section 2.2.
    """
    return compared(x, y, prepare_pwcca, score_pwcca, batched=batched)
