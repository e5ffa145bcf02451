"""The graph Laplacian as a matrix-free operator on functions ``[..., n, m]``."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from lfm_torch import _checks, ops
from lfm_torch._checks import ArrayLike
from lfm_torch._precision import outside_autocast
from lfm_torch.graphs.edges import Edges
from lfm_torch.linalg.chebyshev import chebyshev_sums, heat_coefficients
from lfm_torch.ops.knn import unit_rows

if TYPE_CHECKING:
    import scipy.sparse
    from torch_sparse import SparseTensor

Normalization = Literal["symmetric", "random_walk", "unnormalized"]
NORMALIZATIONS = ("symmetric", "random_walk", "unnormalized")


@dataclass(frozen=True, repr=False, eq=False)
class Laplacian:
    """Graph Laplacian as a matrix-free operator on functions ``[..., n, m]``.

    - "symmetric": ``L = I - D^{-1/2} W D^{-1/2}``, spectrum in [0, 2];
    - "random_walk": ``L = I - D^{-1} W``, the same spectrum, not symmetric;
    - "unnormalized": ``L = D - W``.

    A node without edges has a zero row, so the multiplicity of eigenvalue 0 is the number of components. Differentiable
    in the functions and in the edge weights (through the degrees as well).

    Example:
        >>> import torch, lfm_torch as lfm
        >>> graph = lfm.build_graph(torch.randn(30, 3), n_neighbors=5)
        >>> (graph.laplacian("unnormalized") @ torch.ones(30, 1)).abs().max() < 1e-5
        tensor(True)
    """

    graph: Edges
    normalization: Normalization = "symmetric"
    transposed: bool = False

    def __post_init__(self) -> None:
        _checks.check_choice("normalization", self.normalization, NORMALIZATIONS)

    def __repr__(self) -> str:
        return f"Laplacian({self.normalization}, {self.graph!r})"

    @property
    def shape(self) -> tuple[int, ...]:
        """``(..., n, n)``."""
        return (*self.graph.batch_shape, self.graph.n_nodes, self.graph.n_nodes)

    @property
    def upper_bound(self) -> float:
        """A bound on the largest eigenvalue: 2, or twice the largest degree."""
        return 2.0 if self.normalization != "unnormalized" else 2.0 * float(self.graph.degree.detach().max())

    @property
    def scalings(self) -> tuple[Tensor, Tensor, Tensor]:
        """``diagonal, left, right`` over all nodes of the batch: ``L = diag(diagonal) - diag(left) W diag(right)``."""
        return self._cached_scalings if self.graph.is_constant else self._compute_scalings()

    @functools.cached_property
    def _cached_scalings(self) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            return self._compute_scalings()

    def _compute_scalings(self) -> tuple[Tensor, Tensor, Tensor]:
        degree = self.graph.degree.flatten()
        connected = degree > 0
        ones = torch.ones_like(degree)
        if self.normalization == "unnormalized":
            return degree, ones, ones
        safe = torch.where(connected, degree, 1.0)
        diagonal = connected.to(degree.dtype)
        if self.normalization == "random_walk":
            return (diagonal, ones, diagonal / safe) if self.transposed else (diagonal, diagonal / safe, ones)
        inverse_root = diagonal * safe.rsqrt()
        return diagonal, inverse_root, inverse_root

    @property
    def T(self) -> Laplacian:  # noqa: N802 (as tensors call it)
        """The transpose; itself unless "random_walk"."""
        return replace(self, transposed=not self.transposed) if self.normalization == "random_walk" else self

    def unbatch(self) -> list[Laplacian]:
        """Return the Laplacians of the graphs of a batch one by one: see :meth:`Edges.unbatch`."""
        return [replace(self, graph=graph) for graph in self.graph.unbatch()]

    @property
    def diagonal(self) -> Tensor:
        """Diagonal entries, ``[..., n]`` (a graph has no loops: those of the degree part alone)."""
        return self.scalings[0].view(*self.graph.batch_shape, self.graph.n_nodes)

    @outside_autocast
    def quadratic_form(self, x: ArrayLike) -> Tensor:
        """Energies ``<x_i, L x_i>`` of functions ``[..., n, m]``, ``[..., m]``; the Dirichlet energy if "unnormalized".

        Of a ragged batch one of each graph, ``[b, m]``. Differentiable like :meth:`apply`.
        """
        x = _checks.as_tensor("x", x)
        products = x * self.apply(x)
        if self.graph.offsets is None:
            return products.sum(-2)
        lengths = self.graph.offsets.diff().to(x.device)
        return torch.segment_reduce(products, "sum", lengths=lengths, axis=0)

    def __matmul__(self, x: ArrayLike) -> Tensor:
        return self.apply(x)

    def apply(
        self, x: ArrayLike, z: ArrayLike | None = None, *, a: float = 1.0, b: float = 0.0, c: float = 0.0
    ) -> Tensor:
        """Return ``a L x + b x + c z`` in one pass over the edges.

        Args:
            x: Functions ``[..., n, m]``.
            z: None or functions of the same shape.
            a: Coefficient of ``L x``.
            b: Coefficient of ``x``.
            c: Coefficient of ``z``.

        Raises:
            TypeError: ``x`` has another dtype than the weights.
            ValueError: wrong shape.
        """
        x = self._functions("x", x)
        z = None if z is None else _checks.as_tensor("z", z)
        if z is not None and z.shape != x.shape:
            raise ValueError(f"z must have the shape of x, {list(x.shape)}, got {list(z.shape)}")
        graph = self.graph
        flat = x.reshape(-1, x.shape[-1])
        other = None if z is None else z.reshape(-1, x.shape[-1])
        if x.is_cuda and x.dtype != graph.weight.dtype:  # the CUDA kernel stores what it computes in
            flat, other = flat.to(graph.weight.dtype), None if other is None else other.to(graph.weight.dtype)
        y = ops.laplacian_product(graph.rowptr, graph.col, graph.weight, *self.scalings, flat, other, a=a, b=b, c=c)
        return y.to(x.dtype).view(x.shape)

    def recurrence(self, x: ArrayLike, coefficients: Sequence[tuple[float, float, float]]) -> Tensor:
        """A polynomial in L of ``x`` by a three-term recurrence: ``y_k = a_k L y_{k-1} + b_k y_{k-1} + c_k y_{k-2}``.

        With ``y_{-1} = x`` and ``y_{-2} = 0``; it is what as many calls of :meth:`apply` give, faster. Differentiable
        like :meth:`apply`, by these calls.

        Args:
            x: Functions ``[..., n, m]``.
            coefficients: ``(a_k, b_k, c_k)`` of each step.

        Returns:
            The last ``y``, ``[..., n, m]``.

        Raises:
            TypeError: ``x`` has another dtype than the weights.
            ValueError: wrong shape, or no step.
        """
        if not coefficients:
            raise ValueError("coefficients must hold at least one step, got none")
        x = self._functions("x", x)
        graph = self.graph
        recorded = torch.is_grad_enabled() and (x.requires_grad or graph.weight.requires_grad)
        if recorded or x.dtype != graph.weight.dtype:
            previous, current = None, x
            for a, b, c in coefficients:
                previous, current = current, self.apply(current, previous, a=a, b=b, c=c)
            return current
        flat, steps = x.reshape(-1, x.shape[-1]), torch.tensor(coefficients, dtype=torch.float64, device="cpu")
        graphs = max(1, math.prod(graph.batch_shape))
        y = ops.laplacian_recurrence(graph.rowptr, graph.col, graph.weight, *self.scalings, flat, steps, graphs)
        return y.view(x.shape)

    def _functions(self, name: str, x: ArrayLike) -> Tensor:
        x = _checks.as_tensor(name, x)
        expected = (*self.graph.batch_shape, self.graph.n_nodes)
        if tuple(x.shape[:-1]) != expected:
            raise ValueError(f"{name} must have shape {[*expected, 'm']}, got {list(x.shape)}")
        weights = self.graph.weight.dtype
        if x.dtype != weights and not (weights == torch.float32 and x.dtype in (torch.float16, torch.bfloat16)):
            raise TypeError(
                f"{name} must have the dtype of the weights, {weights} (or be float16 or bfloat16 where that is "
                f"float32), got {x.dtype}"
            )
        return x

    @outside_autocast
    def heat(self, x: ArrayLike, *, time: float | Sequence[float], tol: float | None = None) -> Tensor:
        r"""Diffuse functions: ``exp(-t L) x``, without any eigenvector.

        Chebyshev expansion ``exp(-t L) = sum_k c_k T_k(L / h - 1)``, h half the bound of the spectrum, with
        ``c_k = 2 (-1)^k exp(-t h) I_k(t h)`` cut where what is left sums to ``tol``. The error of a column is then at
        most ``tol`` times its norm (for "random_walk" in the norm weighted by the degrees), apart from rounding. It
        takes about ``sqrt(2 t h log(1 / tol))`` products, shared by all times. Differentiable like :meth:`apply`.

        Args:
            x: Functions ``[..., n, m]``.
            time: Diffusion time, not negative, or a sequence of times.
            tol: Error bound; None for 1e-6 in float32 and 1e-12 in float64.

        Returns:
            ``[..., n, m]``, for a sequence of times ``[len(time), ..., n, m]``.

        Raises:
            TypeError: ``x`` has another dtype than the weights.
            ValueError: wrong shape, a negative time or one that is not finite, no time at all.

        Example:
            >>> import torch, lfm_torch as lfm
            >>> laplacian = lfm.build_graph(torch.randn(30, 3), n_neighbors=5).laplacian("random_walk")
            >>> torch.allclose(laplacian.heat(torch.ones(30, 1), time=2.0), torch.ones(30, 1), atol=1e-5)
            True

        Source: Hammond, Vandergheynst & Gribonval 2011, section 6 (arXiv 0912.3848), with the coefficients in closed
        form.
        """
        single = isinstance(time, (int, float))
        times = [float(time)] if isinstance(time, (int, float)) else [float(t) for t in time]
        if not times or not all(0 <= t < math.inf for t in times):
            raise ValueError(f"time must be one or more finite numbers that are not negative, got {time}")
        x = self._functions("x", x)
        tol = (1e-12 if x.dtype == torch.float64 else 1e-6) if tol is None else tol
        half = self.upper_bound / 2
        sums = chebyshev_sums(self, x, [heat_coefficients(t * half, tol) for t in times])
        return sums[0] if single else torch.stack(sums)

    def null_space(self, max_vectors: int) -> Tensor:
        """Orthonormal eigenvectors of eigenvalue 0, one per component: ``[..., n, c]``, c at most ``max_vectors``.

        ``D^{1/2} 1`` on a component, normalised (unnormalized: the constant). In a batch c is that of the graph with
        the most components; the others have zero columns at the end. Differentiable in the weights.

        Raises:
            ValueError: for the random-walk Laplacian, which is not symmetric.
        """
        if self.normalization == "random_walk":
            raise ValueError(
                "normalization must be 'symmetric' or 'unnormalized' for orthonormal eigenvectors, got 'random_walk'"
            )
        labels = self.graph.component_labels
        local = labels - labels.amin(-1, keepdim=True)
        columns = min(max_vectors, int(self.graph.n_components.max()))
        degree = self.graph.degree
        safe = torch.where(degree > 0, degree, 1.0)
        size = safe.sqrt() if self.normalization == "symmetric" else torch.ones_like(degree)
        chosen = local < columns
        vectors = size.new_zeros(*size.shape, columns)
        vectors.scatter_(-1, (local * chosen).unsqueeze(-1), (size * chosen).unsqueeze(-1))
        return unit_rows(vectors.mT).mT

    def to_dense(self) -> Tensor:
        """Return ``[..., n, n]``; meant for small n."""
        n = self.graph.n_nodes
        identity = torch.eye(n, dtype=self.graph.weight.dtype, device=self.graph.weight.device)
        return self.apply(identity.expand(*self.graph.batch_shape, n, n).contiguous())

    def to_scipy(self) -> scipy.sparse.csr_matrix:
        """Return a SciPy CSR matrix (block diagonal for a batch).

        Raises:
            ImportError: SciPy is not installed.
        """
        matrix = self.to_torch_csr()
        return scipy_csr(matrix.crow_indices(), matrix.col_indices(), matrix.values())

    def to_torch_csr(self) -> Tensor:
        """Return a torch sparse CSR tensor without gradient (block diagonal for a batch), made where the weights are.

        Every row has an entry on the diagonal, also where that is 0.
        """
        graph, (diagonal, left, right) = self.graph, (scaling.detach() for scaling in self.scalings)
        n = graph.rowptr.numel() - 1
        nodes = torch.arange(n, device=graph.col.device)
        rows, col = torch.repeat_interleave(nodes, graph.rowptr.diff()), graph.col.long()
        order = torch.cat([rows * n + col, nodes * (n + 1)]).argsort()  # the diagonal into its places
        values = torch.cat([-(left[rows] * graph.weight.detach() * right[col]), diagonal])[order]
        rowptr = graph.rowptr + torch.arange(n + 1, device=graph.rowptr.device)
        return torch.sparse_csr_tensor(
            rowptr, torch.cat([col, nodes])[order], values, (n, n), device=values.device, check_invariants=False
        )

    def to_torch_sparse(self) -> SparseTensor:
        """Return a ``torch_sparse.SparseTensor`` without gradient (block diagonal for a batch).

        Raises:
            ImportError: torch_sparse is not installed.
        """
        try:
            from torch_sparse import SparseTensor
        except ImportError as error:
            raise ImportError('Laplacian.to_torch_sparse needs torch_sparse: pip install "lfm-torch[pyg]"') from error
        matrix = self.to_torch_csr()
        parts = {"rowptr": matrix.crow_indices(), "col": matrix.col_indices(), "value": matrix.values()}
        return SparseTensor(**parts, sparse_sizes=tuple(matrix.shape), is_sorted=True, trust_data=True)


def scipy_csr(rowptr: Tensor, col: Tensor, values: Tensor) -> scipy.sparse.csr_matrix:
    """Return a square SciPy matrix of the parts of a CSR matrix, on the CPU and without gradient."""
    try:
        from scipy.sparse import csr_matrix
    except ImportError as error:
        raise ImportError('to_scipy needs scipy: pip install "lfm-torch[scipy]"') from error
    n = rowptr.numel() - 1
    return csr_matrix(tuple(part.detach().cpu().numpy() for part in (values, col, rowptr)), shape=(n, n))
