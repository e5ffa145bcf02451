"""The energy of a functional map: value, gradient, curvature and preconditioner, matrix-free and batched.

With descriptors ``A = Phi_x^T f_x``, ``B = Phi_y^T f_y`` of unit columns and ``S_k = Phi^T diag(f_k) Phi``:

    E(C) =      1 / p        |C A - B|^2
         + laplacian / m_x   sum_ij w_ij C_ij^2,                 w_ij = (b_i - a_j)^2, scaled to mean 1
         + commutativity / (m_x p)  sum_k |S_k^y C - C S_k^x|^2
         + orthogonality / m_x      |C^T C - I|^2
         + ridge / m_x              |C|^2

The second derivative of the quadratic part couples rows of C only through the commutativity term. Its diagonal blocks,
one ``m_x x m_x`` matrix for every row, are factorised once: they are the exact answer without that term and the
preconditioner of conjugate gradients with it. Nothing has ``(m_x m_y)^2`` entries.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lfm_torch._precision import matmul

# bytes of one slice of the products S_k^y C S_k^x
_SLICE_BYTES = 1 << 28


@dataclass(frozen=True)
class MapEnergy:
    """The energy for fixed inputs; leading dimensions are a batch of pairs.

    Attributes:
        A: ``[..., m_x, p]`` descriptors on x in its basis.
        B: ``[..., m_y, p]``.
        penalty: ``[..., m_y, m_x]`` all elementwise weights of ``C^2``: Laplacian term and ridge.
        S_x: ``[..., p, m_x, m_x]`` multiplication operators, None without the commutativity term.
        S_y: ``[..., p, m_y, m_y]``.
        commutativity: scale of the commutativity term.
        orthogonality: scale of the orthogonality term.
    """

    A: Tensor
    B: Tensor
    penalty: Tensor
    S_x: Tensor | None
    S_y: Tensor | None
    commutativity: Tensor
    orthogonality: Tensor

    def detach(self) -> MapEnergy:
        """The same energy without gradients."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return MapEnergy(*(value.detach() if isinstance(value, Tensor) else value for value in values))

    @property
    def requires_grad(self) -> bool:
        """Whether anything the energy depends on asks for a gradient."""
        values = (getattr(self, name) for name in self.__dataclass_fields__)
        return any(isinstance(value, Tensor) and value.requires_grad for value in values)

    @property
    def p(self) -> int:
        """Number of descriptors."""
        return self.A.shape[-1]

    @functools.cached_property
    def squares(self) -> tuple[Tensor, Tensor]:
        """``sum_k S_k^2`` on x and on y."""
        assert self.S_x is not None
        assert self.S_y is not None
        wide_x, wide_y = (s.transpose(-3, -2).flatten(-2) for s in (self.S_x, self.S_y))
        return wide_x @ wide_x.mT, wide_y @ wide_y.mT

    @functools.cached_property
    def gram(self) -> tuple[Tensor, Tensor]:
        """``A A^T / p`` and ``B A^T / p``."""
        return matmul(self.A, self.A.mT) / self.p, matmul(self.B, self.A.mT) / self.p

    def value(self, C: Tensor) -> Tensor:
        """E(C), ``[...]``."""
        total = dot(C @ self.A - self.B, C @ self.A - self.B) / self.p + dot(self.penalty * C, C)
        if self.S_x is not None:
            total = total + dot(C, self._commutativity_product(C))
        gap = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        return total + self.orthogonality * dot(gap, gap)

    def quadratic_product(self, C: Tensor) -> Tensor:
        """Half the second derivative of the quadratic part, applied to ``C``."""
        product = matmul(C, self.gram[0]) + self.penalty * C
        return product if self.S_x is None else product + self._commutativity_product(C)

    def _commutativity_product(self, C: Tensor) -> Tensor:
        """``sum_k S^y (S^y C - C S^x) - (S^y C - C S^x) S^x``, scaled: two GEMMs a slice of descriptors."""
        assert self.S_x is not None
        assert self.S_y is not None
        square_x, square_y = self.squares
        product = square_y @ C + C @ square_x
        m_y, m_x = C.shape[-2:]
        step = max(1, _SLICE_BYTES // (C.element_size() * m_x * m_y * max(1, C[..., 0, 0].numel())))
        for s_x, s_y in zip(torch.split(self.S_x, step, -3), torch.split(self.S_y, step, -3), strict=True):
            moved = (s_y.flatten(-3, -2) @ C).view(*s_y.shape[:-1], m_x)
            product = product - 2 * moved.transpose(-3, -2).flatten(-2) @ s_x.flatten(-3, -2)
        return self.commutativity[..., None, None] * product

    def half_gradient(self, C: Tensor) -> Tensor:
        """Half the derivative of E at ``C``."""
        eye = torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)
        return (
            self.quadratic_product(C) - self.gram[1] + 2 * self.orthogonality[..., None, None] * (C @ (C.mT @ C - eye))
        )

    def curvature(self, C: Tensor) -> Callable[[Tensor], Tensor]:
        """Half the second derivative of E at ``C`` as an operator."""
        if not bool((self.orthogonality != 0).any()):
            return self.quadratic_product
        weight = 2 * self.orthogonality[..., None, None]
        gap = C.mT @ C - torch.eye(C.shape[-1], dtype=C.dtype, device=C.device)

        def apply(D: Tensor) -> Tensor:
            mixed = D.mT @ C
            return self.quadratic_product(D) + weight * (C @ (mixed + mixed.mT) + D @ gap)

        return apply

    @functools.cached_property
    def blocks(self) -> Tensor:
        """Diagonal blocks of the quadratic part, one for every row of C: ``[..., m_y, m_x, m_x]``."""
        gram = self.gram[0]
        blocks: Tensor = gram.unsqueeze(-3) + torch.diag_embed(self.penalty)
        if self.S_x is None:
            return blocks
        assert self.S_y is not None
        square_x, square_y = self.squares
        on_y = self.S_y.diagonal(dim1=-2, dim2=-1)  # [..., p, m_y]
        crossed = (on_y.mT @ self.S_x.flatten(-2)).reshape(*self.penalty.shape, self.penalty.shape[-1])
        own = torch.diag_embed(square_y.diagonal(dim1=-2, dim2=-1).unsqueeze(-1).expand(self.penalty.shape))
        return blocks + self.commutativity[..., None, None, None] * (own + square_x.unsqueeze(-3) - 2 * crossed)

    def preconditioner(self, C: Tensor | None = None) -> Callable[[Tensor], Tensor]:
        """Solve with the diagonal blocks of the quadratic part, at ``C`` with those of the orthogonality term too."""
        blocks = self.blocks
        if C is not None:
            length = C.square().sum(-1, keepdim=True).expand(C.shape)
            own = torch.diag_embed(length) + C.unsqueeze(-1) * C.unsqueeze(-2)
            blocks = blocks + 2 * self.orthogonality[..., None, None, None] * own
        factors = torch.linalg.cholesky(blocks)
        return lambda R: torch.cholesky_solve(R.unsqueeze(-1), factors).squeeze(-1)


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of the matrices, ``[...]``."""
    return (a * b).sum((-2, -1))
