"""Eigensolvers for the low end of a symmetric operator's spectrum."""

from lfm_torch.linalg.eigenpairs import Eigenpairs, dense_eigenpairs

__all__ = ["Eigenpairs", "dense_eigenpairs"]
