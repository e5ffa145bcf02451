"""Classical measures of representation similarity, done right, to stand beside the library's own."""

from lfm_torch.baselines.cka import linear_cka

__all__ = ["linear_cka"]
