"""The classical measures of representation similarity, done right, to stand beside the library's own.

Takes two representations ``[n, d_x]`` and ``[n, d_y]`` of the same samples; gives a scalar. Each is prepared once per
representation and scored per pair, so that all pairs of many cost little; :mod:`lfm_torch.measures` lists them all.
"""

from lfm_torch.baselines.cca import mean_cca, pwcca, svcca
from lfm_torch.baselines.cka import MinibatchCKA, debiased_cka, linear_cka, minibatch_cka, rbf_cka
from lfm_torch.baselines.dissimilarity import rsa
from lfm_torch.baselines.neighbors import mutual_knn
from lfm_torch.baselines.regression import linear_regression, relative_representation, relative_similarity
from lfm_torch.baselines.shape import procrustes

__all__ = [
    "MinibatchCKA",
    "debiased_cka",
    "linear_cka",
    "linear_regression",
    "mean_cca",
    "minibatch_cka",
    "mutual_knn",
    "procrustes",
    "pwcca",
    "rbf_cka",
    "relative_representation",
    "relative_similarity",
    "rsa",
    "svcca",
]
