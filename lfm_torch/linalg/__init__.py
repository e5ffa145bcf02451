"""Eigensolvers for the low end of a symmetric operator's spectrum."""

from lfm_torch.linalg.derivative import differentiable_eigenpairs
from lfm_torch.linalg.eigenpairs import Eigenpairs, dense_eigenpairs
from lfm_torch.linalg.krylov import krylov
from lfm_torch.linalg.lobpcg import lobpcg
from lfm_torch.linalg.refine import refine

__all__ = ["Eigenpairs", "dense_eigenpairs", "differentiable_eigenpairs", "krylov", "lobpcg", "refine"]
