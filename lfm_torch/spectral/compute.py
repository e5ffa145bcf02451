"""From a graph to the low eigenvectors of its Laplacian: what is asked is checked, then solved here or when traced."""

from __future__ import annotations

import torch

from lfm_torch import _checks
from lfm_torch._precision import outside_autocast
from lfm_torch.graphs.graph import Graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.eigensolve import SOLVERS, Solver, solve_basis
from lfm_torch.spectral.sizes import default_n_basis
from lfm_torch.spectral.traced import traced_pairs


def default_tol(dtype: torch.dtype) -> float:
    """Residual norm asked for when no ``tol`` is given: 1e-5 in float32, 1e-8 in float64."""
    return 1e-8 if dtype == torch.float64 else 1e-5


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
    return solve_basis(laplacian, n_basis, solver, tol, max_iterations, warm_start, generator)
