"""Relative representations: rows described by their cosines to anchors, so that no map is needed."""

from __future__ import annotations

from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike, IndexLike
from lfm_torch._precision import at_least_single, outside_autocast
from lfm_torch.ops.knn import unit_rows


@outside_autocast
def relative_representations(x: ArrayLike, anchors: IndexLike) -> Tensor:
    """Cosines of the rows of ``x`` to anchor rows: two spaces become comparable without a map.

    Args:
        x: ``[..., n, d]``.
        anchors: ``[p]`` indices of rows of ``x``, or ``[..., p, d]`` the anchors' representations.

    Returns:
        ``[..., n, p]``; row i of both spaces' relative representations are compared by cosine.

    Raises:
        TypeError, ValueError: not points, anchors out of range.

    Source: Moschella et al. 2023 (arXiv 2209.15430), equation 1.
    """
    x = _checks.check_points("x", x)
    given = anchors if isinstance(anchors, (list, tuple)) else _checks.as_tensor("anchors", anchors)
    if isinstance(given, Tensor) and given.is_floating_point():
        chosen = _checks.check_points("anchors", given)
    else:
        chosen = x[..., _checks.check_rows("anchors", given, x.shape[-2], x.device), :]
    x, chosen = at_least_single(x), at_least_single(chosen)
    return unit_rows(x) @ unit_rows(chosen).mT
