from __future__ import annotations

import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch.losses import DirichletAlignmentLoss, LFMAlignmentLoss

Loss = LFMAlignmentLoss | DirichletAlignmentLoss
LOSSES: list[Callable[..., Loss]] = [LFMAlignmentLoss, DirichletAlignmentLoss]


def spaces(n: int = 60, dtype: torch.dtype = torch.float32, batch: tuple[int, ...] = ()) -> tuple[Tensor, Tensor]:
    """Two views of clustered points: what a student and a teacher may give for the same inputs."""
    generator = torch.Generator().manual_seed(3)
    labels = torch.arange(n) % 4
    z = torch.randn(*batch, n, 6, generator=generator) + 2 * torch.eye(6)[labels]
    student = z @ torch.randn(6, 5, generator=generator) + 2 * torch.randn(*batch, n, 5, generator=generator)
    return student.to(dtype), z.tanh().to(dtype)


@pytest.mark.parametrize("metric", ["angular", "euclidean"])
@pytest.mark.parametrize("make", LOSSES)
def test_gradients_in_double_precision(make: Callable[..., Loss], metric: str) -> None:
    x, target = spaces(24, torch.float64)
    loss = make(n_basis=5, n_neighbors=7, metric=metric)
    assert torch.autograd.gradcheck(lambda points: loss(points, target), x.requires_grad_(), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("reading", ["overlap", "lfm"])
def test_gradients_of_the_other_readings(reading: str) -> None:
    x, target = spaces(24, torch.float64)
    loss = LFMAlignmentLoss(n_basis=5, n_neighbors=7, reading=reading)
    assert torch.autograd.gradcheck(lambda points: loss(points, target), x.requires_grad_(), atol=1e-6, rtol=1e-4)


def test_gradients_in_the_target_where_it_asks_for_them() -> None:
    x, target = spaces(24, torch.float64)
    loss = LFMAlignmentLoss(n_basis=5, n_neighbors=7)
    assert torch.autograd.gradcheck(lambda points: loss(x, points), target.requires_grad_(), atol=1e-6, rtol=1e-4)
    DirichletAlignmentLoss(n_basis=5)(x.requires_grad_(), target).backward()
    assert target.grad is None


def test_unpaired_rows_align_by_descriptors() -> None:
    x, target = spaces(24, torch.float64)
    # classes are known on both sides, rows are not
    labels = torch.eye(4, dtype=torch.float64)[torch.arange(24) % 4]
    order = torch.randperm(24)
    loss = LFMAlignmentLoss(n_basis=5, n_neighbors=7, reading="lfm")
    shuffled = loss(x, target[order], (labels, labels[order]))
    torch.testing.assert_close(shuffled, loss(x, target, (labels, labels)))
    assert torch.autograd.gradcheck(
        lambda points: loss(points, target, (labels, labels)), x.requires_grad_(), atol=1e-6, rtol=1e-4
    )
    loss(x, target[1:], (labels, labels[1:]))
    with pytest.raises(ValueError, match=r"reading with descriptors must be one of .* got 'heat'"):
        LFMAlignmentLoss(n_basis=5)(x, target, (labels, labels))


def test_values_are_the_definitions() -> None:
    x, target = spaces()
    found = lfm.similarity(x, target, n_basis=8, measures=("lfm", "overlap", "heat", "orthogonality_error"))
    for reading, value in found.items():
        loss = LFMAlignmentLoss(n_basis=8, reading=reading)(x, target)
        wanted = value if reading == "orthogonality_error" else 1 - value
        torch.testing.assert_close(loss, wanted, atol=1e-5, rtol=1e-4)
    L = lfm.build_graph(x.double()).laplacian().to_dense()
    evecs = torch.linalg.eigh(lfm.build_graph(target.double()).laplacian().to_dense()).eigenvectors[:, :8]
    wanted = (evecs.mT @ L @ evecs).trace() / 8
    torch.testing.assert_close(DirichletAlignmentLoss(n_basis=8)(x, target).double(), wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", LOSSES)
def test_a_batch_is_the_mean_of_its_spaces(make: Callable[..., Loss]) -> None:
    x, target = spaces(40, batch=(3,))
    loss = make(n_basis=6, batched=True)
    alone = torch.stack([loss(x[i], target[i]) for i in range(3)]).mean()
    torch.testing.assert_close(loss(x, target), alone, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("make", LOSSES)
def test_a_basis_stands_for_the_target(make: Callable[..., Loss]) -> None:
    x, target = spaces()
    loss = make(n_basis=8)
    torch.testing.assert_close(loss(x, loss.target_basis(target)), loss(x, target), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("make", LOSSES)
def test_half_types_and_autocast_are_computed_in_single(make: Callable[..., Loss]) -> None:
    x, target = spaces()
    loss = make(n_basis=8)
    half, teacher = x.bfloat16().requires_grad_(), target.half()
    with torch.autocast("cpu", torch.bfloat16):
        value = loss(half, teacher)
    torch.testing.assert_close(value, loss(half.float(), teacher.float()))
    value.backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("make", LOSSES)
def test_descent_aligns_the_student(make: Callable[..., Loss]) -> None:
    x, target = spaces(120)
    before = lfm.similarity(x, target, n_basis=10)["heat"]
    network = nn.Sequential(nn.Linear(5, 64), nn.Tanh(), nn.Linear(64, 8))
    loss = make(n_basis=10)
    basis, optimizer = loss.target_basis(target), torch.optim.Adam(network.parameters(), 1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        loss(network(x), basis).backward()
        optimizer.step()
    after = lfm.similarity(network(x).detach(), target, n_basis=10)["heat"]
    assert float(after) > float(before) + 0.1


@pytest.mark.parametrize("make", LOSSES)
def test_what_they_refuse(make: Callable[..., Loss]) -> None:
    x, target = spaces()
    loss = make(n_basis=8)
    with pytest.raises(ValueError, match=r"target must have the rows of x, \[60\].*got \[59\]"):
        loss(x, target[1:])
    with pytest.raises(TypeError, match=r"target must be a torch.Tensor, a numpy.ndarray or a Basis, got list"):
        loss(x, target.tolist())
    with pytest.raises(TypeError, match="x must be float16"):
        loss(x.long(), target)
    with pytest.raises(ValueError, match=r"Loss: a batch must have at least 3 rows.*got 2; .*drop_last=True"):
        loss(x[:2], target[:2])
    for size in (0, True, 2.5):
        with pytest.raises(ValueError, match=f"n_basis must be a positive int, or None .*got {size}"):
            make(n_basis=size)
        with pytest.raises(ValueError, match="n_neighbors must be a positive int"):
            make(n_neighbors=size)
    with pytest.raises(ValueError, match="metric must be one of"):
        make(metric="manhattan")
    with pytest.raises(ValueError, match="collapsed"):
        loss(torch.zeros_like(x), target)
    with pytest.raises(ValueError, match="reading must be one of"):
        LFMAlignmentLoss(reading="cka")


@pytest.mark.parametrize("make", LOSSES)
def test_dead_samples_end_no_training(make: Callable[..., Loss]) -> None:
    """They come and go from step to step: said once, and without gradient."""
    loss = make(n_basis=8)
    target = torch.randn(80, 12)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(1, 4):
            x = torch.randn(80, 6)
            x[: 2 * step] = 0
            x.requires_grad_()
            value = loss(x, target)
            value.backward()
            assert x.grad is not None
            assert bool(value.isfinite())
            assert bool(x.grad.isfinite().all())
            assert float(x.grad[: 2 * step].abs().max()) == 0
            assert float(x.grad[2 * step :].abs().max()) > 0
    (one,) = said
    assert one.category is lfm.LFMWarning
    assert str(one.message).startswith("2 of 80 rows are zero")
    assert one.filename == __file__


def test_settings_show() -> None:
    assert repr(LFMAlignmentLoss(n_basis=8)) == (
        "LFMAlignmentLoss(n_basis=8, n_neighbors=None, metric='angular', weights='gaussian', batched=False, "
        "reading='heat')"
    )


@pytest.mark.parametrize("make", LOSSES)
def test_the_last_batch_of_an_epoch_is_smaller(make: Callable[..., Loss]) -> None:
    x, target = spaces()
    loss = make(n_basis=20, n_neighbors=12)
    with pytest.warns(lfm.LFMWarning) as caught:
        values = [loss(x[rows], target[rows]) for rows in (slice(0, 40), slice(40, 60), slice(40, 50), slice(50, 55))]
    told = [str(warning.message) for warning in caught]
    assert len(told) == 2, told
    assert "n_basis=20 does not fit 20 rows and is cut to what does, here 19" in told[0]
    assert "n_neighbors=12 does not fit 10 rows" in told[1]
    assert caught[0].filename == __file__
    rest = make(n_basis=9, n_neighbors=9)(x[40:50], target[40:50])
    torch.testing.assert_close(values[2], rest)


@pytest.mark.parametrize("make", LOSSES)
def test_sizes_go_by_the_rows_unless_given(make: Callable[..., Loss]) -> None:
    x, target = torch.randn(136, 4), torch.randn(136, 3)
    for rows, n_basis in ((136, 32), (40, 10), (5, 2), (3, 2)):
        assert make().target_basis(target[:rows]).n_basis == n_basis
        torch.testing.assert_close(make()(x[:rows], target[:rows]), make(n_basis=n_basis)(x[:rows], target[:rows]))
