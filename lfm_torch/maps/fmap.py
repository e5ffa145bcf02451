"""The functional map ``C_xy [..., m_y, m_x]``: carries coefficients of functions on x to coefficients on y."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import at_least_single, matmul, outside_autocast
from lfm_torch.spectral.basis import Basis


@dataclass(frozen=True, repr=False, eq=False)
class FunctionalMap:
    """A map between two bases, with the eigenvalues its readings need.

    Attributes:
        C: ``[..., m_y, m_x]``, coefficients on x to coefficients on y.
        evals_x: ``[..., m_x]``.
        evals_y: ``[..., m_y]``.
        ridge: the ridge a solver added (0 for a map that was not solved for).
        iterations: conjugate gradient steps of the solver.
        residual: relative gradient norm it reached, the largest of a batch.
        n_samples: of the two spaces, the larger number where they differ; None where unknown.
    """

    C: Tensor
    evals_x: Tensor
    evals_y: Tensor
    ridge: float = 0.0
    iterations: int = 0
    residual: float = 0.0
    n_samples: int | None = None

    def __repr__(self) -> str:
        batch = f"batch={list(self.C.shape[:-2])}, " if self.C.dim() > 2 else ""
        dtype = str(self.C.dtype).removeprefix("torch.")
        return f"FunctionalMap({batch}x with {self.C.shape[-1]} -> y with {self.C.shape[-2]}, {dtype}, {self.C.device})"

    @property
    def adjoint(self) -> FunctionalMap:
        """The adjoint map y -> x, ``C^T``."""
        return replace(self, C=self.C.mT, evals_x=self.evals_y, evals_y=self.evals_x)

    @outside_autocast
    def transfer(self, f: ArrayLike, basis_x: Basis, basis_y: Basis) -> Tensor:
        """Carry functions on x to functions on y: ``Phi_y C Phi_x^T f``, ``[..., n_x, p] -> [..., n_y, p]``."""
        return basis_y.reconstruct(matmul(self.C, basis_x.project(_checks.as_tensor("f", f))))

    def to(self, target: torch.device | torch.dtype | str) -> FunctionalMap:
        """Move to a device (a str names one), or cast to a dtype."""
        return replace(self, C=self.C.to(target), evals_x=self.evals_x.to(target), evals_y=self.evals_y.to(target))

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _files.save_record(path, self)

    @classmethod
    def load(cls, path: str | Path) -> FunctionalMap:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return _files.load_record(path, cls)


@outside_autocast
def paired_map(basis_x: Basis, basis_y: Basis) -> FunctionalMap:
    """Return the map between two spaces whose rows correspond, ``C_xy = Phi_y^T Phi_x``.

    Args:
        basis_x: Basis of x, ``evecs [..., n, m_x]``.
        basis_y: Basis of y over the same samples in the same order, ``evecs [..., n, m_y]``; batch dimensions
            broadcast.

    Raises:
        ValueError: different numbers of samples.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> basis = lfm.spectral_basis(lfm.build_graph(torch.randn(40, 3), n_neighbors=8), n_basis=5)
        >>> torch.allclose(lfm.paired_map(basis, basis).C, torch.eye(5), atol=1e-5)
        True

    Source: Fumero et al. 2024 (arXiv 2406.14183), section 3, with the correspondence known.
    """
    if basis_x.n != basis_y.n:
        raise ValueError(
            f"basis_y must be over the same samples as basis_x, {basis_x.n} rows, got {basis_y.n}; for unpaired spaces "
            "solve for a functional map from descriptors"
        )
    basis_x, basis_y = at_least_single(basis_x), at_least_single(basis_y)
    C = matmul(basis_y.evecs.mT, basis_x.evecs)
    return FunctionalMap(C, basis_x.evals, basis_y.evals, n_samples=basis_x.n)
