"""Centered kernel alignment (Kornblith et al. 2019, arXiv 1905.00414): linear, RBF, debiased, and over minibatches."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.baselines.points import (
    Points,
    State,
    compared,
    normalized,
    permute_both,
    permute_rows,
    score_inner,
    score_kernels,
)

_BATCH_SIZE = 256
# up to so many samples a wide layer is kept as its Gram matrix: an inner product per pair instead of a matrix product
_GRAM_SAMPLES = 4096


def prepare_linear(points: Points) -> State:
    """Centred features, or their Gram matrix where that is cheaper to compare, of Frobenius norm 1 as a Gram matrix."""
    n, d = points.features.shape[-2:]
    if d >= n or (8 * d > n and n <= _GRAM_SAMPLES):
        return (normalized(points.gram),)
    own = points.features.mT @ points.features
    return (points.features / own.square().sum((-2, -1), keepdim=True).sqrt().clamp_min(1e-300).sqrt(),)


def score_linear(a: State, b: State) -> Tensor:
    """Inner product of the two Gram matrices, whichever way each is held."""
    x, y = a[0].double(), b[0].double()
    n = x.shape[-2]
    if x.shape[-1] == n and y.shape[-1] == n:
        return score_kernels(a, b)
    if x.shape[-1] == n or y.shape[-1] == n:
        gram, features = (x, y) if x.shape[-1] == n else (y, x)
        return _checks.within(((gram @ features) * features).sum((-2, -1)), 0, 1)
    return _checks.within((y.mT @ x).square().sum((-2, -1)), 0, 1)


def permute_linear(state: State, order: Tensor) -> State:
    """State of the permuted representation."""
    square = state[0].shape[-1] == state[0].shape[-2]
    return permute_both(state, order) if square else permute_rows(state, order)


def linear_cka(x: ArrayLike, y: ArrayLike, *, batched: bool = False) -> Tensor:
    """Linear CKA, ``|Y^T X|_F^2 / (|X^T X|_F |Y^T Y|_F)`` of column-centred representations: ``[...]`` in [0, 1].

    Invariant to translations, rotations and isotropic scaling. Evaluated in float64, through the smaller of the feature
    and sample Gram matrices.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

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
    return compared(x, y, prepare_linear, score_linear, batched=batched)


def prepare_rbf(points: Points, *, bandwidth: float = 1.0) -> State:
    """Centred Gaussian kernel of Frobenius norm 1."""
    squares = points.squared_distances
    n = points.n
    # the lower median off the diagonal, whose zeros come first
    median = squares.flatten(-2).kthvalue(min(n * n, n + (n * (n - 1) + 1) // 2), -1).values[..., None, None]
    # more than half of the pairs at distance 0: no scale to speak of, and the kernel of a constant is constant
    scale = 2 * bandwidth**2 * torch.where(median > 0, median, 1.0)
    kernel = (-squares / scale).exp()
    kernel = (
        kernel - kernel.mean(-1, keepdim=True) - kernel.mean(-2, keepdim=True) + kernel.mean((-2, -1), keepdim=True)
    )
    return (normalized(kernel),)


def rbf_cka(x: ArrayLike, y: ArrayLike, *, bandwidth: float = 1.0, batched: bool = False) -> Tensor:
    """CKA with the kernel ``exp(-d^2 / (2 s^2))``, s a multiple of the median distance: ``[...]`` in [0, 1].

    Invariant to translations, rotations and isotropic scaling. The smaller the bandwidth the more local; scores of
    different bandwidths do not compare. Memory is ``n x n`` in float64.

    Args:
        x: ``[n, d_x]``.
        y: ``[n, d_y]``.
        bandwidth: s over the median distance between two different rows.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: different numbers of rows, values that are not finite, a bandwidth that is not positive.

    Source: Kornblith et al. 2019, equation (5) and section 3.
    """
    if not bandwidth > 0:
        raise ValueError(f"bandwidth must be positive, got {bandwidth}")
    return compared(x, y, functools.partial(prepare_rbf, bandwidth=bandwidth), score_kernels, batched=batched)


def prepare_debiased(points: Points) -> State:
    """U-centred Gram matrix of Frobenius norm 1."""
    _check_rows(points.n)
    return (normalized(_u_centred(points.gram)),)


def debiased_cka(x: ArrayLike, y: ArrayLike, *, batched: bool = False) -> Tensor:
    """Linear CKA from the unbiased estimator of HSIC: ``[...]`` in [-1, 1], around 0 for independent representations.

    :func:`linear_cka` grows with the number of features over samples, towards 1 for unrelated wide layers; this does
    not. Invariant to translations, rotations and isotropic scaling.

    Args:
        x: ``[n, d_x]`` with at least 4 rows.
        y: ``[n, d_y]``.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 4 rows, different numbers of rows, values that are not finite.

    Source: Song et al. 2012, equation (5); Nguyen et al. 2021 (arXiv 2010.15327), equation (3).
    """
    return compared(x, y, prepare_debiased, score_inner, batched=batched)


class MinibatchCKA:
    """Debiased linear CKA of a stream: HSIC averaged over minibatches, so that no array spans all samples.

    Args:
        batched: Take leading dimensions for a batch of pairs, each a stream of its own.

    Example:
        >>> import torch
        >>> x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
        >>> stream = MinibatchCKA()
        >>> for batch in x.split(16):
        ...     stream.update(batch, 2 * batch)
        >>> round(float(stream.compute()), 6)
        1.0

    Source: Nguyen et al. 2021 (arXiv 2010.15327), equations (2) and (3).
    """

    def __init__(self, *, batched: bool = False) -> None:
        self._batched = batched
        self._sums: tuple[Tensor, Tensor, Tensor] | None = None

    def update(self, x: ArrayLike, y: ArrayLike) -> None:
        """Add a minibatch ``x [b, d_x]``, ``y [b, d_y]`` of at least 4 rows.

        Raises:
            TypeError: not floating-point tensors.
            ValueError: fewer than 4 rows, different numbers of rows, values that are not finite.
        """
        x, y = (_checks.check_space(*given, batched=self._batched).double() for given in (("x", x), ("y", y)))
        if x.shape[:-1] != y.shape[:-1]:
            raise ValueError(f"y must have the rows of x, shape {[*x.shape[:-1], 'd']}, got {list(y.shape)}")
        n = x.shape[-2]
        _check_rows(n)
        # not rescaled: the batches of one representation must keep their common scale
        k, l = (_u_centred(p @ p.mT) for p in (x - x.mean(-2, keepdim=True), y - y.mean(-2, keepdim=True)))  # noqa: E741
        new = tuple((a * b).sum((-2, -1)) / (n * (n - 3)) for a, b in ((k, l), (k, k), (l, l)))
        old = self._sums or tuple(torch.zeros_like(value) for value in new)
        self._sums = (old[0] + new[0], old[1] + new[1], old[2] + new[2])

    def compute(self) -> Tensor:
        """Return the CKA of everything seen, ``[...]`` float64.

        Raises:
            ValueError: nothing was seen.
        """
        if self._sums is None:
            raise ValueError("compute must come after update, got no minibatch yet")
        cross, own_x, own_y = self._sums
        return _checks.within(cross / (own_x.clamp_min(0) * own_y.clamp_min(0)).sqrt().clamp_min(1e-300), -1, 1)


def prepare_minibatch(points: Points, *, batch_size: int = _BATCH_SIZE) -> State:
    """U-centred Gram matrices of minibatches side by side, ``[..., n, batch_size]``, of Frobenius norm 1."""
    _check_rows(points.n)
    _checks.check_range("batch_size", batch_size, 4, 2**31 - 1, "at least 4 rows make a minibatch")
    blocks = []
    for rows in _batches(points.n, batch_size):
        x = points.features[..., rows, :]
        x = x - x.mean(-2, keepdim=True)
        size = x.shape[-2]
        block = _u_centred(x @ x.mT) / (size * (size - 3)) ** 0.5
        blocks.append(torch.nn.functional.pad(block, (0, max(0, min(batch_size + 3, points.n) - size))))
    return (normalized(torch.cat(blocks, -2)),)


def _batches(n: int, batch_size: int) -> list[slice]:
    starts = list(range(0, n, batch_size))
    if len(starts) > 1 and n - starts[-1] < 4:  # too few for an estimate of their own: they join the batch before
        starts.pop()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], n], strict=True)]


