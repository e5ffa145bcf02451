"""Functions of the spectrum: heat that has flown from anchors, heat and wave kernel signatures."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.descriptors.anchors import anchor_rows
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.spectral.basis import Basis

Times = ArrayLike | Sequence[float]


@outside_autocast
def heat_diffusion(
    source: Basis | Laplacian, anchors: IndexLike, *, times: Times | None = None, n_times: int = 8
) -> Tensor:
    """Heat that has flown from each anchor to every point, ``exp(-t L)[i, a]``.

    Args:
        source: A Laplacian: exact, by polynomials in L; or a Basis, ``evecs [..., n, m]``: cut to its eigenpairs,
            ``sum_j exp(-t lambda_j) phi_j(i) phi_j(a)``.
        anchors: ``[p]`` indices of rows.
        times: ``[q]`` diffusion times; None: :func:`heat_times` for a basis, powers of two from 1 for a Laplacian.
        n_times: How many, where no times are given.

    Returns:
        ``[..., n, p q]``, the times of one anchor side by side.

    Raises:
        TypeError, ValueError: anchors that are not integers, or out of range.
    """
    if isinstance(source, Basis):
        return heat_kernel_signature(source, times=times, n_times=n_times, landmarks=anchors)
    anchors = anchor_rows(anchors, source.graph.n_nodes, source.graph.weight.device)
    steps = [2.0**k for k in range(n_times)]
    if times is not None:
        steps = _times(times, source.graph.weight).tolist()
    delta = source.graph.weight.new_zeros(source.graph.n_nodes, len(anchors))
    delta[anchors, torch.arange(len(anchors), device=delta.device)] = 1
    batch = source.graph.batch_shape
    heat = source.heat(delta.expand(*batch, *delta.shape).contiguous(), time=steps)
    return heat.movedim(0, -1).flatten(-2)


@outside_autocast
def heat_times(basis: Basis, n_times: int = 8) -> Tensor:
    """Times from the scale of the smallest to that of the largest structure of the basis: ``[..., n_times]``.

    Geometric between ``4 ln 10 / lambda_max`` and ``4 ln 10 / lambda_2`` (Sun, Ovsjanikov & Guibas 2009), lambda_2 the
    first eigenvalue that is not 0.
    """
    evals = at_least_single(basis.evals)
    largest = evals.amax(-1).clamp_min(torch.finfo(evals.dtype).eps)
    positive = torch.where(evals > 1e-6 * largest.unsqueeze(-1), evals, torch.inf).amin(-1)
    low, high = (4 * math.log(10) / value for value in (largest, torch.minimum(positive, largest)))
    share = torch.linspace(0, 1, n_times, dtype=evals.dtype, device=evals.device)
    return low.unsqueeze(-1) * (high / low).unsqueeze(-1) ** share


@outside_autocast
def heat_kernel_signature(
    basis: Basis, *, times: Times | None = None, n_times: int = 8, landmarks: IndexLike | None = None
) -> Tensor:
    """Heat kernel signature ``sum_j exp(-t lambda_j) phi_j(i)^2``, or from landmarks ``... phi_j(i) phi_j(l)``.

    Args:
        basis: Basis, ``evecs [..., n, m]``.
        times: ``[q]`` or ``[..., q]``; None: :func:`heat_times`.
        n_times: How many, where no times are given.
        landmarks: ``[p]`` indices of rows; None for the global signature.

    Returns:
        ``[..., n, q]``, with landmarks ``[..., n, p q]``.

    Raises:
        TypeError, ValueError: landmarks that are not integers, or out of range.

    Source: Sun, Ovsjanikov & Guibas 2009 (SGP), equation 3.
    """
    basis = at_least_single(basis)
    times = heat_times(basis, n_times) if times is None else _times(times, basis.evals)
    return _filtered(basis, (-times.unsqueeze(-1) * basis.evals.unsqueeze(-2)).exp(), landmarks)


@outside_autocast
def wave_kernel_signature(basis: Basis, *, n_energies: int = 8, landmarks: IndexLike | None = None) -> Tensor:
    """Wave kernel signature: ``sum_j g_e(lambda_j) phi_j(i)^2`` with log-normal windows g_e of sum 1.

    The windows stand between the first eigenvalue that is not 0 and the last, seven of their distances wide.

    Args:
        basis: Basis, ``evecs [..., n, m]``.
        n_energies: Number of windows.
        landmarks: ``[p]`` indices of rows, as in :func:`heat_kernel_signature`.

    Returns:
        ``[..., n, q]``, with landmarks ``[..., n, p q]``.

    Source: Aubry, Schlickewei & Cremers 2011, equations 5 and 6.
    """
    basis = at_least_single(basis)
    evals = basis.evals
    largest = evals.amax(-1, keepdim=True).clamp_min(torch.finfo(evals.dtype).eps)
    logs = evals.clamp_min(1e-6 * largest).log()
    first = torch.where(evals > 1e-6 * largest, logs, torch.inf).amin(-1, keepdim=True).clamp_max(largest.log())
    last = logs.amax(-1, keepdim=True)
    share = torch.linspace(0, 1, n_energies, dtype=evals.dtype, device=evals.device)
    energies = first + (last - first) * share
    width = (7 * (last - first) / max(n_energies, 2)).clamp_min(1e-3)
    exponent = -(energies.unsqueeze(-1) - logs.unsqueeze(-2)).square() / (2 * width.unsqueeze(-1).square())
    return _filtered(basis, exponent.softmax(-1), landmarks)


def _filtered(basis: Basis, gains: Tensor, landmarks: IndexLike | None) -> Tensor:
    """``sum_j gains_qj phi_j(i)^2`` or ``phi_j(i) phi_j(l)``: ``[..., n, q]`` or ``[..., n, p q]``."""
    phi = basis.evecs
    if landmarks is None:
        return matmul(phi.square(), gains.mT)
    at = phi[..., anchor_rows(landmarks, basis.n, phi.device), :]
    weighted = (at.unsqueeze(-2) * gains.unsqueeze(-3)).flatten(-3, -2)
    return matmul(phi, weighted.mT)


@outside_autocast
def normalize(f: Tensor, basis: Basis) -> Tensor:
    """Project on the basis and scale each function to norm 1 there: noise beyond the basis has no part in its size."""
    smooth = basis.reconstruct(basis.project(f))
    norms = smooth.norm(dim=-2, keepdim=True)
    return smooth / torch.where(norms > 0, norms, 1.0)


def _times(times: Times, like: Tensor) -> Tensor:
    """Times on the device and in the dtype of ``like``."""
    return _checks.as_tensor("times", np.asarray(times) if isinstance(times, (list, tuple)) else times).to(like)
