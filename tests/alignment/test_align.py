"""Alignment recovers planted correspondences with few anchors or none, and says so where there is nothing to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.alignment import gromov
from lfm_torch.alignment.gromov import gromov_wasserstein, kernel_signatures


def planted(n: int, d: int, *, noise: float = 0.0, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A cloud, its rotated, shifted and permuted copy, and the permutation: row j of the copy is row order[j]."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator)
    rotation = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    order = torch.randperm(n, generator=generator)
    copy = x @ rotation + noise * torch.randn(n, d, generator=generator) + 2
    return x, copy[order], order


def anchors_of(order: Tensor, count: int) -> Tensor:
    return torch.stack([order[:count], torch.arange(count)], 1)


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize("d", [2, 3, 8, 40])
def test_a_rotated_permuted_copy_is_recovered_exactly(d: int, count: int) -> None:
    for seed in range(2):
        x, y, order = planted(300, d, seed=seed)
        alignment = lfm.align(x, y, anchors=anchors_of(order, count) if count else None)
        assert torch.equal(alignment.idx_yx, order)
        assert torch.equal(alignment.idx_xy, order.argsort())
        torch.testing.assert_close(alignment.translator(x)[order], y, atol=1e-4, rtol=0)
        assert alignment.confidence > 0.98


@pytest.mark.parametrize("count", [0, 3])
@pytest.mark.parametrize(("d", "noise"), [(3, 0.02), (5, 0.05), (20, 0.2)])
def test_a_noisy_copy_is_recovered(d: int, noise: float, count: int) -> None:
    x, y, order = planted(400, d, noise=noise, seed=3)
    alignment = lfm.align(x, y, anchors=anchors_of(order, count) if count else None)
    assert float((alignment.idx_yx == order).double().mean()) >= 0.95


def test_spaces_of_other_sizes_and_dimensions() -> None:
    x, y, order = planted(400, 10, noise=0.05)
    wider = torch.cat([y[:300], 0.01 * torch.randn(300, 4)], 1)
    alignment = lfm.align(x, wider)
    assert float((alignment.idx_yx == order[:300]).double().mean()) > 0.99
    assert alignment.idx_xy.shape == (400,)
    assert alignment.translator(x).shape == (400, 14)
    back = lfm.align(wider, x)
    assert float((back.idx_xy == order[:300]).double().mean()) > 0.99


@pytest.mark.parametrize("d", [2, 10, 100])
def test_unrelated_spaces_are_no_alignment(d: int) -> None:
    for seed in range(3):
        x, y = planted(300, d, seed=seed)[0], planted(300, d, seed=seed + 10)[1]
        with pytest.warns(lfm.LFMWarning, match="no alignment found, no better than chance") as warned:
            alignment = lfm.align(x, y)
        assert warned[0].filename == __file__  # the line of the user, not one of ours
        assert not alignment.found
        assert "no alignment found" in repr(alignment)
        for name in ("fmap", "translator", "pairs", "idx_yx", "idx_xy"):
            with pytest.raises(ValueError, match="no alignment found"):
                getattr(alignment, name)
        assert alignment.untrusted.translator.matrix.shape == (d, d)


@pytest.mark.parametrize("count", [5, 40])
def test_wrong_anchors_between_unrelated_spaces_are_not_believed(count: int) -> None:
    x, y = planted(300, 30)[0], planted(300, 30, seed=9)[1]
    with pytest.warns(lfm.LFMWarning, match="no alignment found"):
        alignment = lfm.align(x, y, anchors=torch.randint(0, 300, (count, 2)))
    assert not alignment.found


def test_held_out_anchors_are_evidence_where_rows_are_too_noisy_to_pair() -> None:
    x, y, order = planted(400, 3, noise=0.6)
    alignment = lfm.align(x, y, anchors=anchors_of(order, 100))
    assert alignment.anchor_p is not None
    assert alignment.anchor_p < 1e-4
    assert alignment.found
    rotation = lfm.fit_translator(x, y, pairs=torch.stack([order, torch.arange(400)], 1)).matrix
    assert float((alignment.translator.matrix - rotation).norm()) < 0.5


def test_few_anchors_are_evidence_in_turn() -> None:
    x, y, order = planted(400, 3, noise=0.4)
    alignment = lfm.align(x, y, anchors=anchors_of(order, 12), method="descriptors")
    assert alignment.confidence < alignment.chance + 0.1
    assert alignment.anchor_p is not None
    assert alignment.anchor_p < 1e-4
    assert alignment.found


def test_spaces_too_large_to_couple_keep_to_their_anchors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gromov, "LARGEST_PLAN", 10_000)
    x, y, order = planted(200, 8)
    assert torch.equal(lfm.align(x, y, anchors=anchors_of(order, 10)).idx_yx, order)
    with pytest.warns(lfm.LFMWarning, match="no alignment found"):
        alignment = lfm.align(x, planted(200, 8, seed=7)[1], anchors=anchors_of(order, 10))
    assert alignment.method == "descriptors"
    with pytest.raises(ValueError, match="to be matched by distances alone, got 200 x 200; give anchors"):
        lfm.align(x, y)


def test_labels_and_descriptors_supervise() -> None:
    x, y, order = planted(300, 6)
    labels = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    by_label = lfm.align(x, y, labels=(labels, labels[order]))
    assert torch.equal(by_label.idx_yx, order)
    f = torch.stack([x[:, 0], x[:, 1] * x[:, 2], x[:, 3].abs(), x[:, 4]], 1)
    by_function = lfm.align(x, y, descriptors=(f, f[order]), method="descriptors")
    assert by_function.method == "descriptors"
    assert float((by_function.idx_yx == order).double().mean()) > 0.99


def test_the_answer_does_not_depend_on_the_order_of_rows_or_on_the_run() -> None:
    x, y, _ = planted(200, 6, noise=0.1)
    first, again = lfm.align(x, y), lfm.align(x, y)
    assert torch.equal(first.idx_yx, again.idx_yx)
    shuffle = torch.randperm(200)
    other = lfm.align(x, y[shuffle])
    assert float((other.idx_yx == first.idx_yx[shuffle]).double().mean()) > 0.98


@pytest.mark.parametrize("metric", ["angular", "cosine", "euclidean"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_metrics_and_dtypes(metric: Any, dtype: torch.dtype) -> None:
    x, y, order = planted(150, 5)
    alignment = lfm.align(x.to(dtype), y.to(dtype), metric=metric, n_basis=15, n_neighbors=20)
    assert float((alignment.idx_yx == order).double().mean()) > 0.9
    assert alignment.fmap.C.shape == (15, 15)


def test_coupling_is_a_coupling_and_signatures_ignore_order() -> None:
    x, y, order = planted(120, 4)
    x, y = ((z - z.mean(0)).double() for z in (x, y))
    coupling = gromov_wasserstein(x, y)
    rows = torch.full((120,), 1 / 120, dtype=torch.float64)
    torch.testing.assert_close(coupling.plan.sum(1), rows)
    torch.testing.assert_close(coupling.plan.sum(0), rows, atol=1e-4, rtol=0)
    assert float((coupling.plan.argmax(0) == order).double().mean()) > 0.9
    assert coupling.energy > 0.9
    torch.testing.assert_close(kernel_signatures(x)[order], kernel_signatures(y), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"anchors": torch.tensor([[0, 300]])}, ValueError, r"anchors\[:, 1\] must lie in \[0, 50\)"),
        ({"anchors": torch.rand(3, 2)}, TypeError, "anchors must be integers, got torch.float32"),
        ({"method": "descriptors"}, ValueError, "method must be 'auto' or 'coupling' where no anchors"),
        ({"metric": "inner_product"}, ValueError, "metric must be one of 'angular', 'cosine', 'euclidean'"),
        ({"labels": (torch.zeros(50).long(), torch.ones(50).long())}, ValueError, "labels must have a class that both"),
        (
            {"labels": (torch.zeros(9).long(), torch.ones(50).long())},
            ValueError,
            r"labels\[0\] must be 50 numbers from 0",
        ),
        ({"y": torch.randn(5, 3)}, ValueError, r"y must have shape \[n, d\] with at least 10 rows"),
        ({"y": torch.ones(50, 3)}, ValueError, "y must have rows that differ"),
        ({"y": torch.full((50, 3), torch.nan)}, ValueError, "y must be finite"),
        ({"y": torch.randn(50, 3).double()}, TypeError, "y must have the dtype of x"),
    ],
)
def test_wrong_input_is_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    arguments: dict[str, Any] = {"x": torch.randn(50, 3), "y": torch.randn(50, 3), **options}
    with pytest.raises(error, match=message):
        lfm.align(arguments.pop("x"), arguments.pop("y"), **arguments)
