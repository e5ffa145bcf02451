"""The basis in which functions on a representation are written: eigenvalues, eigenvectors, and how good they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import matmul, outside_autocast
from lfm_torch.graphs.graph import Graph
from lfm_torch.spectral.nystrom import extend_eigenvectors


@dataclass(frozen=True, repr=False, eq=False)
class Basis:
    """The ``n_basis`` smallest eigenvalues of a Laplacian and their orthonormal eigenvectors.

    Attributes:
        evals: ``[..., m]`` ascending.
        evecs: ``[..., n, m]`` orthonormal columns; the entry of largest magnitude of each is positive.
        residuals: ``[..., m]`` norms ``|L v - lambda v|``.
        converged: ``[..., m]`` bool: the residual is within the tolerance, and the vector orthonormal to the others.
        n_components: ``[...]`` connected components, the multiplicity of eigenvalue 0.
        iterations: steps the solver took (0 for the dense one).
        solver: which solver it was ("refine" after a warm start that sufficed; "krylov, dense" where the first failed).
        guards: ``[..., n, p]`` rough eigenvectors beyond the pairs, kept for a warm start; None where there are none.
        window: interval that the spectrum beyond the pairs was taken to fill, for a warm start; or None.
    """

    evals: Tensor
    evecs: Tensor
    residuals: Tensor
    converged: Tensor
    n_components: Tensor
    iterations: int
    solver: str
    guards: Tensor | None = None
    window: tuple[float, float] | None = None

    def __repr__(self) -> str:
        batch = f"batch={list(self.evals.shape[:-1])}, " if self.evals.dim() > 1 else ""
        done = f"{int(self.converged.sum())}/{self.converged.numel()} converged"
        parts = f"{int(self.n_components.max())} component" + ("s" if int(self.n_components.max()) > 1 else "")
        return (
            f"Basis({batch}n={self.evecs.shape[-2]}, n_basis={self.n_basis}, evals {float(self.evals.min()):.3g} to "
            f"{float(self.evals.max()):.3g}, {parts}, {done} in {self.iterations} iterations of {self.solver}, "
            f"{str(self.evecs.dtype).removeprefix('torch.')}, {self.evecs.device})"
        )

    @property
    def n_basis(self) -> int:
        """Number of eigenpairs m."""
        return self.evals.shape[-1]

    @property
    def n(self) -> int:
        """Number of points."""
        return self.evecs.shape[-2]

    def truncate(self, n_basis: int) -> Basis:
        """Return the first ``n_basis`` pairs."""
        _checks.check_range("n_basis", n_basis, 1, self.n_basis, f"the basis has {self.n_basis} pairs")
        return replace(
            self,
            evals=self.evals[..., :n_basis],
            evecs=self.evecs[..., :n_basis],
            residuals=self.residuals[..., :n_basis],
            converged=self.converged[..., :n_basis],
            guards=None if n_basis < self.n_basis else self.guards,
        )

    def unbatch(self) -> list[Basis]:
        """Return the bases of the batch one by one, those of several leading dimensions in order."""
        count = self.n_components.numel()
        flat = {
            name: part.reshape(count, *part.shape[self.n_components.dim() :]).unbind()
            for name in ("evals", "evecs", "residuals", "converged", "n_components", "guards")
            if (part := getattr(self, name)) is not None
        }
        return [replace(self, **{name: parts[i] for name, parts in flat.items()}) for i in range(count)]

    @outside_autocast
    def project(self, f: ArrayLike) -> Tensor:
        """Coefficients ``Phi^T f`` of functions ``f [..., n, p]``: ``[..., m, p]``."""
        return matmul(self.evecs.mT, _checks.as_tensor("f", f))

    @outside_autocast
    def reconstruct(self, coefficients: ArrayLike) -> Tensor:
        """Functions ``Phi c`` of coefficients ``[..., m, p]``: ``[..., n, p]``."""
        return matmul(self.evecs, _checks.as_tensor("coefficients", coefficients))

    @outside_autocast
    def extend(self, x_new: ArrayLike, *, x: ArrayLike, graph: Graph) -> Tensor:
        r"""Values of the eigenvectors at points outside the graph, by Nyström extension.

        ``phi_i(p) = sum_j w_pj / sqrt(d_p d_j) phi_i(j) / (1 - lambda_i)`` over the neighbours j of p among ``x``, with
        the graph's weights of p's own distances and ``d_p`` their sum. For a basis of the symmetric Laplacian.
        Differentiable in the basis and the points.

        Args:
            x_new: New points ``[..., q, d]``.
            x: The points of the graph, ``[..., n, d]``.
            graph: The graph that :func:`build_graph` made of ``x``.

        Returns:
            ``[..., q, m]``.

        Raises:
            TypeError: other dtypes.
            ValueError: shapes that do not fit, "self_tuning" weights or a graph of unknown origin, eigenvalues of 1.

        Example:
            >>> import torch, lfm_torch as lfm
            >>> x = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
            >>> graph = lfm.build_graph(x, n_neighbors=8, metric="euclidean")
            >>> lfm.spectral_basis(graph, n_basis=5).extend(torch.randn(7, 2), x=x, graph=graph).shape
            torch.Size([7, 5])

        Source: Bengio et al. 2004 (NIPS 16), equation 3.
        """
        return extend_eigenvectors(self.evals, self.evecs, x_new, x=x, graph=graph)

    def to(self, target: torch.device | torch.dtype | str) -> Basis:
        """Move to a device (a str names one), or cast the eigenpairs to a dtype."""
        evecs = self.evecs.to(target)
        return replace(
            self,
            evals=self.evals.to(target),
            evecs=evecs,
            residuals=self.residuals.to(target),
            converged=self.converged.to(evecs.device),
            n_components=self.n_components.to(evecs.device),
            guards=None if self.guards is None else self.guards.to(target),
        )

    def save(self, path: str | Path) -> None:
        """Write to a safetensors file."""
        _files.save_record(path, self)

    @classmethod
    def load(cls, path: str | Path) -> Basis:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: the file holds something else.
        """
        return _files.load_record(path, cls)
