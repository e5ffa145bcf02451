"""How many neighbours and eigenvectors: what may be asked for, what is taken unasked, what a batch allows."""

from __future__ import annotations

from lfm_torch import _checks
from lfm_torch._warnings import warn


def default_n_basis(n: int) -> int:
    """Eigenvectors taken when no number is asked for: a quarter of the points, at least 2 and at most 50."""
    return min(50, max(2, n // 4), n - 1)


def check_sizes(n_neighbors: int | None, n_basis: int | None) -> None:
    """Raise ValueError unless both are positive or None: what no samples allow is refused before there are any."""
    for name, size in (("n_neighbors", n_neighbors), ("n_basis", n_basis)):
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ValueError(f"{name} must be a positive int, or None to go by the samples, got {size!r}")


def sizes_for_batch(
    owner: str, n: int, n_neighbors: int | None, n_basis: int | None, told: set[str]
) -> tuple[int | None, int | None]:
    """Cut both numbers to the ``n - 1`` that a batch of ``n`` rows has: the last of an epoch is nobody's mistake.

    What is cut is said once; the owner keeps ``told``.

    Raises:
        ValueError: fewer than 3 rows.

    Warns:
        LFMWarning: a number does not fit.
    """
    _checks.check_enough(f"{owner}: a batch", n, "; a DataLoader leaves out such a rest with drop_last=True")
    sizes = {"n_neighbors": n_neighbors, "n_basis": n_basis}
    for name, size in sizes.items():
        if size is not None and size >= n:
            if name not in told:
                warn(f"{owner}: {name}={size} does not fit {n} rows and is cut to what does, here {n - 1} (said once)")
                told.add(name)
            sizes[name] = n - 1
    return sizes["n_neighbors"], sizes["n_basis"]
