"""Where two spaces differ: the distortion of every sample and class under a map, and shape-difference operators."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.spectral.basis import Basis

KINDS = ("area", "conformal")


@dataclass(frozen=True, repr=False, eq=False)
class Distortion:
    """How little of the functions around each sample a map carries: see :func:`map_distortion`.

    Attributes:
        per_sample: ``[..., n]`` in [0, 1], a value per row of y.
        singular_values: ``[..., m_y]`` of the map, descending, zeros where y has more functions than x.
    """

    per_sample: Tensor
    singular_values: Tensor

    def __repr__(self) -> str:
        batch = f"batch={list(self.per_sample.shape[:-1])}, " if self.per_sample.dim() > 1 else ""
        values = self.per_sample
        return (
            f"Distortion({batch}n={values.shape[-1]}, {float(values.min()):.3f} to {float(values.max()):.3f}, "
            f"mean {float(values.mean()):.3f})"
        )

    @outside_autocast
    def per_class(self, labels: IndexLike) -> Tensor:
        """Mean distortion of each class, ``[..., n_classes]``, NaN where a class has no sample.

        Args:
            labels: ``[n]`` integers from 0.

        Raises:
            TypeError: labels that are not integers.
            ValueError: another length, or a negative label.
        """
        onehot = torch.nn.functional.one_hot(self._labels(labels)).to(self.per_sample.dtype)
        return (self.per_sample @ onehot) / onehot.sum(0)

    def worst(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """Return the indices ``[..., count]`` of the most distorted samples, worst first, and their values.

        Raises:
            ValueError: more samples than there are.
        """
        n = self.per_sample.shape[-1]
        _checks.check_range("count", count, 1, n, f"there are {n} samples")
        values, indices = self.per_sample.topk(count, dim=-1)
        return indices, values

    @outside_autocast
    def share(self, mask: ArrayLike) -> Tensor:
        """Share of the total distortion that lies on the samples of a boolean ``mask [n]``: ``[...]``.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: another length.
        """
        total = self.per_sample.sum(-1)
        return (self.per_sample * self._mask(mask)).sum(-1) / torch.where(total > 0, total, 1.0)

    def auc(self, mask: ArrayLike) -> Tensor:
        """Chance that a sample of the boolean ``mask [n]`` is more distorted than one outside it, ties half: ``[...]``.

        Raises:
            TypeError: a mask that is not boolean.
            ValueError: another length, or a mask of all samples or of none.
        """
        mask = self._mask(mask)
        inside, outside = self.per_sample[..., mask], self.per_sample[..., ~mask]
        if not inside.shape[-1] or not outside.shape[-1]:
            raise ValueError(f"mask must be true for some samples and false for others, got {int(mask.sum())} true")
        ordered = outside.sort(-1).values.contiguous()
        below = torch.searchsorted(ordered, inside.contiguous())
        not_above = torch.searchsorted(ordered, inside.contiguous(), right=True)
        return (below + not_above).double().mean(-1) / (2 * outside.shape[-1])

    def _labels(self, labels: IndexLike) -> Tensor:
        found = _checks.as_integers("labels", labels, self.per_sample.device)
        n = self.per_sample.shape[-1]
        if found.shape != (n,) or int(found.min()) < 0:
            raise ValueError(f"labels must be {n} numbers from 0, got shape {list(found.shape)}")
        return found

    def _mask(self, mask: ArrayLike) -> Tensor:
        found = _checks.as_tensor("mask", mask).to(self.per_sample.device)
        if found.dtype != torch.bool:
            raise TypeError(f"mask must be boolean, got {found.dtype}")
        n = self.per_sample.shape[-1]
        if found.shape != (n,):
            raise ValueError(f"mask must have shape [{n}], got {list(found.shape)}")
        return found


@outside_autocast
def map_distortion(fmap: FunctionalMap, basis_y: Basis) -> Distortion:
    """Distortion of each sample of y under a map, ``sum_p (1 - min(s_p, 1)) (Phi_y U)_jp^2 / sum_p (Phi_y U)_jp^2``.

    With ``C = U S V^T``: the column ``Phi_y u_p`` is the function on y that the map reaches with strength ``s_p``, so
    the value is the share of the functions around sample j that does not arrive. The published code draws the last
    column alone, which depends on the sign and order of nearly equal singular values; the sum does not.

    Args:
        fmap: Map from x to y, ``C [..., m_y, m_x]``.
        basis_y: The basis of y, ``evecs [..., n, m_y]``.

    Returns:
        Distortion. A sample at which every function of the basis is 0 counts as not reached, 1.

    Raises:
        ValueError: a basis of another size than the map.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> x = torch.randn(60, 4, generator=torch.Generator().manual_seed(0))
        >>> basis = lfm.spectral_basis(lfm.build_graph(x, n_neighbors=9), n_basis=6)
        >>> bool(map_distortion(lfm.paired_map(basis, basis), basis).per_sample.max() < 1e-4)
        True

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 4.1, with all singular directions for the last one.
    """
    fmap = at_least_single(fmap)
    m_y = fmap.C.shape[-2]
    if basis_y.n_basis != m_y:
        raise ValueError(f"basis_y must have the {m_y} functions that the map reaches, got {basis_y.n_basis}")
    U, S, _ = torch.linalg.svd(fmap.C, full_matrices=m_y > fmap.C.shape[-1])
    S = torch.nn.functional.pad(S, (0, U.shape[-1] - S.shape[-1]))
    parts = matmul(basis_y.evecs, U).square()
    # a map onto fewer directions than y has functions leaves the rest at strength 0: full U above
    total = parts.sum(-1)
    lost = (parts * (1 - S.clamp(0, 1)).unsqueeze(-2)).sum(-1)
    return Distortion(_checks.within(torch.where(total > 0, lost / torch.where(total > 0, total, 1.0), 1.0), 0, 1), S)


@outside_autocast
def shape_difference(fmap: FunctionalMap, *, kind: Literal["area", "conformal"] = "area") -> Tensor:
    """Operator on functions of x that says how y differs: ``C^T C``, or ``Lambda_x^+ C^T Lambda_y C`` (conformal).

    The identity where nothing differs. Its eigenfunctions with the smallest eigenvalues are supported where samples
    lose their weight in y ("area") or their smoothness changes ("conformal"). The conformal one is taken on functions
    of nonzero frequency.

    Args:
        fmap: Map from x to y, ``C [..., m_y, m_x]``.
        kind: Which inner product is compared: that of functions, or that of their differences across edges.

    Returns:
        ``[..., m_x, m_x]``.

    Raises:
        ValueError: an unknown kind.

    Source: Rustamov et al. 2013, equations (3) and (5).
    """
    _checks.check_choice("kind", kind, KINDS)
    fmap = at_least_single(fmap)
    if kind == "area":
        return matmul(fmap.C.mT, fmap.C)
    tiny = 1e-6 if fmap.evals_x.dtype == torch.float32 else 1e-12
    positive = fmap.evals_x > tiny
    inverse = torch.where(positive, 1 / torch.where(positive, fmap.evals_x, 1.0), 0.0)
    return inverse.unsqueeze(-1) * matmul(fmap.C.mT, fmap.evals_y.unsqueeze(-1) * fmap.C)
