"""Maps of many pairs as one product of stacked bases, and the sums over their entries that every reading needs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from lfm_torch._precision import at_least_single
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.ops import inner_products, map_energies

HEAT_TIME = 2.0
# Heat overlap brings both spectra to one scale, eigenvalue number 30 (or the last one) to 0.75, where it is for layers
# of networks at default settings: with fewer neighbours per sample all eigenvalues are smaller, and that is no
# difference between two spaces. Eigenvalues below the smallest scale are 0 up to rounding.
_SCALED_NUMBER, _SCALED_VALUE, _SMALLEST_SCALE = 29, 0.75, 1e-3


class Energies(NamedTuple):
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
        return e._replace(on_x=e.on_y, off_x=e.off_y, on_y=e.on_x, off_y=e.off_x) if self._swapped else e

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
