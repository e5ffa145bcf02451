"""Readings of functional maps as numbers: how alike two spaces are, and in what they differ.

Each is a formula in the sums of :class:`Maps`, and a function of one map for people.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch.baselines.points import safe_root
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.measures.stacked_maps import HEAT_TIME, Maps


def lfm(maps: Maps, *, squared: bool = True, symmetric: bool = False, centered: bool = False) -> Tensor:
    """Read :func:`lfm_similarity` from maps."""
    if centered:
        _check_rest(maps)
    e = maps.energies(skip=int(centered))
    value = _diagonality(e.on_x, e.off_x, squared)
    if symmetric:
        value = (value + _diagonality(e.on_y, e.off_y, squared)) / 2
    return value


def _check_rest(maps: Maps) -> None:
    if min(maps.sizes) < 2:
        raise ValueError(
            f"n_basis must be at least 2 where the constant function is left out, got maps of sizes {maps.sizes}"
        )


def _diagonality(on: Tensor, off: Tensor, squared: bool) -> Tensor:
    total = on + off
    present = total > 0
    off = off / torch.where(present, total, 1.0)
    return torch.where(present, 1 - (off if squared else safe_root(off)), 0.0)


def overlap(maps: Maps) -> Tensor:
    """Read :func:`subspace_overlap` from maps."""
    return _checks.within(maps.totals().carried / min(maps.sizes), 0, 1)


def heat(maps: Maps, *, time: float = HEAT_TIME, raw: bool = False) -> Tensor:
    """Read :func:`heat_overlap` from maps."""
    if not 0 <= time < math.inf:
        raise ValueError(f"time must be finite and not negative, got {time}")
    if not raw:
        _check_rest(maps)
    weights = maps.decays(time, raw=raw)
    shared = maps.totals(time=time, raw=raw).heat
    own_x, own_y = (w.square().sum(-1) for w in weights)
    if maps.n_samples is not None and not raw:
        # in the space of all functions but the constant, what lies along the identity
        trace_x, trace_y = (w.sum(-1) / (maps.n_samples - 1) ** 0.5 for w in weights)
        shared = shared - trace_x * trace_y
        own_x, own_y = own_x - trace_x.square(), own_y - trace_y.square()
    return _checks.within(shared / (own_x * own_y).sqrt(), 0 if raw else -1, 1)


def orthogonality(maps: Maps) -> Tensor:
    """Read :func:`orthogonality_error` from maps."""
    e = maps.energies()
    m = min(maps.sizes)
    # of the two Gram matrices the smaller one; their norms are equal
    return _checks.within(safe_root(((e.on_x + e.off_x - 2 * e.carried + m) / m).clamp_min(0)), 0, 1)


def commutativity(maps: Maps, *, centered: bool = False) -> Tensor:
    """Read :func:`commutativity_error` from maps."""
    e = maps.totals()
    carried, commutator = e.carried, e.commutator
    if centered:
        _check_rest(maps)
        # what the first functions carry, taken out: a row and a column of every map
        firsts = (maps.C[:, :1], maps.C[..., :1])
        row, column = (first.transpose(1, 2).contiguous().square() for first in firsts)
        gaps = [(maps.evals_y[..., :1] - maps.evals_x).square(), (maps.evals_y - maps.evals_x[..., :1]).square()]
        both = row[..., 0, 0]
        carried = carried - row.sum((-2, -1)) - column.sum((-2, -1)) + both
        sides = (row.squeeze(-2) * gaps[0]).sum(-1) + (column.squeeze(-1) * gaps[1]).sum(-1)
        commutator = commutator - sides + both * gaps[0][..., 0]
    # a difference of sums that is only their rounding is nothing carried
    present = carried > 8 * torch.finfo(carried.dtype).eps * e.carried
    return _checks.within(torch.where(present, safe_root(commutator / torch.where(present, carried, 1.0)), 2.0), 0, 2)


def spectral(maps: Maps) -> Tensor:
    """Read :func:`spectral_distance` from maps."""
    m = min(maps.sizes)
    return _checks.within(safe_root((maps.evals_x[..., :m] - maps.evals_y[..., :m]).square().mean(-1)), 0, 2)


@outside_autocast
def lfm_similarity(
    fmap: FunctionalMap, *, squared: bool = True, symmetric: bool = False, centered: bool = False
) -> Tensor:
    """Latent functional map similarity, ``1 - |off(C^T C)|_F^2 / |C^T C|_F^2`` (``squared=False``: ratio of the norms).

    1 where the map carries the eigenfunctions of x to orthogonal functions on y. As the paper writes it, it is not
    symmetric in x and y, and inside a nearly repeated eigenvalue it depends on the basis chosen there;
    :func:`subspace_overlap` and :func:`heat_overlap` do not.

    Read it beside its chance level: every two spaces share their first eigenfunction, which is nearly constant, so the
    diagonal entry of that one dominates and the score of unrelated spaces is close to 1 (0.99 for Gaussian noise,
    n = 600, m = 20). ``centered=True`` leaves that function out, and unrelated spaces come to about 1/2. The measure
    "lfm" of :func:`similarity` is ``symmetric=True, centered=True``; "lfm_paper" and "lfm_unsquared" are the paper's
    formula and that of its published code.

    Args:
        fmap: A functional map, ``C [..., m_y, m_x]``.
        squared: Take the ratio of squared norms, as the paper writes it; False for the published code's ratio of norms.
        symmetric: Average with the value of the adjoint map, ``C C^T``.
        centered: Leave out the first function of both bases, which is ``D^{1/2} 1`` on a connected graph.

    Returns:
        ``[...]`` in [0, 1]. A map that is zero carries nothing and has similarity 0.

    Raises:
        ValueError: ``centered`` with a basis of a single function.

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3.3.
    """
    return _per_map(fmap, lfm(Maps.of(fmap), squared=squared, symmetric=symmetric, centered=centered))


@outside_autocast
def subspace_overlap(fmap: FunctionalMap) -> Tensor:
    """Share of the smaller basis that the other contains, ``|C|_F^2 / min(m_x, m_y)``: ``[...]`` in [0, 1].

    Symmetric, and free of the choice of basis inside either subspace. For random subspaces of n samples it is about
    ``max(m_x, m_y) / n``.
    """
    return _per_map(fmap, overlap(Maps.of(fmap)))


@outside_autocast
def heat_overlap(fmap: FunctionalMap, *, time: float = HEAT_TIME, raw: bool = False) -> Tensor:
    r"""How alike heat spreads on two graphs: cosine between their diffusion kernels, corrected for chance.

    With eigenvalues a of x and b of y, weights ``u_i = exp(-t 3/4 a_i / a_30)``, likewise v (the eigenvalue number 30,
    or the last one, scales each spectrum), traces ``T_x = sum_i u_i``, and all sums without the constant functions
    i = 1 and j = 1,

        (sum_ij u_i v_j C_ji^2 - T_x T_y / (n - 1)) / sqrt((sum_i u_i^2 - T_x^2 / (n - 1)) (sum_j v_j^2 - ...)).

    That is the cosine between ``K - tr(K) / (n - 1) I`` of both graphs, K the diffusion kernel on the n - 1 functions
    beside the constant. Two kernels have the constant in common whatever the graphs, and on average as much of the
    identity as their traces say: without both, spaces that have nothing to do with each other come to 0 on average, at
    any number of samples and eigenvectors, and equal ones to 1. The scale makes values of other numbers of neighbours,
    or of their share in the samples, comparable. Symmetric, and free of the choice of basis inside repeated eigenvalues
    and, but for the constant, inside the null space of a graph in several parts.

    Args:
        fmap: A functional map; with ``n_samples`` None (a map made by hand) the terms in n are left out, and the value
            of unrelated spaces is about ``m / n``.
        time: Diffusion time t; at 0 all functions count alike.
        raw: Take the plain cosine between ``exp(-t L_x)`` and ``exp(-t L_y)``, cut to the bases, instead, the measure
            "heat_raw": ``sum_ij exp(-t (a_i + b_j)) C_ji^2 / sqrt(sum_i exp(-2 t a_i) sum_j exp(-2 t b_j))``. Unrelated
            spaces have .1 to .5, the more the fewer samples.

    Returns:
        ``[...]`` in [-1, 1]; with ``raw`` in [0, 1].

    Raises:
        ValueError: a time that is negative or not finite, a basis of a single function (but for ``raw``).

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x, y = (torch.randn(400, 16, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
        >>> fmap = lfm.paired_map(*(lfm.spectral_basis(lfm.build_graph(p)) for p in (x, y)))
        >>> bool(lfm.heat_overlap(fmap).abs() < 0.02), bool(lfm.heat_overlap(fmap, raw=True) > 0.3)
        (True, True)
    """
    return _per_map(fmap, heat(Maps.of(fmap), time=time, raw=raw))


@outside_autocast
def orthogonality_error(fmap: FunctionalMap) -> Tensor:
    """How far the map is from an isometry, ``|C^T C - I|_F / sqrt(m)`` with m the smaller basis: ``[...]`` in [0, 1].

    0 where all singular values are 1, 1 where nothing is carried. Single precision resolves it to about 1e-3.
    """
    return _per_map(fmap, orthogonality(Maps.of(fmap)))


@outside_autocast
def commutativity_error(fmap: FunctionalMap, *, centered: bool = False) -> Tensor:
    """Mismatch of the eigenvalues that the map connects, ``|Lambda_y C - C Lambda_x|_F / |C|_F``: ``[...]`` in [0, 2].

    The root of the mean squared difference between the eigenvalues of functions carried to one another; 0 where the map
    commutes with the Laplacians. A map that carries nothing has the largest error there is, 2.

    Args:
        fmap: A functional map.
        centered: Leave out the first functions, which unrelated spaces share and which would hide how little else is
            carried.

    Raises:
        ValueError: ``centered`` with a basis of a single function.
    """
    return _per_map(fmap, commutativity(Maps.of(fmap), centered=centered))


@outside_autocast
def spectral_distance(fmap: FunctionalMap) -> Tensor:
    """Root mean square of the differences between the eigenvalues, in order: ``[...]`` in [0, 2].

    It compares the shapes of the two spectra and knows nothing of which sample is which, so shuffled rows do not change
    it. A metric on spectra; different spaces may share one.
    """
    return _per_map(fmap, spectral(Maps.of(fmap)))


def _per_map(fmap: FunctionalMap, values: Tensor) -> Tensor:
    return values.reshape(fmap.C.shape[:-2])
