"""The composed flow: what `similarity` promises on planted cases."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import oracles
import pytest
import torch

import lfm_torch as lfm
from lfm_torch.comparison.across_settings import Sensitivity
from lfm_torch.pipeline import representation_basis
from lfm_torch.spectral.sizes import default_n_basis


def test_against_plain_numpy() -> None:
    x, y = torch.randn(300, 6, dtype=torch.float64), torch.randn(300, 9, dtype=torch.float64)
    measures = ("lfm", "lfm_paper", "overlap", "heat", "heat_raw", "linear_cka")
    scores = lfm.similarity(x, y, n_neighbors=20, n_basis=15, measures=measures)
    spectra = [np.linalg.eigh(oracles.laplacian(oracles.gaussian_graph(p.numpy(), 20, "angular"))) for p in (x, y)]
    (a, phi_x), (b, phi_y) = ((evals[:15], evecs[:, :15]) for evals, evecs in spectra)
    c = phi_y.T @ phi_x
    gram = c.T @ c
    paper = (np.diag(gram) ** 2).sum() / (gram**2).sum()
    rest = [part.T @ part for part in (c[1:, 1:], c[1:, 1:].T)]
    lfm_score = np.mean([(np.diag(g) ** 2).sum() / (g**2).sum() for g in rest])
    raw = np.exp(-2 * b) @ c**2 @ np.exp(-2 * a) / np.sqrt(np.exp(-4 * a).sum() * np.exp(-4 * b).sum())
    u, v = (np.exp(-1.5 * evals[1:] / evals[14]) for evals in (a, b))
    own = ((w**2).sum() - w.sum() ** 2 / 299 for w in (u, v))
    heat = (v @ c[1:, 1:] ** 2 @ u - u.sum() * v.sum() / 299) / np.sqrt(np.prod(list(own)))
    xc, yc = x.numpy() - x.numpy().mean(0), y.numpy() - y.numpy().mean(0)
    cka = np.linalg.norm(yc.T @ xc) ** 2 / np.linalg.norm(xc.T @ xc) / np.linalg.norm(yc.T @ yc)
    wanted = {"lfm": lfm_score, "lfm_paper": paper, "overlap": (c**2).sum() / 15, "heat": heat, "heat_raw": raw}
    wanted["linear_cka"] = cka
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
    assert abs(float(other["heat"])) < 0.05
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
    batched = lfm.similarity(x, y, n_basis=8, measures=("lfm", "overlap", "heat", "linear_cka"), batched=True)
    for index in np.ndindex(2, 3):
        single = lfm.similarity(x[index], y[index], n_basis=8, measures=("lfm", "overlap", "heat", "linear_cka"))
        for name, value in single.items():
            torch.testing.assert_close(batched[name][index], value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: lfm.similarity(x, x[:30]), r"y must have the rows of x, shape \[40, 'd'\]"),
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


def test_the_number_of_eigenvectors_goes_by_the_samples() -> None:
    for n, n_basis in ((8, 2), (40, 10), (100, 25), (200, 50), (230, 50)):
        x, y = torch.randn(n, 4), torch.randn(n, 3)
        assert representation_basis(x).n_basis == lfm.spectral_basis(lfm.build_graph(x)).n_basis == n_basis
        assert lfm.similarity(x, y) == lfm.similarity(x, y, n_basis=n_basis)
        found = lfm.significance(x, y, n_permutations=3, n_splits=2)
        assert found == lfm.significance(x, y, n_basis=n_basis, n_permutations=3, n_splits=2)
    assert default_n_basis(2) == 1


@pytest.mark.parametrize(
    "function", [lfm.similarity, lfm.significance, functools.partial(lfm.sensitivity, n_basis=[8])]
)
def test_measures_are_one_name_or_several(function: Any) -> None:
    x, y = torch.randn(60, 4), torch.randn(60, 3)
    names = {"heat": ("heat",), "cka": ("linear_cka",), ("heat", "cka", "heat", "linear_cka"): ("heat", "linear_cka")}
    for given, wanted in names.items():
        found = function(x, y, measures=given)
        if isinstance(found, Sensitivity):
            found = found.values["n_basis"][8]
        assert tuple(found) == wanted
    with pytest.raises(TypeError, match="measures must be a name or a sequence of names, got NoneType"):
        function(x, y, measures=None)
    with pytest.raises(TypeError, match="a measure must be given by its name, got int"):
        function(x, y, measures=[1])
    for given, near in (("CKA", "linear_cka"), ("Heat", "heat"), ("knn", "mutual_knn")):
        with pytest.raises(ValueError, match=f"measures must be one of .*did you mean .*'{near}'"):
            function(x, y, measures=given)


def said(call: Any) -> list[str]:
    """What a call warns of."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always", lfm.LFMWarning)
        call()
    assert all(one.filename == __file__ for one in found)
    return [str(one.message) for one in found]


