"""Reciprocal ranks as defined, and rows found among candidates."""

from __future__ import annotations

import pytest
import torch

import lfm_torch as lfm
from lfm_torch.maps.retrieval import mean_reciprocal_rank, retrieve


def test_reciprocal_ranks_as_defined() -> None:
    queries, candidates = torch.randn(30, 5, dtype=torch.float64), torch.randn(40, 5, dtype=torch.float64)
    targets = torch.randint(0, 40, (30,))
    for metric in ("euclidean", "cosine", "angular", "inner_product"):
        order = lfm.knn(queries, candidates, n_neighbors=40, metric=metric).indices  # type: ignore[arg-type]
        ranks = (order == targets[:, None]).nonzero()[:, 1] + 1
        got = mean_reciprocal_rank(queries, candidates, targets=targets, metric=metric)  # type: ignore[arg-type]
        assert float(got) == pytest.approx(float((1 / ranks.double()).mean()))
    assert retrieve(queries, candidates, n_neighbors=3).indices.shape == (30, 3)


def test_a_collapsed_representation_does_not_rank_first() -> None:
    same = torch.ones(99, 4)
    assert float(mean_reciprocal_rank(same, same)) == pytest.approx(1 / 50)


def test_targets_are_asked_for_where_numbers_differ() -> None:
    x = torch.randn(10, 2)
    with pytest.raises(ValueError, match="targets must be given"):
        mean_reciprocal_rank(x, x[:5])
