"""Several spaces at once: one latent basis that all share, so that M spaces need M maps instead of M (M - 1)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch.maps.fmap import FunctionalMap


@dataclass(frozen=True, repr=False, eq=False)
class ConsistentMaps:
    """A latent basis shared by M spaces, and the maps that follow from it.

    Attributes:
        latent: ``Y_i [m_i, r]`` for each space: the shared functions in its basis.
        evals: ``[m_i]`` eigenvalues of each space.
        spectrum: ``[r]`` how inconsistent each shared function is, ascending; 0: all given maps carry it exactly.
        cycle_error: mean of ``|C_ki C_jk C_ij - P| / |P|`` of the given maps over the triangles i -> j -> k -> i, P the
            identity; None without a triangle.
        pair_error: mean of ``|C_ij - fmap(i, j)| / |C_ij|``: what the shared basis leaves out of the given maps.
        n_samples: the largest of the given maps; None where one does not know.
    """

    latent: tuple[Tensor, ...]
    evals: tuple[Tensor, ...]
    spectrum: Tensor
    cycle_error: float | None
    pair_error: float
    n_samples: int | None = None

    def __repr__(self) -> str:
        cycle = "no cycle" if self.cycle_error is None else f"cycle error {self.cycle_error:.3g}"
        return (
            f"ConsistentMaps({len(self.latent)} spaces, {self.spectrum.numel()} shared functions, {cycle}, "
            f"left out of the maps {self.pair_error:.3g})"
        )

    @outside_autocast
    def fmap(self, i: int, j: int) -> FunctionalMap:
        """The map from space i to space j through the shared basis, ``Y_j Y_i^+``: consistent along every cycle."""
        C = self.latent[j] @ torch.linalg.pinv(self.latent[i])
        return FunctionalMap(C, self.evals[i], self.evals[j], n_samples=self.n_samples)


@outside_autocast
def consistent_maps(maps: Mapping[tuple[int, int], FunctionalMap], *, n_shared: int | None = None) -> ConsistentMaps:
    """Find the functions on M spaces that all given maps agree on, and rebuild the maps from these.

    The shared basis minimises ``sum_ij |C_ij Y_i - Y_j|^2`` over the given maps, under ``sum_i Y_i^T Y_i = M I``: the
    eigenvectors of the smallest eigenvalues of one ``sum m_i`` square matrix. The maps ``Y_j Y_i^+`` are consistent
    along every cycle by construction; also pairs that were not given get one, as long as the given ones connect them.

    Args:
        maps: Functional maps without batch dimensions, by (i, j), from space i to space j; spaces are numbered from 0
            and each takes part.
        n_shared: Number r of shared functions, at most the smallest basis; None for as many.

    Raises:
        ValueError: no maps, sizes that contradict each other, spaces that are not connected, batched maps.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> from lfm_torch.alignment import consistent_maps
        >>> q = [torch.linalg.qr(torch.randn(6, 6)).Q for _ in range(3)]
        >>> evals = torch.arange(6.0)
        >>> given = {(i, j): lfm.FunctionalMap(q[j] @ q[i].T, evals, evals) for i, j in ((0, 1), (1, 2))}
        >>> torch.allclose(consistent_maps(given).fmap(0, 2).C, q[2] @ q[0].T, atol=1e-4)
        True

    Source: Wang, Huang & Guibas 2013 (ICCV), section 4; Huang et al. 2019 (limit shapes, arXiv 1905.08616), section 4.
    """
    evals = _spaces(maps)
    sizes = [len(e) for e in evals]
    smallest = min(sizes)
    r = smallest if n_shared is None else n_shared
    _checks.check_range("n_shared", r, 1, smallest, "the smallest basis")
    first = next(iter(maps.values())).C
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    matrix = first.new_zeros(sum(sizes), sum(sizes), dtype=torch.float64)
    for (i, j), fmap in maps.items():
        C = fmap.C.detach().double()
        on_i, on_j = (slice(starts[s], starts[s] + sizes[s]) for s in (i, j))
        matrix[on_i, on_i] += C.mT @ C
        matrix[on_j, on_j] += torch.eye(sizes[j], dtype=C.dtype, device=C.device)
        matrix[on_i, on_j] -= C.mT
        matrix[on_j, on_i] -= C
    values, vectors = torch.linalg.eigh(matrix)
    shared = len(sizes) ** 0.5 * vectors[:, :r]
    latent = tuple(shared[a : a + m].to(first.dtype) for a, m in zip(starts, sizes, strict=True))
    known = [fmap.n_samples for fmap in maps.values() if fmap.n_samples is not None]
    n_samples = max(known) if len(known) == len(maps) else None
    spectrum = values[:r].clamp_min(0).to(first.dtype)
    result = ConsistentMaps(latent, evals, spectrum, _cycle_error(maps), 0.0, n_samples)
    gaps = [
        float((result.fmap(i, j).C - f.C).norm() / f.C.norm().clamp_min(torch.finfo(f.C.dtype).tiny))
        for (i, j), f in maps.items()
    ]
    return replace(result, pair_error=sum(gaps) / len(gaps))


def _spaces(maps: Mapping[tuple[int, int], FunctionalMap]) -> tuple[Tensor, ...]:
    """Eigenvalues of every space, after checking that the maps fit together and connect all spaces."""
    if not maps:
        raise ValueError("maps must hold at least one functional map, got none")
    evals: dict[int, Tensor] = {}
    group = {space: space for pair in maps for space in pair}
    for (i, j), fmap in maps.items():
        if i == j or fmap.C.dim() != 2:
            raise ValueError(f"maps[{i}, {j}] must be a map without batch dimensions between two spaces")
        for space, own in ((i, fmap.evals_x), (j, fmap.evals_y)):
            if len(evals.setdefault(space, own)) != len(own):
                raise ValueError(
                    f"maps must agree on the basis of space {space}, got {len(evals[space])} and {len(own)} functions"
                )
        group = {space: group[i] if at == group[j] else at for space, at in group.items()}
    if sorted(group) != list(range(len(group))):
        raise ValueError(f"maps must number the spaces from 0, got {sorted(group)}")
    if len({*group.values()}) > 1:
        raise ValueError(f"maps must connect all {len(group)} spaces, got {len({*group.values()})} separate groups")
    return tuple(evals[space] for space in range(len(group)))


def _cycle_error(maps: Mapping[tuple[int, int], FunctionalMap]) -> float | None:
    errors = []
    for i, j in maps:
        for k in {k for a, k in maps if a == j and (k, i) in maps and k != i}:
            around = maps[k, i].C @ maps[j, k].C @ maps[i, j].C
            eye = torch.eye(len(around), dtype=around.dtype, device=around.device)
            errors.append(float((around - eye).norm() / eye.norm()))
    return sum(errors) / len(errors) if errors else None
