"""From a functional map to points: which row of x a row of y corresponds to, and which pairs both directions share."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.graphs.neighbors import knn
from lfm_torch.graphs.points import Metric
from lfm_torch.maps.fmap import FunctionalMap
from lfm_torch.spectral.basis import Basis

Direction = Literal["yx", "xy"]

# an assignment takes cubic time: about 20 s for this many rows
_LARGEST_ASSIGNMENT = 5000


@outside_autocast
def pointwise_map(
    fmap: FunctionalMap,
    basis_x: Basis,
    basis_y: Basis,
    *,
    direction: Direction = "yx",
    adjoint: bool = False,
    bijective: bool = False,
) -> Tensor:
    """Turn a functional map into a map between rows, by nearest neighbours of transferred delta functions.

    A delta at row i of x has coefficients ``Phi_x[i]`` and goes to ``C Phi_x[i]``; row j of y corresponds to the row of
    x whose image is nearest to ``Phi_y[j]``. With ``adjoint=True`` the deltas of y are carried by ``C^T`` instead,
    which compares ``Phi_y C`` with ``Phi_x``.

    Args:
        fmap: Map with ``C [..., m_y, m_x]``; the first ``m_x`` and ``m_y`` eigenvectors of the bases are used.
        basis_x: Basis of x, ``evecs [..., n_x, >= m_x]``.
        basis_y: Basis of y, ``evecs [..., n_y, >= m_y]``.
        direction: "yx": for each row of y its row of x; "xy": for each row of x its row of y.
        adjoint: Compare in the coefficients of x.
        bijective: Give every row a partner of its own, at the least sum of squared distances (linear assignment, for
            up to 5,000 rows; needs SciPy).

    Returns:
        Indices ``[..., n_y]`` for "yx", ``[..., n_x]`` for "xy", int64.

    Raises:
        ValueError: bases that do not fit the map, more rows to assign than there are partners, too many rows.
        ImportError: ``bijective=True`` without SciPy.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> basis = lfm.spectral_basis(lfm.build_graph(torch.randn(40, 3), n_neighbors=8), n_basis=20)
        >>> bool((lfm.pointwise_map(lfm.paired_map(basis, basis), basis, basis) == torch.arange(40)).all())
        True

    Source: Ovsjanikov et al. 2012, section 6; adjoint: Pai et al. 2021 (arXiv 2103.13296), section 4.
    """
    _checks.check_choice("direction", direction, ("yx", "xy"))
    points_x, points_y = spectral_points(fmap, basis_x, basis_y, adjoint=adjoint)
    queries, candidates = (points_y, points_x) if direction == "yx" else (points_x, points_y)
    if bijective:
        return _assignment(queries, candidates)
    return nearest(queries, candidates)


def spectral_points(
    fmap: FunctionalMap, basis_x: Basis, basis_y: Basis, *, adjoint: bool = False
) -> tuple[Tensor, Tensor]:
    """Rows of both spaces in one space of coefficients: ``(Phi_x C^T, Phi_y)``, adjoint ``(Phi_x, Phi_y C)``.

    Rows of orthonormal eigenvectors shrink with the number of points; they are brought to one scale.
    """
    m_y, m_x = fmap.C.shape[-2:]
    for name, basis, wanted in (("basis_x", basis_x, m_x), ("basis_y", basis_y, m_y)):
        if basis.n_basis < wanted:
            raise ValueError(f"{name} must have at least the {wanted} pairs of the map, got {basis.n_basis}")
    phi_x, phi_y = (b.n**0.5 * at_least_single(b.evecs[..., :m]) for b, m in ((basis_x, m_x), (basis_y, m_y)))
    return (phi_x, matmul(phi_y, fmap.C)) if adjoint else (matmul(phi_x, fmap.C.mT), phi_y)


def nearest(queries: Tensor, candidates: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    """Index of the nearest candidate of each query, ``[..., n]``."""
    with torch.no_grad():
        found = knn(queries.contiguous(), candidates.contiguous(), n_neighbors=1, metric=metric)
    return found.indices.squeeze(-1)


@outside_autocast
def mutual_pairs(points_x: Tensor, points_y: Tensor, *, metric: Metric = "euclidean") -> Tensor:
    """Pairs of rows that are each other's nearest neighbour: ``[p, 2]`` (row of x, row of y), ascending in x."""
    idx_xy = nearest(points_x, points_y, metric=metric)
    return agreeing_pairs(idx_xy, nearest(points_y, points_x, metric=metric))


def agreeing_pairs(idx_xy: Tensor, idx_yx: Tensor) -> Tensor:
    """Pairs on which two maps between rows agree: ``[p, 2]`` (row of x, row of y)."""
    rows = torch.arange(len(idx_xy), device=idx_xy.device)
    mutual = idx_yx[idx_xy] == rows
    return torch.stack([rows[mutual], idx_xy[mutual]], -1)


def _assignment(queries: Tensor, candidates: Tensor) -> Tensor:
    try:
        from scipy.optimize import linear_sum_assignment
    except ImportError as error:
        raise ImportError('bijective=True needs scipy: pip install "lfm-torch[scipy]"') from error
    n, m = queries.shape[-2], candidates.shape[-2]
    if n > m:
        raise ValueError(
            f"bijective must have at least as many rows to choose from as rows to assign, got {m} for {n}; "
            "take the other direction"
        )
    if m > _LARGEST_ASSIGNMENT:
        raise ValueError(f"bijective must have at most {_LARGEST_ASSIGNMENT} rows on either side, got {m}")
    batch = queries.shape[:-2]
    cost = torch.cdist(queries.detach().double(), candidates.detach().double()).square()
    chosen = [torch.from_numpy(linear_sum_assignment(table)[1]) for table in cost.reshape(-1, n, m).cpu().numpy()]
    return torch.stack(chosen).view(*batch, n).to(queries.device)
