"""The composed flow: what `similarity` promises on planted cases."""

from __future__ import annotations

import numpy as np
import oracles
import pytest
import torch

import lfm_torch as lfm


def test_against_plain_numpy() -> None:
    x, y = torch.randn(300, 6, dtype=torch.float64), torch.randn(300, 9, dtype=torch.float64)
    measures = ("lfm", "lfm_paper", "overlap", "heat", "linear_cka")
    scores = lfm.similarity(x, y, n_neighbors=20, n_basis=15, measures=measures)
    spectra = [np.linalg.eigh(oracles.laplacian(oracles.gaussian_graph(p.numpy(), 20, "angular"))) for p in (x, y)]
    (a, phi_x), (b, phi_y) = ((evals[:15], evecs[:, :15]) for evals, evecs in spectra)
    c = phi_y.T @ phi_x
    gram = c.T @ c
    paper = (np.diag(gram) ** 2).sum() / (gram**2).sum()
    rest = [part.T @ part for part in (c[1:, 1:], c[1:, 1:].T)]
    lfm_score = np.mean([(np.diag(g) ** 2).sum() / (g**2).sum() for g in rest])
    heat = np.exp(-2 * b) @ c**2 @ np.exp(-2 * a) / np.sqrt(np.exp(-4 * a).sum() * np.exp(-4 * b).sum())
    xc, yc = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    cka = np.linalg.norm(yc.T @ xc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    wanted = {"lfm": lfm_score, "lfm_paper": paper, "overlap": (c**2).sum() / 15, "heat": heat, "linear_cka": cka}
    assert list(scores) == list(wanted)
    for name, value in wanted.items():
        assert float(scores[name]) == pytest.approx(value, abs=1e-7), name


def test_rotated_and_scaled_copy_is_the_same_space_and_noise_is_not() -> None:
    x = torch.randn(600, 10)
    rotation = torch.linalg.qr(torch.randn(10, 10)).Q
    same = lfm.similarity(x, 3 * x @ rotation, n_basis=20)
    other = lfm.similarity(x, torch.randn(600, 10), n_basis=20, measures=("lfm", "lfm_paper", "overlap", "heat"))
    assert all(float(value) > 0.999 for value in same.values())
    assert float(other["overlap"]) < 0.15  # chance is n_basis / n = 0.033, and the first eigenvector is common
    assert float(other["heat"]) < 0.5
    assert float(other["lfm"]) < 0.7
    # as its docstring warns: the common first eigenvector is all there is, and it is on the diagonal
    assert float(other["lfm_paper"]) > 0.9


def test_similarity_falls_as_noise_grows() -> None:
    x = torch.randn(500, 8)
    noise = torch.randn(500, 8)
    scores = [lfm.similarity(x, x + level * noise, n_basis=20) for level in (0.0, 0.1, 0.4, 2.0)]
    for name in scores[0]:
        values = [float(s[name]) for s in scores]
        assert values == sorted(values, reverse=True), (name, values)


def test_batched_equals_one_by_one() -> None:
    x, y = torch.randn(2, 3, 120, 5, dtype=torch.float64), torch.randn(2, 3, 120, 4, dtype=torch.float64)
    batched = lfm.similarity(x, y, n_basis=8, measures=("lfm", "overlap", "heat", "linear_cka"))
    for index in np.ndindex(2, 3):
        single = lfm.similarity(x[index], y[index], n_basis=8, measures=("lfm", "overlap", "heat", "linear_cka"))
        for name, value in single.items():
            torch.testing.assert_close(batched[name][index], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: lfm.similarity(x, x[:30]), r"y must have the rows of x, shape \[40, 'd'\]"),
        (lambda x: lfm.similarity(x, x, measures="heat"), r"measures must be a sequence.*write \['heat'\]"),
        (lambda x: lfm.similarity(x, x, measures=()), "at least one measure, got none"),
        (lambda x: lfm.similarity(x, torch.ones(40, 3), n_basis=5), "rows that differ"),
        (lambda x: lfm.similarity(x, x, measures=("lfn",)), "measures must be one of .* did you mean 'lfm'"),
        (lambda x: lfm.similarity(x, x, n_basis=40), "n_basis must be between 1 and 39"),
        (lambda x: lfm.similarity(x, x, n_neighbors=40), "n_neighbors must be between 1 and 39"),
        (lambda x: lfm.similarity(x, x * torch.nan), "y must be finite, got nan in row 0"),
    ],
)
def test_bad_input(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.randn(40, 3))  # type: ignore[operator]


def test_mixed_dtypes_are_refused() -> None:
    x = torch.randn(40, 3)
    with pytest.raises(TypeError, match=r"y must have the dtype of x, torch.float32, got torch.float64"):
        lfm.similarity(x, x.double(), n_basis=5)