def test_rows_of_zeros_are_said_of_each_representation_once() -> None:
    x, y = torch.randn(120, 6), torch.randn(120, 6)
    x[:3] = y[5] = 0
    measures = ("heat", "mutual_knn")
    for call in (
        lambda: lfm.similarity(x, y, measures=measures),
        lambda: lfm.significance(x, y, measures=measures, n_permutations=5, n_splits=2),
        lambda: lfm.sensitivity(x, y, measures=("heat",)),
        lambda: lfm.distortion(x, y),
    ):
        first, second = said(call)[:2]
        assert first.startswith("x: 3 of 120 rows are zero")
        assert second.startswith("y: 1 of 120 rows are zero")
    assert len(said(lambda: lfm.similarity(x, y, measures=measures))) == 2
    assert said(lambda: lfm.similarity(x, y, metric="euclidean")) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_of_zeros_leave_the_scores_of_the_others(dtype: torch.dtype) -> None:
    """Against the same spaces without these samples."""
    z = torch.randn(400, 10, dtype=dtype)
    x, y = ((z @ torch.randn(10, 32, dtype=dtype)).relu() for _ in range(2))
    dead = torch.arange(400) % 50 == 7  # 2%
    without = lfm.similarity(x[~dead], y[~dead], n_basis=30)
    x[dead] = 0
    with pytest.warns(lfm.LFMWarning, match="x: 8 of 400 rows are zero"):
        found = lfm.similarity(x, y, n_basis=30)
    for name, value in without.items():
        assert float(found[name]) == pytest.approx(float(value), abs=0.03)


def test_an_offset_that_dwarfs_the_spread_is_said() -> None:
    x = torch.randn(300, 16)
    y = x + 5  # five standard deviations
    (message,) = said(lambda: lfm.similarity(x, y))
    assert message.startswith("y: the mean of the rows is more than 4 times their spread")
    assert "x - x.mean(0)" in message
    assert "metric='euclidean'" in message
    for scale in (1e-30, 1e30):
        assert len(said(functools.partial(lfm.similarity, x * scale, y * scale))) == 1
    assert said(lambda: lfm.similarity(x, y, metric="euclidean")) == []
    assert said(lambda: lfm.similarity(x, y - y.mean(0))) == []
    assert len(said(lambda: lfm.similarity(torch.stack([x, x]), torch.stack([x, y]), batched=True))) == 1
    assert float(lfm.similarity(x, y, metric="euclidean")["heat"]) == pytest.approx(1, abs=1e-4)


def test_features_have_a_mean_of_their_own(real_data: Path) -> None:
    """ReLU, pooled or not, and words: nothing to be said."""
    z = torch.randn(300, 16) @ torch.randn(16, 64)
    words = torch.from_numpy(np.load(real_data / "word_embeddings.npz")["word2vec"][:300])
    assert said(lambda: lfm.similarity(z.relu(), torch.sigmoid(z / 4))) == []
    assert said(lambda: lfm.similarity(words, words.float().relu().half())) == []


@pytest.mark.parametrize(
    "function", [lfm.similarity, lfm.significance, functools.partial(lfm.sensitivity, n_basis=[8])]
)
def test_samples_that_are_not_finite_are_left_out(function: Any) -> None:
    x, y = torch.randn(60, 4), torch.randn(60, 3)
    wanted = function(x[3:], y[3:])
    x[0, 1], y[[0, 1, 2]] = torch.nan, torch.inf
    with pytest.warns(
        lfm.LFMWarning, match=r"^3 of 60 samples .* not finite in x \(row 0\), y \(row 0, 1, 2\)$"
    ) as caught:
        assert function(x, y, nonfinite="drop") == wanted
    assert len(caught) == 1
    with pytest.raises(ValueError, match="x must be finite, got nan in row 0"):
        function(x, y)


def test_a_side_that_is_lost_takes_no_samples_with_it() -> None:
    x, y = torch.randn(60, 4), torch.randn(60, 3)
    x[:31] = torch.nan
    with pytest.raises(ValueError, match="x must be finite, got nan in row 0"):
        lfm.similarity(x, y, nonfinite="drop")
    with pytest.raises(ValueError, match="nonfinite must be 'raise' where batched=True"):
        lfm.similarity(x[None], y[None], nonfinite="drop", batched=True)
    with pytest.raises(ValueError, match=r"y must have the rows of x"):
        lfm.similarity(y, y[1:], nonfinite="drop")


@pytest.mark.parametrize("n", [1, 2])
def test_too_few_samples_for_a_space(n: int) -> None:
    x = torch.randn(n, 4)
    for call in (lfm.similarity, lfm.distortion, functools.partial(lfm.significance, n_splits=0)):
        with pytest.raises(
            ValueError, match=f"x must have at least 3 rows to be a space that can be compared, got {n}"
        ):
            call(x, x)
    with pytest.raises(ValueError, match=r"representations must have at least [23] rows"):
        lfm.compare({"a": x, "b": x})


def test_halves_are_spaces_too() -> None:
    x = torch.randn(6, 4)
    assert lfm.significance(x, x, n_permutations=2)["heat"].n_splits == 10
    with pytest.raises(
        ValueError, match=r"a half of the samples must have at least 3 rows .* got 2; n_splits=0 takes none"
    ):
        lfm.significance(x[:5], x[:5])
