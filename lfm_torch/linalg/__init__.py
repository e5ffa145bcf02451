"""From a symmetric operator to the low end of its spectrum, and the derivatives of that.

Takes anything that multiplies ``[..., n, m]``, with a bound on its spectrum, and knows no graph; gives Eigenpairs whose
residuals, orthogonality and order are checked, whichever solver found them.
"""

from lfm_torch.linalg.derivative import differentiable_eigenpairs
from lfm_torch.linalg.eigenpairs import Eigenpairs
from lfm_torch.linalg.solve import smallest_eigenpairs

__all__ = ["Eigenpairs", "differentiable_eigenpairs", "smallest_eigenpairs"]
