"""Classical measures of representation similarity, done right, to stand beside the library's own."""

from lfm_torch.baselines.cca import mean_cca, pwcca, svcca
from lfm_torch.baselines.cka import MinibatchCKA, debiased_cka, linear_cka, minibatch_cka, rbf_cka
from lfm_torch.baselines.neighbors import mutual_knn
from lfm_torch.baselines.procrustes import procrustes
from lfm_torch.baselines.regression import linear_regression, relative_representation, relative_similarity
from lfm_torch.baselines.rsa import rsa

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
