"""Translators recover planted maps, also with wrong pairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from extras import need
from hypothesis import given
from hypothesis import strategies as st

from lfm_torch.alignment.translator import KINDS, Translator, fit_translator


def rotation(d: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(d, d, dtype=torch.float64)).Q


@pytest.mark.parametrize("kind", KINDS)
def test_planted_maps_are_recovered(kind: str) -> None:
    x, q = torch.randn(2, 60, 5, dtype=torch.float64), rotation(5)
    matrix = 1.7 * q if kind == "orthogonal" else torch.randn(5, 5, dtype=torch.float64)
    y = x @ matrix + (0.0 if kind == "linear" else 3.0)
    ridge = {"ridge": 1e-12} if kind == "ridge" else {}
    translator = fit_translator(x, y, kind=kind, **ridge)  # type: ignore[arg-type]
    torch.testing.assert_close(translator(x), y)
    torch.testing.assert_close(translator.matrix[0], matrix)
    torch.testing.assert_close(translator.inverse()(y), x)


def test_orthogonal_fit_is_procrustes() -> None:
    orthogonal_procrustes = need("scipy.linalg").orthogonal_procrustes
    x, y = torch.randn(40, 6, dtype=torch.float64), torch.randn(40, 6, dtype=torch.float64)
    fitted = fit_translator(x, y)
    a, b = ((z - z.mean(0)).numpy() for z in (x, y))
    q, total = orthogonal_procrustes(a, b)
    np.testing.assert_allclose(fitted.matrix.numpy(), q * total / (a**2).sum(), atol=1e-12)


def test_spaces_of_unequal_dimension() -> None:
    x = torch.randn(50, 3, dtype=torch.float64)
    y = x @ rotation(8)[:3]
    translator = fit_translator(x, y)
    torch.testing.assert_close(translator(x), y)
    torch.testing.assert_close(fit_translator(y, x)(y), x)
    with pytest.raises(ValueError, match="must be square to be inverted, got 3 -> 8"):
        translator.inverse()


def test_wrong_pairs_lose_their_say() -> None:
    x, q = torch.randn(200, 10, dtype=torch.float64), rotation(10)
    y = x @ q + 0.01 * torch.randn(200, 10, dtype=torch.float64)
    pairs = torch.arange(200).repeat(2, 1).T.clone()
    pairs[:60, 1] = torch.randperm(60)
    plain, robust = (fit_translator(x, y, pairs=pairs, robust=robust).matrix for robust in (False, True))
    assert float((plain - q).norm()) > 10 * float((robust - q).norm())
    assert float((robust - q).norm()) < 0.02
    weights = torch.cat([torch.zeros(60), torch.ones(140)])
    assert float((fit_translator(x, y, pairs=pairs, weights=weights).matrix - q).norm()) < 0.02


@given(st.integers(2, 30), st.integers(1, 8), st.integers(1, 8), st.integers(0, 99))
def test_any_shape_gives_a_finite_isometry(n: int, d_x: int, d_y: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for d in (d_x, d_y))
    matrix = fit_translator(x, y).matrix
    values = torch.linalg.svdvals(matrix)
    assert bool(matrix.isfinite().all())
    torch.testing.assert_close(values, values[:1].expand_as(values))


def test_translators_are_records(tmp_path: Path) -> None:
    translator = fit_translator(torch.randn(20, 3), torch.randn(20, 4))
    translator.save(tmp_path / "t.safetensors")
    loaded = Translator.load(tmp_path / "t.safetensors")
    x = torch.randn(5, 3)
    assert torch.equal(loaded(x), translator(x))
    assert repr(loaded).startswith("Translator(orthogonal, 3 -> 4, from 20 pairs")
    assert translator.to(torch.float64).matrix.dtype == torch.float64


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: fit_translator(x, x[:5]), ValueError, "y must have the rows of x, 10, or pairs"),
        (
            lambda x: fit_translator(x, x, pairs=torch.tensor([[0, 10]])),
            ValueError,
            r"pairs\[:, 1\] must lie in",
        ),
        (
            lambda x: fit_translator(x, x, pairs=torch.rand(3, 2)),
            TypeError,
            "pairs must be integers, got torch.float32",
        ),
        (lambda x: fit_translator(x, x, kind="rigid"), ValueError, "kind must be one of"),
        (lambda x: fit_translator(x, x, weights=-torch.ones(10)), ValueError, "weights must be 10 non-negative"),
        (lambda x: fit_translator(x, x)(torch.ones(3, 3)), ValueError, "x must have 2 features"),
    ],
)
def test_wrong_input_is_refused(call: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(10, 2))  # type: ignore[operator]
