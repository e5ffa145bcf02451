from __future__ import annotations

import pytest
import torch
from extras import reason

import lfm_torch as lfm

pytest.importorskip("torchmetrics", reason=reason("torchmetrics"))
from lfm_torch.integrations.torchmetrics import LFMSimilarity


def test_batches_add_up_to_the_similarity_of_all() -> None:
    x, y = torch.randn(90, 6), torch.randn(90, 3)
    metric = LFMSimilarity(["heat", "linear_cka"], n_basis=8)
    for part in torch.arange(90).split(40):
        metric.update(x[part], y[part])
    wanted = lfm.similarity(x, y, measures=["heat", "linear_cka"], n_basis=8)
    torch.testing.assert_close(metric.compute(), wanted)
    metric.reset()
    with pytest.raises(ValueError, match=r"at least one batch before compute\(\), got none"):
        metric.compute()


def test_one_measure_is_a_scalar_and_mixed_precisions_pair() -> None:
    metric = LFMSimilarity("overlap", n_basis=8)
    x = torch.randn(60, 4)
    value = metric(x.half(), 2 * x)
    assert value.shape == ()
    assert float(value) > 0.9


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="did you mean 'heat'"):
        LFMSimilarity("heet")
    metric = LFMSimilarity()
    with pytest.raises(ValueError, match=r"same b, got \[3, 2\] and \[4, 2\]"):
        metric.update(torch.randn(3, 2), torch.randn(4, 2))
    with pytest.raises(ValueError, match="y must be finite"):
        metric.update(torch.randn(3, 2), torch.full((3, 2), torch.nan))
