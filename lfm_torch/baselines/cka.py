"""Centered kernel alignment (Kornblith et al. 2019, arXiv 1905.00414)."""

from __future__ import annotations

from torch import Tensor

from lfm_torch import _checks


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Linear CKA, ``|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`` of column-centred representations: ``[...]`` in [0, 1].

    Invariant to rotations and isotropic scaling. Evaluated in float64, through the smaller of the feature and sample
    Gram matrices.

    Args:
        x: ``[..., n, d_x]``.
        y: ``[..., n, d_y]`` with the batch dimensions of ``x``.

    Returns:
        ``[...]`` in the dtype of ``x``. A representation without variance has similarity 0 to everything.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite.

    Example:
        >>> import torch
        >>> x = torch.randn(50, 4)
        >>> bool((linear_cka(x, 3 * x + 1) - 1).abs() < 1e-6)
        True

    Source: Kornblith et al. 2019, equation (5) with a linear kernel.
    """
    x, y = _checks.check_points("x", x), _checks.check_points("y", y)
    if x.shape[:-1] != y.shape[:-1]:
        raise ValueError(f"y must have the rows of x, shape {[*x.shape[:-1], 'd']}, got {list(y.shape)}")
    dtype = x.dtype
    x, y = (points.double() - points.double().mean(-2, keepdim=True) for points in (x, y))
    # a common factor cancels in the ratio; without it squares of squares overflow or vanish at extreme scales
    x, y = (points / points.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300) for points in (x, y))
    n = x.shape[-2]
    if max(x.shape[-1], y.shape[-1]) <= n:
        cross = (y.mT @ x).square().sum((-2, -1))
        own = [(points.mT @ points).square().sum((-2, -1)) for points in (x, y)]
    else:
        gram_x, gram_y = x @ x.mT, y @ y.mT
        cross = (gram_x * gram_y).sum((-2, -1))
        own = [gram_x.square().sum((-2, -1)), gram_y.square().sum((-2, -1))]
    scale = (own[0] * own[1]).sqrt()
    return (cross / scale.clamp_min(1e-300)).to(dtype)
