"""Losses that align a representation to a target: thin modules over graph, basis, map and readings.

Takes a batch ``x [n, d]`` of the student, and the target's batch or its basis; gives a scalar to descend.

Which one to take:

- :class:`DirichletAlignmentLoss` asks that the target's low eigenfunctions vary little along the edges of the
  student's graph. No eigenvector is differentiated: it is cheap and smooth, and the one to start with. Its value is an
  energy without a fixed optimum; watch a similarity beside it.
- :class:`LFMAlignmentLoss` differentiates the similarity itself, through graph, eigenpairs and map. It costs several
  times as much and optimises exactly what is reported; it also serves rows that do not correspond, through descriptors.

Both see one batch as one space: batches of a few hundred rows or more, with several rows of every class, work; batches
of 32 do not hold a neighbour graph worth the name.

``torch.compile(fullgraph=True)`` takes both: see :func:`lfm_torch.spectral_basis` for what that changes.
"""

from lfm_torch.losses.dirichlet import DirichletAlignmentLoss
from lfm_torch.losses.lfm import LFMAlignmentLoss

__all__ = ["DirichletAlignmentLoss", "LFMAlignmentLoss"]
