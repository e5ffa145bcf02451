"""From a graph to its low eigenvectors, the basis in which functions on a representation are written.

Takes a Graph or a Laplacian; gives a Basis, eigenvalues ``[..., m]`` and eigenvectors ``[..., n, m]`` with their
residuals, its extension to new points, and bases turned towards one another.
"""

from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.basis_alignment import align_signs, align_subspaces
from lfm_torch.spectral.compute import spectral_basis
from lfm_torch.spectral.sizes import default_n_basis

__all__ = ["Basis", "align_signs", "align_subspaces", "default_n_basis", "spectral_basis"]
