"""Heat overlap of two graphs by random probes of their Laplacians: no basis, no map."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch.baselines.points import safe_root
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.measures.stacked_maps import HEAT_TIME


@outside_autocast
def heat_overlap_probes(
    laplacian_x: Laplacian,
    laplacian_y: Laplacian,
    *,
    time: float = HEAT_TIME,
    n_probes: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Heat overlap without any eigenvector: cosine between ``exp(-t L) - exp(-t) I`` of both graphs, by random probes.

    ``<U, V> / (|U| |V|)`` with ``U = exp(-t L_x) Z - exp(-t) Z`` without its part along the constant ``D^{1/2} 1``,
    likewise V, for random signs ``Z [n, p]``. Most eigenvalues lie around 1, the mean of all of them; without the
    subtraction they make any two kernels alike at small times, and with the constant unrelated ones come to .2 to .6
    instead of 0. The whole spectrum counts, and its scale, so the values are not those of :func:`heat_overlap`. The
    error falls as ``1 / sqrt(n p)``. Differentiable in the edge weights of both graphs through the products alone.

    Args:
        laplacian_x: Symmetric normalised Laplacian of x, ``[..., n, n]``.
        laplacian_y: That of y, over the same samples in the same order.
        time: Diffusion time t, positive.
        n_probes: Columns p of Z.
        generator: Source of the signs, on the CPU; None for a fixed seed.

    Returns:
        ``[...]`` in [-1, 1].

    Raises:
        ValueError: another normalisation, different numbers of samples, a time that is not positive and finite.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0))
        >>> laplacian = lfm.build_graph(x, n_neighbors=10).laplacian()
        >>> round(float(lfm.heat_overlap_probes(laplacian, laplacian)), 4)
        1.0

    Source: Hutchinson 1990 for the estimator of a trace.
    """
    for name, laplacian in (("laplacian_x", laplacian_x), ("laplacian_y", laplacian_y)):
        if laplacian.normalization != "symmetric":
            raise ValueError(f"{name} must be the symmetric Laplacian, got {laplacian.normalization!r}")
    if laplacian_x.shape != laplacian_y.shape:
        wanted, got = list(laplacian_x.shape), list(laplacian_y.shape)
        raise ValueError(f"laplacian_y must be over the samples of laplacian_x, shape {wanted}, got {got}")
    if not 0 < time < math.inf:
        raise ValueError(f"time must be positive and finite, got {time}")
    _checks.check_range("n_probes", n_probes, 1, 2**31 - 1, "random functions")
    weight = laplacian_x.graph.weight
    generator = generator or torch.Generator().manual_seed(0)
    size = (*laplacian_x.shape[:-1], n_probes)
    signs = (2 * torch.randint(0, 2, size, generator=generator, device=generator.device) - 1).to(weight)
    U, V = (_spread(laplacian, signs, time) for laplacian in (laplacian_x, laplacian_y))
    shared = (U * V).sum((-2, -1))
    return _checks.within(shared / (U.square().sum((-2, -1)) * V.square().sum((-2, -1))).sqrt(), -1, 1)


def _spread(laplacian: Laplacian, signs: Tensor, time: float) -> Tensor:
    """``exp(-t L) Z - exp(-t) Z`` without its part along the constant, where it is ``1 - exp(-t)`` times that of Z."""
    degrees = laplacian.graph.degree
    constant = (safe_root(degrees) / degrees.sum(-1, keepdim=True).sqrt()).unsqueeze(-1)
    along = constant * (constant * signs).sum(-2, keepdim=True)
    return laplacian.heat(signs, time=time) - math.exp(-time) * signs + math.expm1(-time) * along
