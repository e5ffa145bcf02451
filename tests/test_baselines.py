"""Linear CKA on planted answers and against an independent float64 evaluation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lfm_torch.baselines import linear_cka


@pytest.mark.parametrize(("n", "dx", "dy"), [(50, 4, 6), (20, 90, 70), (30, 3, 100)])
def test_linear_cka_as_defined(n: int, dx: int, dy: int) -> None:
    x, y = torch.randn(n, dx, dtype=torch.float64), torch.randn(n, dy, dtype=torch.float64)
    centre = np.eye(n) - 1 / n
    k, l = (centre @ (p.numpy() @ p.numpy().T) @ centre for p in (x, y))  # noqa: E741
    wanted = (k * l).sum() / np.sqrt((k * k).sum() * (l * l).sum())
    assert float(linear_cka(x, y)) == pytest.approx(wanted, abs=1e-10)


def test_linear_cka_of_orthogonal_and_equal_subspaces() -> None:
    q = torch.linalg.qr(torch.cat([torch.ones(40, 1), torch.randn(40, 8)], 1)).Q[:, 1:]  # centred, orthonormal
    assert float(linear_cka(q[:, :4], q[:, 4:])) == pytest.approx(0, abs=1e-6)
    assert float(linear_cka(q[:, :4], q[:, :4] @ torch.linalg.qr(torch.randn(4, 4)).Q)) == pytest.approx(1, abs=1e-6)
    assert float(linear_cka(q[:, :4], q[:, 2:6])) == pytest.approx(0.5, abs=1e-6)  # two of four dimensions shared


def test_linear_cka_at_extreme_scales_and_without_variance() -> None:
    x = torch.randn(30, 5, dtype=torch.float64)
    for scale in (1e-150, 1e150):
        assert float(linear_cka(x, scale * x + scale)) == pytest.approx(1)
    assert float(linear_cka(x, torch.ones(30, 2, dtype=torch.float64))) == 0


def test_linear_cka_is_differentiable_and_batched() -> None:
    x, y = (torch.randn(2, 12, 3, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(linear_cka, (x, y))
    torch.testing.assert_close(linear_cka(x, y)[1], linear_cka(x[1], y[1]))


def test_linear_cka_refuses_unpaired_rows() -> None:
    with pytest.raises(ValueError, match="y must have the rows of x"):
        linear_cka(torch.randn(5, 2), torch.randn(6, 2))
