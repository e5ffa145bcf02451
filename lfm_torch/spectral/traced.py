"""The eigensolver as one operator: what stands in a traced program for :func:`lfm_torch.spectral_basis`.

A solver looks at values at every step, which cannot be traced. The operator runs when the traced program does, on real
tensors, and then is the function itself, with its checks and warnings. Its derivative solves once more, which gives the
same pairs again, and takes the gradient of that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lfm_torch.graphs.graph import Graph
from lfm_torch.graphs.laplacian import Laplacian
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.eigensolve import solve_basis

Parts = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


def traced_pairs(laplacian: Laplacian, n_basis: int, solver: str, tol: float, max_iterations: int | None) -> Parts:
    """``evals``, ``evecs``, ``residuals``, ``converged`` and ``n_components`` of a Basis, by the operator."""
    graph = laplacian.graph
    matrix = (graph.rowptr, graph.col, graph.weight, graph.n_nodes, graph.batch_shape, laplacian.normalization)
    # eigenvalues are moved apart where gradients are recorded
    recorded = torch.is_grad_enabled() and graph.weight.requires_grad
    parts: Parts = _basis(*matrix, n_basis, solver, tol, max_iterations, recorded)
    return parts


def _solved(
    rowptr: Tensor, col: Tensor, weight: Tensor, n_nodes: int, batch: Sequence[int], normalization: Any, *how: Any
) -> Basis:
    laplacian = Laplacian(Graph(rowptr, col, weight, n_nodes, tuple(batch)), normalization)
    return solve_basis(laplacian, *how)


@torch.library.custom_op("lfm_torch_traced::spectral_basis", mutates_args=())
def _basis(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    n_nodes: int,
    batch: Sequence[int],
    normalization: str,
    n_basis: int,
    solver: str,
    tol: float,
    max_iterations: int | None,
    recorded: bool,
) -> Parts:
    with torch.set_grad_enabled(recorded):
        points = weight.detach().requires_grad_(recorded)
        basis = _solved(rowptr, col, points, n_nodes, batch, normalization, n_basis, solver, tol, max_iterations)
    evals, evecs = basis.evals.detach(), basis.evecs.detach()
    return evals, evecs, basis.residuals.detach(), basis.converged, basis.n_components.clone()


@_basis.register_fake
def _fake_basis(
    rowptr: Tensor, col: Tensor, weight: Tensor, n_nodes: int, batch: Sequence[int], normalization: str, n_basis: int,
    *how: Any,
) -> Parts:  # fmt: skip
    values, counts = weight.new_empty(*batch, n_basis), rowptr.new_empty(tuple(batch))
    evecs = weight.new_empty(*batch, n_nodes, n_basis)
    return values, evecs, torch.empty_like(values), torch.empty_like(values, dtype=torch.bool), counts


@torch.library.custom_op("lfm_torch_traced::spectral_basis_backward", mutates_args=())
def _gradient(
    rowptr: Tensor,
    col: Tensor,
    weight: Tensor,
    n_nodes: int,
    batch: Sequence[int],
    normalization: str,
    n_basis: int,
    solver: str,
    tol: float,
    max_iterations: int | None,
    g_evals: Tensor,
    g_evecs: Tensor,
) -> Tensor:
    with _autograd(), torch.enable_grad():
        points = weight.detach().requires_grad_()
        basis = _solved(rowptr, col, points, n_nodes, batch, normalization, n_basis, solver, tol, max_iterations)
        (gradient,) = torch.autograd.grad((basis.evals, basis.evecs), points, (g_evals, g_evecs))
    return gradient


@_gradient.register_fake
def _fake_gradient(rowptr: Tensor, col: Tensor, weight: Tensor, *rest: Any) -> Tensor:
    return torch.empty_like(weight)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Parts) -> None:
    rowptr, col, weight, *ctx.how, _ = inputs
    ctx.save_for_backward(rowptr, col, weight)
    ctx.mark_non_differentiable(*output[2:])


def _backward(ctx: Any, g_evals: Tensor, g_evecs: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    gradient = _gradient(*ctx.saved_tensors, *ctx.how, g_evals.contiguous(), g_evecs.contiguous())
    return None, None, gradient, *[None] * (len(ctx.how) + 1)


_basis.register_autograd(_backward, setup_context=_setup_context)


@contextmanager
def _autograd() -> Iterator[None]:
    """Let autograd record inside an operator, where the dispatcher has left it behind."""
    key = torch._C.DispatchKey.AutogradFunctionality
    with torch._C._PreserveDispatchKeyGuard():
        torch._C._dispatch_tls_set_dispatch_key_excluded(key, False)
        yield