def permute_minibatch(state: State, order: Tensor) -> State:
    """State with the rows shuffled inside each minibatch: products of rows of different ones were never taken."""
    n, width = state[0].shape[-2:]
    blocks = []
    for rows in _batches(n, _BATCH_SIZE):
        size = rows.stop - rows.start
        block = permute_both((state[0][..., rows, :size],), order[..., rows].argsort(-1))[0]
        blocks.append(torch.nn.functional.pad(block, (0, width - size)))
    return (torch.cat(blocks, -2),)


def minibatch_cka(x: ArrayLike, y: ArrayLike, *, batch_size: int = _BATCH_SIZE, batched: bool = False) -> Tensor:
    """Debiased linear CKA from minibatches of consecutive rows: ``[...]`` in [-1, 1]; :class:`MinibatchCKA` streams.

    Its memory is ``n x batch_size``. Shuffle rows that are sorted, by class say, before.

    Args:
        x: ``[n, d_x]`` with at least 4 rows.
        y: ``[n, d_y]``.
        batch_size: Rows per minibatch, at least 4; a rest of fewer than 4 joins the last one.
        batched: Take leading dimensions of both for a batch of pairs, as :func:`lfm_torch.similarity` does.

    Raises:
        TypeError: not floating-point tensors.
        ValueError: fewer than 4 rows, different numbers of rows, values that are not finite.

    Source: Nguyen et al. 2021 (arXiv 2010.15327), equations (2) and (3).
    """
    return compared(x, y, functools.partial(prepare_minibatch, batch_size=batch_size), score_inner, batched=batched)


def _check_rows(n: int) -> None:
    if n < 4:
        raise ValueError(f"x must have at least 4 rows for the unbiased estimate of HSIC, got {n}")


def _u_centred(gram: Tensor) -> Tensor:
    """U-centre a Gram matrix: off-diagonal row means removed without bias, zero diagonal (Szekely & Rizzo 2014)."""
    n = gram.shape[-1]
    off = gram - torch.diag_embed(gram.diagonal(dim1=-2, dim2=-1))
    sums = off.sum(-1, keepdim=True)
    total = sums.sum(-2, keepdim=True)
    centred = off - (sums + sums.mT) / (n - 2) + total / ((n - 1) * (n - 2))
    return centred - torch.diag_embed(centred.diagonal(dim1=-2, dim2=-1))
