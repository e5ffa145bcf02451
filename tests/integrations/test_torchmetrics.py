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


def test_two_batches_before_a_training_are_enough() -> None:
    x, y = torch.randn(90, 6), torch.randn(90, 3)
    metric = LFMSimilarity("heat", n_basis=50, n_neighbors=45)

    def value(rows: int) -> torch.Tensor:
        metric.reset()
        metric.update(x[:rows], y[:rows])
        return metric.compute()

    with pytest.warns(lfm.LFMWarning) as caught:
        values = [value(rows) for rows in (40, 30, 90)]
    for rows, found in zip((40, 30, 90), values, strict=True):
        wanted = lfm.similarity(x[:rows], y[:rows], n_basis=min(50, rows - 1), n_neighbors=min(45, rows - 1))
        torch.testing.assert_close(found, wanted["heat"])
    assert [str(warning.message).partition(" does")[0] for warning in caught] == [
        "LFMSimilarity: n_neighbors=45",
        "LFMSimilarity: n_basis=50",
    ]
    metric.reset()
    metric.update(x[:2], y[:2])
    with pytest.raises(ValueError, match=r"LFMSimilarity: a batch must have at least 3 rows.*got 2"):
        metric.compute()
    with pytest.raises(ValueError, match="n_basis must be a positive int"):
        LFMSimilarity(n_basis=0)
    points = LFMSimilarity("cka", n_basis=50)
    points.update(x[:2], y[:2])
    torch.testing.assert_close(points.compute(), lfm.baselines.linear_cka(x[:2], y[:2]))


def test_samples_that_are_not_finite_are_left_out() -> None:
    x, y = torch.randn(60, 6), torch.randn(60, 3)
    wanted = lfm.similarity(x[1:59], y[1:59], measures="heat")["heat"]
    x[0], y[59, 2] = torch.nan, torch.inf
    metric = LFMSimilarity("heat", nonfinite="drop")
    for rows in (slice(0, 20), slice(20, 60)):
        metric.update(x[rows], y[rows])
    with pytest.warns(lfm.LFMWarning, match=r"2 of 60 samples are left out everywhere, .* x \(row 0\), y \(row 59\)"):
        torch.testing.assert_close(metric.compute(), wanted)


def test_an_array_may_be_filled_with_the_next_batch() -> None:
    x, y = torch.randn(60, 6), torch.randn(60, 3)
    metric, batch = LFMSimilarity("heat"), x[:20].numpy().copy()
    for start in range(0, 60, 20):
        batch[:] = x[start : start + 20]
        metric.update(batch, y[start : start + 20])
    torch.testing.assert_close(metric.compute(), lfm.similarity(x, y)["heat"])
