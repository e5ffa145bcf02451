"""Classical measures on planted answers, against independent float64 evaluations, and on hostile input."""

from __future__ import annotations

import math

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from extras import need

from lfm_torch import LFMWarning, baselines

Array = np.ndarray


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(n: int, r: int, seed: int = 0) -> torch.Tensor:
    """Centred orthonormal columns."""
    columns = torch.cat([torch.ones(n, 1, dtype=torch.float64), randn(n, r, seed=seed)], 1)
    return torch.linalg.qr(columns).Q[:, 1:]


def planted(correlations: list[float], dx: int, dy: int, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal bases with these canonical correlations, and 0 for the rest."""
    q = orthonormal(n, dx + dy)
    x, rest = q[:, :dx], q[:, dx:]
    rho = torch.tensor(correlations, dtype=torch.float64)
    y = rest.clone()
    k = len(rho)
    y[:, :k] = rho * x[:, :k] + (1 - rho**2).sqrt() * rest[:, :k]
    return x, y


def mixed(x: torch.Tensor, seed: int) -> torch.Tensor:
    """The same space in other coordinates, badly scaled, off centre."""
    return x @ (randn(x.shape[1], x.shape[1], seed=seed) * torch.logspace(-2, 2, x.shape[1], dtype=x.dtype)) + 3


RHO = [0.95, 0.8, 0.35]


def test_cca_of_planted_correlations() -> None:
    x, y = planted(RHO, 3, 5)
    wanted = sum(RHO) / 3
    assert float(baselines.mean_cca(x, y)) == pytest.approx(wanted, abs=1e-9)
    assert float(baselines.mean_cca(mixed(x, 1), mixed(y, 2))) == pytest.approx(wanted, abs=1e-6)
    assert float(baselines.mean_cca(mixed(x, 1), mixed(x, 2))) == pytest.approx(1, abs=1e-6)
    # a copied column changes neither the rank nor the answer
    assert float(baselines.mean_cca(torch.cat([x, x[:, :1]], 1), y)) == pytest.approx(wanted, abs=1e-6)


def test_cca_against_scipy() -> None:
    linalg = need("scipy.linalg")
    x, y = randn(90, 4), randn(90, 6, seed=1) + randn(90, 4).repeat(1, 2)[:, :6]
    angles = linalg.subspace_angles(*((p - p.mean(0)).numpy() for p in (x, y)))
    assert float(baselines.mean_cca(x, y)) == pytest.approx(np.cos(angles).mean(), abs=1e-9)


def test_svcca_keeps_the_directions_that_hold_the_variance() -> None:
    x, y = planted(RHO, 3, 5)
    # the other directions hold less than 1% together: SVCCA sees the planted ones alone
    noise = 1e-3 * orthonormal(200, 20, seed=7)
    wide = torch.cat([2 * x, noise], 1) @ torch.linalg.qr(randn(23, 23, seed=3)).Q
    for target, scale in ((y[:, :3], 1.0), (y[:, :3], 50.0)):
        assert float(baselines.svcca(wide, scale * target + 1)) == pytest.approx(sum(RHO) / 3, abs=1e-6)
    assert float(baselines.svcca(wide, wide)) == pytest.approx(1, abs=1e-6)
    # more features than samples: mean CCA is 1 whatever they are, SVCCA is not
    padded = torch.cat([x, 1e-3 * orthonormal(200, 150, seed=8), 1e-4 * randn(200, 400, seed=9)], 1)
    assert float(baselines.svcca(padded, y[:, :3], variance=0.9)) == pytest.approx(sum(RHO) / 3, abs=2e-3)
    assert float(baselines.mean_cca(padded, y)) == pytest.approx(1, abs=1e-6)


def test_pwcca_of_planted_correlations() -> None:
    x, y = planted(RHO, 3, 5)
    scales = torch.tensor([1.0, 2.0, 7.0], dtype=torch.float64)
    # the variates are the axes, so the weights are the scales
    wanted = float((scales * torch.tensor(RHO, dtype=torch.float64)).sum() / scales.sum())
    assert float(baselines.pwcca(x * scales, mixed(y, 2))) == pytest.approx(wanted, abs=1e-6)
    assert float(baselines.pwcca(mixed(x, 1), mixed(x, 2))) == pytest.approx(1, abs=1e-6)
    assert float(baselines.pwcca(x, orthonormal(200, 8)[:, 3:])) == pytest.approx(0, abs=1e-6)
    # y of smaller rank: directions of x that no variate reaches do not count
    low = torch.cat([y[:, :1], y[:, :1]], 1)
    assert float(baselines.pwcca(x * scales, low)) == pytest.approx(RHO[0], abs=1e-6)


def centred(k: Array) -> Array:
    h = np.eye(len(k)) - 1 / len(k)
    return h @ k @ h


def cosine(k: Array, l: Array) -> float:  # noqa: E741
    return float((k * l).sum() / math.sqrt((k * k).sum() * (l * l).sum()))


SHAPES = [(50, 4, 6), (20, 90, 70), (30, 3, 100), (64, 8, 8), (40, 10, 40)]


@pytest.mark.parametrize(("n", "dx", "dy"), SHAPES)
def test_cka_against_an_independent_evaluation(n: int, dx: int, dy: int) -> None:
    distance = need("scipy.spatial.distance")
    x, y = randn(n, dx) + 2, randn(n, dy, seed=1) * 3
    grams = [p.numpy() @ p.numpy().T for p in (x, y)]
    assert float(baselines.linear_cka(x, y)) == pytest.approx(cosine(*map(centred, grams)), abs=1e-10)
    kernels = []
    for p in (x, y):
        d = distance.pdist(p.numpy())
        median = np.sort(d)[(len(d) - 1) // 2]
        kernels.append(centred(np.exp(-(distance.squareform(d) ** 2) / (2 * (0.7 * median) ** 2))))
    assert float(baselines.rbf_cka(x, y, bandwidth=0.7)) == pytest.approx(cosine(*kernels), abs=1e-8)
    assert float(baselines.debiased_cka(x, y)) == pytest.approx(unbiased(*grams), abs=1e-8)


def hsic(k: Array, l: Array) -> float:  # noqa: E741
    """Song et al. 2012, equation (5), as it is written there."""
    n, one = len(k), np.ones(len(k))
    k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))  # noqa: E741
    sums = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2)) - 2 / (n - 2) * (one @ k @ l @ one)
    return float((np.trace(k @ l) + sums) / (n * (n - 3)))


def unbiased(k: Array, l: Array) -> float:  # noqa: E741
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


def test_minibatch_cka_streams_the_same_answer() -> None:
    x, y = randn(67, 5), randn(67, 5) + randn(67, 5, seed=1)
    stream = baselines.MinibatchCKA()
    with pytest.raises(ValueError, match="after update, got no minibatch"):
        stream.compute()
    sums = np.zeros(3)
    for rows in (slice(0, 16), slice(16, 32), slice(32, 48), slice(48, 67)):  # the rest of 3 joins the last
        stream.update(x[rows], y[rows])
        k, l = ((p[rows] @ p[rows].T).numpy() for p in (x, y))  # noqa: E741
        sums += [hsic(k, l), hsic(k, k), hsic(l, l)]
    wanted = sums[0] / math.sqrt(sums[1] * sums[2])
    assert float(stream.compute()) == pytest.approx(wanted, abs=1e-8)
    assert float(baselines.minibatch_cka(x, y, batch_size=16)) == pytest.approx(wanted, abs=1e-8)
    assert float(baselines.minibatch_cka(x, y)) == pytest.approx(float(baselines.debiased_cka(x, y)), abs=1e-8)


def test_debiased_cka_of_unrelated_wide_layers_is_not_fooled() -> None:
    x, y = randn(50, 400), randn(50, 400, seed=1)
    assert float(baselines.linear_cka(x, y)) > 0.85
    assert abs(float(baselines.debiased_cka(x, y))) < 0.1


def test_linear_cka_of_orthogonal_and_equal_subspaces() -> None:
    q = orthonormal(40, 8)
    assert float(baselines.linear_cka(q[:, :4], q[:, 4:])) == pytest.approx(0, abs=1e-9)
    assert float(baselines.linear_cka(q[:, :4], q[:, 2:6])) == pytest.approx(0.5, abs=1e-9)  # two of four are shared


def test_procrustes_of_a_planted_rotation_and_against_scipy() -> None:
    linalg = need("scipy.linalg")
    x, y = randn(60, 5), randn(60, 3, seed=1)
    rotation = torch.linalg.qr(randn(5, 5, seed=2)).Q
    assert float(baselines.procrustes(x, 3 * x @ rotation + 7)) == pytest.approx(0, abs=1e-7)
    a, b = ((p - p.mean(0)).numpy() for p in (x, y))
    b = np.pad(b, ((0, 0), (0, 2)))
    a, b = a / np.linalg.norm(a), b / np.linalg.norm(b)
    best, _ = linalg.orthogonal_procrustes(a, b)
    assert float(baselines.procrustes(x, y)) == pytest.approx(np.linalg.norm(a @ best - b), abs=1e-9)
    angle = math.acos(np.trace((a @ best).T @ b))
    assert float(baselines.procrustes(x, y, kind="angular")) == pytest.approx(angle, abs=1e-9)
    wide = torch.nn.functional.pad(y, (0, 200)) @ torch.linalg.qr(randn(203, 203)).Q
    assert float(baselines.procrustes(wide, y)) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("dissimilarity", ["euclidean", "correlation"])
@pytest.mark.parametrize("comparison", ["spearman", "pearson"])
def test_rsa_against_scipy(dissimilarity: str, comparison: str) -> None:
    pdist, stats = need("scipy.spatial.distance").pdist, need("scipy.stats")
    x, y = randn(40, 6), randn(40, 6) + randn(40, 6, seed=1)
    tables = [pdist(p.numpy(), dissimilarity) for p in (x, y)]
    wanted = getattr(stats, comparison + "r")(*tables)[0]
    got = baselines.rsa(x, y, dissimilarity=dissimilarity, comparison=comparison)  # type: ignore[arg-type]
    assert float(got) == pytest.approx(wanted, abs=1e-9)


def test_rsa_shares_the_ranks_of_ties() -> None:
    pdist, stats = need("scipy.spatial.distance").pdist, need("scipy.stats")
    x = torch.tensor([[0.0], [1], [2], [4], [4], [7]], dtype=torch.float64)
    y = torch.tensor([[0.0, 1], [1, 1], [1, 0], [5, 5], [5, 5], [2, 0]], dtype=torch.float64)
    wanted = stats.spearmanr(*(pdist(p.numpy()).round(9) for p in (x, y)))[0]
    assert float(baselines.rsa(x, y)) == pytest.approx(wanted, abs=1e-9)


def test_pearson_rsa_is_differentiable() -> None:
    x, y = randn(8, 3).requires_grad_(), randn(8, 2, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda x, y: baselines.rsa(x, y, comparison="pearson"), (x, y))


def test_mutual_neighbours_of_planted_groups() -> None:
    centres = 50 * randn(6, 4)
    x = (centres.repeat_interleave(5, 0) + 0.01 * randn(30, 4, seed=1)).requires_grad_(False)
    regrouped = torch.cat([x[:15], x[15:].roll(5, 0)])  # the last three groups: other members, no common neighbours
    assert float(baselines.mutual_knn(x, x, n_neighbors=4, metric="euclidean")) == 1
    shuffled = x.clone()
    shuffled[15:] = x[15:][torch.arange(15).view(3, 5).T.flatten()]
    got = float(baselines.mutual_knn(x, shuffled, n_neighbors=4, metric="euclidean"))
    groups = torch.arange(30) // 5
    moved = torch.cat([groups[:15], groups[15:][torch.arange(15).view(3, 5).T.flatten()]])
    same = (groups[:, None] == groups) & (moved[:, None] == moved) & ~torch.eye(30, dtype=torch.bool)
    assert got == pytest.approx(float(same.sum() / (30 * 4)))
    assert float(baselines.mutual_knn(x, regrouped, n_neighbors=4, metric="euclidean")) == 1  # the same groups, renamed


def test_linear_regression_is_r_squared() -> None:
    x, y = randn(80, 3), randn(80, 5, seed=1)
    y[:, :3] += 2 * x
    design = np.column_stack([np.ones(80), x.numpy()])
    fitted = design @ np.linalg.lstsq(design, y.numpy(), rcond=None)[0]
    wanted = 1 - ((y.numpy() - fitted) ** 2).sum() / ((y.numpy() - y.numpy().mean(0)) ** 2).sum()
    assert float(baselines.linear_regression(x, y)) == pytest.approx(wanted, abs=1e-9)
    assert float(baselines.linear_regression(x, x @ randn(3, 40))) == pytest.approx(1, abs=1e-9)


def test_relative_representations_are_cosines_to_the_anchors() -> None:
    x, anchors = randn(30, 4), torch.tensor([3, 0, 17])
    relative = baselines.relative_representation(x, anchors)
    assert float(relative[5, 2]) == pytest.approx(float(torch.cosine_similarity(x[5], x[17], dim=0)))
    rotation = torch.linalg.qr(randn(4, 4)).Q
    assert float(baselines.relative_similarity(x, 2 * x @ rotation, anchors=anchors)) == pytest.approx(1)
    with pytest.raises(ValueError, match=r"anchors must lie in \[0, 30\)"):
        baselines.relative_representation(x, torch.tensor([30]))
    with pytest.warns(LFMWarning, match="1 of 30 rows are zero"):
        with_zero = baselines.relative_representation(x.index_fill(0, torch.tensor([4]), 0), anchors)
    assert torch.equal(with_zero[4], torch.zeros(3))
    torch.testing.assert_close(with_zero[5], relative[5])


PAIRED = [
    baselines.linear_cka, baselines.rbf_cka, baselines.debiased_cka, baselines.minibatch_cka, baselines.mean_cca,
    baselines.svcca, baselines.pwcca, baselines.procrustes, baselines.rsa, baselines.linear_regression,
]  # fmt: skip


@pytest.mark.parametrize("function", PAIRED, ids=lambda function: function.__name__)
def test_extreme_scales_and_no_variance(function: object) -> None:
    x, y = randn(30, 5), randn(30, 4, seed=1)
    wanted = float(function(x, y))  # type: ignore[operator]
    for scale in (1e-150, 1e150):
        assert float(function(x, scale * y)) == pytest.approx(wanted, abs=1e-7)  # type: ignore[operator]
        assert float(function(scale * x, y)) == pytest.approx(wanted, abs=1e-7)  # type: ignore[operator]
    nothing = float(function(x, torch.ones(30, 2, dtype=torch.float64)))  # type: ignore[operator]
    if function is baselines.procrustes:
        # the norm of x, which is 1 up to the order of its sum: no two BLAS add in the same
        assert nothing == pytest.approx(1, abs=4 * np.finfo(float).eps, rel=0)
    else:
        assert nothing == 0
    with pytest.raises(ValueError, match="y must have the rows of x"):
        function(x, y[:20])  # type: ignore[operator]
    with pytest.raises(ValueError, match="y must be finite"):
        function(x, y * math.nan)  # type: ignore[operator]


@hypothesis.settings(max_examples=25)
@hypothesis.given(st.integers(4, 24), st.integers(1, 30), st.integers(1, 30), st.integers(0, 5), st.booleans())
def test_ranges_hold_whatever_the_shape(n: int, dx: int, dy: int, copies: int, whole: bool) -> None:
    x, y = randn(n, dx, seed=n), randn(n, dy, seed=dx)
    if whole:  # ties, duplicated rows, low rank
        x, y = x.round(), y.round()
    x = torch.cat([x, *[x[:, :1]] * copies], 1)
    for function in PAIRED:
        low, high = (-1, 1) if function.__name__ in ("debiased_cka", "minibatch_cka", "rsa") else (0, math.sqrt(2))
        assert low - 1e-7 <= float(function(x, y)) <= high + 1e-7, function.__name__
