"""Readings of functional maps as numbers: how alike two spaces are, and in what they differ."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.ops import inner_products, map_energies

HEAT_TIME = 2.0
# Heat overlap brings both spectra to one scale, eigenvalue number 30 (or the last one) to 0.75, where it is for layers
# of networks at default settings: with fewer neighbours per sample all eigenvalues are smaller, and that is no
# difference between two spaces. Eigenvalues below the smallest scale are 0 up to rounding.
_SCALED_NUMBER, _SCALED_VALUE, _SMALLEST_SCALE = 29, 0.75, 1e-3


@dataclass(frozen=True)
class Energies:
    """Sums over the entries of maps, ``[...]`` each, from which every reading is a formula.

    Attributes:
        carried: ``|C|_F^2``.
        heat: ``sum u_i v_j C_ji^2`` with the weights of :meth:`Maps.decays`.
        commutator: ``sum (b_j - a_i)^2 C_ji^2``.
        on_x: Squares on the diagonal of ``C^T C``, ``off_x`` the others.
        on_y: Squares on the diagonal of ``C C^T``, ``off_y`` the others.
    """

    carried: Tensor
    heat: Tensor
    commutator: Tensor
    on_x: Tensor
    off_x: Tensor
    on_y: Tensor
    off_y: Tensor


class Maps:
    """Maps of many pairs, ``C [A, m_y, B, m_x]`` as one product of stacked bases, read without any array per pair.

    The entry ``[a, :, b, :]`` is the map from space b (x) to space a (y); readings are ``[A, B]``. The sums behind them
    are taken once per object, in one pass over all maps.

    Args:
        C: ``[A, m_y, B, m_x]``.
        evals_x: ``[A or 1, B, m_x]``.
        evals_y: ``[A, B or 1, m_y]``.
        n_samples: Samples of the spaces, None where unknown.
    """

    def __init__(self, C: Tensor, evals_x: Tensor, evals_y: Tensor, n_samples: int | None) -> None:
        self.C, self.evals_x, self.evals_y, self.n_samples = C, evals_x, evals_y, n_samples
        self._taken: dict[tuple[int, float, bool], Energies] = {}
        self._decays: dict[tuple[float, bool], tuple[Tensor, Tensor]] = {}
        self._swapped = False

    @classmethod
    def of(cls, fmap: FunctionalMap) -> Maps:
        """Take one map, or a batch of them flattened, as ``A`` maps with ``B = 1``."""
        fmap = at_least_single(fmap)
        batch, C = fmap.C.shape[:-2], fmap.C
        evals_x, evals_y = (
            evals.expand(*batch, m).reshape(-1, 1, m)
            for evals, m in ((fmap.evals_x, fmap.C.shape[-1]), (fmap.evals_y, fmap.C.shape[-2]))
        )
        return cls(C.reshape(-1, C.shape[-2], 1, C.shape[-1]), evals_x, evals_y, fmap.n_samples)

    @classmethod
    def between(cls, evecs_x: Tensor, evals_x: Tensor, evecs_y: Tensor, evals_y: Tensor) -> Maps:
        """Take the maps from every x to every y by one product: ``evecs [A or B, m, n]`` (transposed), ``evals``.

        On the CPU a map depends on its two bases alone, to the last bit (with the compiled kernels).
        """
        product = inner_products(evecs_y.flatten(0, 1), evecs_x.flatten(0, 1))
        C = product.view(*evecs_y.shape[:2], *evecs_x.shape[:2])
        return cls(C, evals_x.unsqueeze(0), evals_y.unsqueeze(1), evecs_x.shape[-1])

    @property
    def swapped(self) -> Maps:
        """The adjoint maps, from y to x; readings keep the order ``[A, B]``."""
        other = Maps(self.C, self.evals_x, self.evals_y, self.n_samples)
        other._taken, other._decays, other._swapped = self._taken, self._decays, not self._swapped
        return other

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of functions ``(m_x, m_y)``."""
        return self.C.shape[3], self.C.shape[1]

    def decays(self, time: float, *, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Return the weights of the functions of x and of y in :func:`heat_overlap`."""
        if (time, raw) not in self._decays:
            self._decays[time, raw] = _decays(self.evals_x, time, raw), _decays(self.evals_y, time, raw)
        return self._decays[time, raw]

    def energies(self, *, skip: int = 0, time: float = HEAT_TIME, raw: bool = False) -> Energies:
        """Return the sums; the Gram matrices leave out the first ``skip`` functions of both spaces."""
        key = skip, time, raw
        if key not in self._taken:
            sums = map_energies(self.C, self.evals_x, self.evals_y, *self.decays(time, raw=raw), skip)
            self._taken[key] = Energies(*sums.unbind(-1))
        e = self._taken[key]
        return replace(e, on_x=e.on_y, off_x=e.off_y, on_y=e.on_x, off_y=e.off_x) if self._swapped else e

    def totals(self, *, time: float = HEAT_TIME, raw: bool = False) -> Energies:
        """Return the sums for a reading that needs no Gram matrix: those of any ``skip`` that were taken already."""
        taken = next((skip for skip, *kernel in self._taken if kernel == [time, raw]), 1)
        return self.energies(skip=taken, time=time, raw=raw)


def _decays(evals: Tensor, time: float, raw: bool) -> Tensor:
    if raw:
        return _exp(-time * evals)
    number = min(_SCALED_NUMBER, evals.shape[-1] - 1)
    scale = evals[..., number : number + 1].clamp_min(_SMALLEST_SCALE)
    # relative to the slowest function beside the constant: a common factor cancels, and no time makes all weights 0
    slowest = evals[..., :2][..., -1:]
    weights = _exp(-time * _SCALED_VALUE * ((evals - slowest) / scale))
    # the constant function does not count
    return torch.nn.functional.pad(weights[..., 1:], (1, 0))


def _exp(exponents: Tensor) -> Tensor:
    if exponents.is_cuda or not exponents.numel():
        return exponents.exp()
    # space by space: an exponential may be rounded otherwise at the end of an array than within it
    return torch.stack([of_space.exp() for of_space in exponents.flatten(0, -2)]).view(exponents.shape)


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
    return torch.where(present, 1 - (off if squared else _root(off)), 0.0)


def _root(value: Tensor) -> Tensor:
    # the root has no derivative at 0; there it is an extremum of what is read, and 0 is right
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0).sqrt(), 0.0)


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
    return _checks.within(_root(((e.on_x + e.off_x - 2 * e.carried + m) / m).clamp_min(0)), 0, 1)


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
    return _checks.within(torch.where(present, _root(commutator / torch.where(present, carried, 1.0)), 2.0), 0, 2)


def spectral(maps: Maps) -> Tensor:
    """Read :func:`spectral_distance` from maps."""
    m = min(maps.sizes)
    return _checks.within(_root((maps.evals_x[..., :m] - maps.evals_y[..., :m]).square().mean(-1)), 0, 2)


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
    constant = (_root(degrees) / degrees.sum(-1, keepdim=True).sqrt()).unsqueeze(-1)
    along = constant * (constant * signs).sum(-2, keepdim=True)
    return laplacian.heat(signs, time=time) - math.exp(-time) * signs + math.expm1(-time) * along


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
