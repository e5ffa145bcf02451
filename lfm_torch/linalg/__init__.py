"""Eigensolvers for the low end of a symmetric operator's spectrum."""

from lfm_torch.linalg.derivative import differentiable_eigenpairs
from lfm_torch.linalg.eigenpairs import Eigenpairs
from lfm_torch.linalg.solve import smallest_eigenpairs

__all__ = ["Eigenpairs", "differentiable_eigenpairs", "smallest_eigenpairs"]
