"""The low eigenvectors of a graph Laplacian: the basis in which functions on a representation are written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import matmul, outside_autocast, product
from lfm_torch._warnings import warn
from lfm_torch.graphs.graph import Graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.linalg import differentiable_eigenpairs, smallest_eigenpairs
from lfm_torch.linalg.chebyshev import Window
from lfm_torch.linalg.eigenpairs import Eigenpairs, residual_norms
from lfm_torch.ops.knn import unit_rows
from lfm_torch.spectral.nystrom import extend_basis
from lfm_torch.spectral.traced import traced_pairs

Solver = Literal["auto", "lobpcg", "krylov", "dense"]
# not one that data is likely to be drawn with: a start that is the data itself misleads the survey of the spectrum
_SEED = 0x5EED_BA515
SOLVERS = ("auto", "lobpcg", "krylov", "dense")


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
        return extend_basis(self, x_new, x=x, graph=graph)

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


def default_tol(dtype: torch.dtype) -> float:
    """Residual norm asked for when no ``tol`` is given: 1e-5 in float32, 1e-8 in float64."""
    return 1e-8 if dtype == torch.float64 else 1e-5


def default_n_basis(n: int) -> int:
    """Eigenvectors taken when no number is asked for: a quarter of the points, at least 2 and at most 50."""
    return min(50, max(2, n // 4), n - 1)


@outside_autocast
def spectral_basis(
    graph: Graph | Laplacian,
    *,
    n_basis: int | None = None,
    solver: Solver = "auto",
    tol: float | None = None,
    max_iterations: int | None = None,
    warm_start: Basis | None = None,
    generator: torch.Generator | None = None,
) -> Basis:
    """Compute the ``n_basis`` smallest eigenpairs of the graph's Laplacian, ``L phi_i = lambda_i phi_i``.

    The eigenvectors of eigenvalue 0 are known (one per connected component) and set exactly, the first to ``D^{1/2} 1``
    over all; the solver works in their complement, so disconnected graphs come out right. Eigenvectors are orthonormal;
    inside a repeated eigenvalue the choice of basis is arbitrary but reproducible.

    Differentiable in the edge weights (and so in the points of :func:`build_graph`), by implicit derivatives that are
    exact for the truncated basis: a closed form among the computed pairs, one projected linear system a column for the
    rest. Losses that do not depend on the rotation inside a repeated eigenvalue get the right gradient; to have it,
    eigenvalues nearer than 1e-5 (1e-9 in float64) of half the spectrum's bound are moved apart to that distance where
    gradients are recorded. Other losses have no derivative there: the terms of the pairs in question are faded out,
    as are those across a basis that ends inside a repeated eigenvalue. Not twice differentiable.

    Under torch.compile and torch.export the solver is one operator. What it has to say of itself is said when that
    runs; the Basis is without ``guards`` and ``window``, has ``iterations`` 0, and ``solver`` is what was asked for.
    The backward pass solves once more.

    Args:
        graph: A Graph (its symmetric normalised Laplacian is taken) or a Laplacian, "symmetric" or "unnormalized".
        n_basis: Number of pairs, less than the number of points; None takes a quarter of the points, at most 50.
        solver: "lobpcg" (batched, block method with Chebyshev preconditioning), "krylov" (thick-restarted block
            Lanczos), "dense" (``eigh``), or "auto": dense for small graphs, else the fastest by measurement. A graph
            for which one fails is handed to the next of them, to the dense one up to 4,096 points.
        tol: Largest residual norm ``|L v - lambda v|`` relative to the bound of the spectrum divided by 2; None for
            1e-5 in float32 and 1e-8 in float64.
        max_iterations: Iterations of the solver before it gives up with a warning, without handing on; None for the
            solver's default.
        warm_start: A basis of the same points on a similar graph to start from.
        generator: Source of the random start, on the device of the graph; None for a fixed seed.

    Returns:
        Basis, with residuals, convergence and the number of components.

    Raises:
        TypeError: ``graph`` is neither a Graph nor a Laplacian.
        ValueError: ``n_basis`` not below the number of points, a random-walk Laplacian, a warm start of another shape,
            a ragged batch (its bases have no common shape: take those of :meth:`Graph.unbatch`).

    Warns:
        LFMWarning: pairs that did not converge, with their number, residual and lack of orthogonality; in the backward
            pass, linear systems that did not.

    Example:
        >>> import torch, lfm_torch as lfm
        >>> graph = lfm.build_graph(torch.randn(40, 3, generator=torch.Generator().manual_seed(0)), n_neighbors=8)
        >>> basis = lfm.spectral_basis(graph, n_basis=5)
        >>> basis.evecs.shape, int(basis.n_components)
        (torch.Size([40, 5]), 1)
    """
    _checks.check_choice("solver", solver, SOLVERS)
    laplacian = graph.laplacian() if isinstance(graph, Graph) else graph
    if not isinstance(laplacian, Laplacian):
        raise TypeError(f"graph must be a Graph or a Laplacian, got {type(graph).__name__}")
    if laplacian.normalization == "random_walk":
        raise ValueError(
            "graph must be a symmetric operator, got the random_walk Laplacian; take the symmetric one: its "
            "eigenvalues are the same, its eigenvectors times D^{-1/2} those of the random walk"
        )
    if laplacian.graph.offsets is not None:
        raise ValueError(
            f"graph must be one graph or graphs of equal size, got {laplacian.graph!r}; take "
            "[spectral_basis(g, ...) for g in graph.unbatch()]"
        )
    n = laplacian.graph.n_nodes
    n_basis = default_n_basis(n) if n_basis is None else n_basis
    _checks.check_range("n_basis", n_basis, 1, n - 1, f"less than the {n} points of the graph")
    if warm_start is not None and warm_start.evecs.shape[:-1] != laplacian.shape[:-1]:
        raise ValueError(
            f"warm_start must have evecs of shape {[*laplacian.shape[:-1], 'm']}, got {list(warm_start.evecs.shape)}"
        )
    tol = default_tol(laplacian.graph.weight.dtype) if tol is None else tol
    if not _checks.has_values(laplacian.graph.weight):
        if warm_start is not None or generator is not None:
            raise ValueError("warm_start and generator must be None where torch.compile or torch.export trace")
        return Basis(*traced_pairs(laplacian, n_basis, solver, tol, max_iterations), iterations=0, solver=solver)
    pairs, converged, used = _solve(laplacian, n_basis, solver, tol, max_iterations, warm_start, generator)
    if not bool(converged.all()):
        warn(
            f"spectral_basis: {int((~converged).sum())} of {converged.numel()} eigenpairs did not reach "
            f"tol={tol:g} in {pairs.iterations} iterations of {used}; largest residual "
            f"{float(pairs.residuals.max()):.2g}, largest entry of V^T V - I {_lack(pairs.evecs):.2g}",
        )
    evecs, components = _fix_signs(pairs.evecs), laplacian.graph.n_components
    how = (pairs.iterations, used, pairs.guards, pairs.window)
    return Basis(pairs.evals, evecs, pairs.residuals, converged, components, *how)


def _solve(
    laplacian: Laplacian,
    n_basis: int,
    solver: Solver,
    tol: float,
    max_iterations: int | None,
    warm_start: Basis | None,
    generator: torch.Generator | None,
) -> tuple[Eigenpairs, Tensor, str]:
    chosen = _choose_solver(laplacian, n_basis) if solver == "auto" else solver
    known = laplacian.null_space(n_basis)
    missing = n_basis - int(laplacian.graph.n_components.min())
    if missing <= 0:
        return *_only_null_space(laplacian, _constant_first(laplacian, known), tol), chosen
    differentiable = torch.is_grad_enabled() and laplacian.graph.weight.requires_grad
    with torch.no_grad():
        found = missing + _guards(laplacian, missing, chosen) if differentiable else missing
        start = None if warm_start is None or chosen == "dense" else _start_vectors(warm_start, known)
        if generator is None:
            generator = torch.Generator(known.device).manual_seed(_SEED)
        rest, converged, used = smallest_eigenpairs(
            laplacian,
            found,
            solver=chosen,
            tol=tol,
            known=known,
            needed=(n_basis - laplacian.graph.n_components).clamp_min(0),
            start=start,
            window=_window(warm_start, start, found) if warm_start is not None and solver != "lobpcg" else None,
            max_iterations=max_iterations,
            generator=generator,
        )
    if differentiable:
        evals, evecs = differentiable_eigenpairs(laplacian, rest, missing, known)
        spare = rest.evecs[..., missing:] if chosen != "dense" else None
        guards = spare if spare is None or rest.guards is None else torch.cat([spare, rest.guards], -1)
        rest = rest._replace(evals=evals, evecs=evecs, residuals=rest.residuals[..., :missing], guards=guards)
    return *_with_null_space(laplacian, known, rest, converged[..., :missing], n_basis, tol), used


def _start_vectors(warm_start: Basis, known: Tensor) -> Tensor:
    """What a former basis offers to start from: its vectors of eigenvalues above 0, and its guards."""
    null = min(int(warm_start.n_components.min()), known.shape[-1])
    vectors = warm_start.evecs[..., null:]
    return (vectors if warm_start.guards is None else torch.cat([vectors, warm_start.guards], -1)).to(known)


def _window(warm_start: Basis, start: Tensor | None, found: int) -> Window | None:
    """The spectrum that a former basis belongs to; None where the basis holds too little to be refined."""
    positive = warm_start.evals[warm_start.evals > 0]
    if warm_start.window is None or start is None or start.shape[-1] < found or positive.numel() == 0:
        return None
    return Window(float(positive.min()), float(positive.max()), *warm_start.window)


def _guards(laplacian: Laplacian, missing: int, solver: str) -> int:
    """Pairs to compute beyond the basis where derivatives are wanted: they make the linear systems easy.

    The dense solver has them all at no cost, and nothing is left to solve.
    """
    room = laplacian.graph.n_nodes - int(laplacian.graph.n_components.min()) - missing
    return room if solver == "dense" else min(room, max(8, missing // 4))


def _constant_first(laplacian: Laplacian, known: Tensor) -> Tensor:
    """Turn the null vectors, one per component, so that the first is ``D^{1/2} 1`` (unnormalized: the constant).

    It is the function that every two spaces share, which measures leave out; any basis of the null space is one.
    """
    if known.shape[-1] == 1:
        return known
    degree, count = laplacian.graph.degree, laplacian.graph.n_components
    connected = degree > 0  # the root has no derivative at 0
    root = torch.where(connected, degree, 1.0).sqrt() * connected
    constant = unit_rows(root if laplacian.normalization == "symmetric" else torch.ones_like(degree))
    present = torch.arange(known.shape[-1], device=known.device) < count.unsqueeze(-1)
    wanted = (known * constant.unsqueeze(-1)).sum(-2) * present
    # the reflection that takes the first axis to the direction of `wanted`; none where it is there, or where the null
    # vectors asked for are all of nodes without edges
    norm = wanted.norm(dim=-1, keepdim=True)
    axis = wanted / torch.where(norm > 0, norm, 1.0)
    axis = torch.cat([axis[..., :1] - 1, axis[..., 1:]], -1) * (norm > 0)
    length = axis.square().sum(-1, keepdim=True).unsqueeze(-1)
    outer = axis.unsqueeze(-1) * axis.unsqueeze(-2)
    return known - 2 * product(known, outer) / torch.where(length > 0, length, 1.0)


def _only_null_space(laplacian: Laplacian, known: Tensor, tol: float) -> tuple[Eigenpairs, Tensor]:
    zeros = known.detach().new_zeros(known.shape[:-2] + known.shape[-1:])
    residuals = residual_norms(laplacian, zeros, known).detach()
    return Eigenpairs(zeros, known, residuals, 0), residuals <= tol * laplacian.upper_bound / 2


def _with_null_space(
    laplacian: Laplacian, known: Tensor, rest: Eigenpairs, converged: Tensor, n_basis: int, tol: float
) -> tuple[Eigenpairs, Tensor]:
    """Join the known eigenvectors of eigenvalue 0 and the computed rest, graph by graph of the batch."""
    null, found = _only_null_space(laplacian, _constant_first(laplacian, known), tol)
    evecs, *rows = (
        torch.cat(parts, -1)
        for parts in (
            (null.evecs, rest.evecs),
            (null.evals, rest.evals),
            (null.residuals, rest.residuals),
            (found, converged),
        )
    )
    if bool((laplacian.graph.n_components >= known.shape[-1]).all()):  # no padding to skip
        evecs, rows = evecs[..., :n_basis], [row[..., :n_basis] for row in rows]
    else:  # a graph with c components takes its first c null vectors, then skips the padding of the others
        position = torch.arange(n_basis, device=known.device)
        components = laplacian.graph.n_components.clamp_max(known.shape[-1]).unsqueeze(-1)
        column = torch.where(position < components, position, position - components + known.shape[-1])
        evecs = evecs.gather(-1, column.unsqueeze(-2).expand(*evecs.shape[:-1], n_basis))
        rows = [row.gather(-1, column) for row in rows]
    evals, residuals, converged = rows
    return rest._replace(evals=evals, evecs=evecs, residuals=residuals), converged


def _choose_solver(laplacian: Laplacian, n_basis: int) -> str:
    n = laplacian.graph.n_nodes
    if n <= 512 or 4 * n_basis > n:
        return "dense"
    return "lobpcg" if laplacian.graph.weight.is_cuda else "krylov"


def _lack(evecs: Tensor) -> float:
    """Largest entry of ``V^T V - I``."""
    gram = product(evecs.detach().mT, evecs.detach())
    return float((gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)).abs().max())


def _fix_signs(evecs: Tensor) -> Tensor:
    """Make the entry of largest magnitude of every eigenvector positive."""
    largest = evecs.detach().gather(-2, evecs.detach().abs().argmax(-2, keepdim=True))
    return evecs * (1 - 2 * (largest < 0).to(evecs.dtype))
