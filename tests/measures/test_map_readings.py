"""Readings of maps on planted answers, under the invariances they promise, and of maps of many sizes."""

from __future__ import annotations

import itertools
import math
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import lfm_torch as lfm
from lfm_torch.measures.map_readings import commutativity_error, orthogonality_error, spectral_distance
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.measures.table import DEFAULT_MEASURES, MAP_MEASURES
from lfm_torch.ops import map_energies
from lfm_torch.pipeline import representation_basis


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def graph_of(x: torch.Tensor) -> lfm.Graph:
    return lfm.build_graph(x, n_neighbors=8)


def map_of(matrix: torch.Tensor) -> lfm.FunctionalMap:
    evals = torch.linspace(0, 1, max(matrix.shape[-2:]), dtype=matrix.dtype)
    return lfm.FunctionalMap(matrix, evals[: matrix.shape[-1]], evals[: matrix.shape[-2]])


def orthogonal(n: int, seed: int = 1) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).Q


def test_perfect_and_empty_maps() -> None:
    identity, zero = map_of(torch.eye(6)), map_of(torch.zeros(6, 6))
    for squared in (True, False):
        for symmetric in (True, False):
            assert float(lfm.lfm_similarity(identity, squared=squared, symmetric=symmetric)) == 1
            assert float(lfm.lfm_similarity(zero, squared=squared, symmetric=symmetric)) == 0
    assert float(lfm.subspace_overlap(identity)) == 1
    assert float(lfm.heat_overlap(identity)) == pytest.approx(1)
    assert float(lfm.heat_overlap(zero)) == 0


def test_readings_as_defined() -> None:
    c = torch.randn(4, 3, 5, 6, dtype=torch.float64)
    fmap = lfm.FunctionalMap(c, torch.rand(6, dtype=torch.float64), torch.rand(5, dtype=torch.float64))
    for index in np.ndindex(4, 3):
        m = c[index].numpy()
        gram, other = m.T @ m, m @ m.T

        def off(g: np.ndarray) -> float:
            return float(np.linalg.norm(g - np.diag(np.diag(g))) / np.linalg.norm(g))

        a, b = fmap.evals_x.numpy(), fmap.evals_y.numpy()
        kernel = sum(np.exp(-1.5 * (a[i] + b[j])) * m[j, i] ** 2 for i in range(6) for j in range(5))
        heat = kernel / np.sqrt(np.exp(-3 * a).sum() * np.exp(-3 * b).sum())
        assert float(lfm.lfm_similarity(fmap)[index]) == pytest.approx(1 - off(gram) ** 2)
        assert float(lfm.lfm_similarity(fmap, squared=False)[index]) == pytest.approx(1 - off(gram))
        both = (1 - off(gram) ** 2 + 1 - off(other) ** 2) / 2
        assert float(lfm.lfm_similarity(fmap, symmetric=True)[index]) == pytest.approx(both)
        assert float(lfm.subspace_overlap(fmap)[index]) == pytest.approx((m**2).sum() / 5)
        assert float(lfm.heat_overlap(fmap, time=1.5, raw=True)[index]) == pytest.approx(heat)


def test_overlap_and_heat_do_not_depend_on_the_basis() -> None:
    c = orthogonal(12)[:5, :5]
    evals = torch.tensor([0.0, 0.2, 0.2, 0.2, 0.7], dtype=torch.float64)
    rotation = torch.eye(5, dtype=torch.float64)
    rotation[1:4, 1:4] = orthogonal(3)  # inside the eigenvalue that is repeated
    before, after = (lfm.FunctionalMap(m, evals, evals) for m in (c, c @ rotation))
    torch.testing.assert_close(lfm.heat_overlap(before), lfm.heat_overlap(after))
    torch.testing.assert_close(lfm.subspace_overlap(before), lfm.subspace_overlap(after))
    assert abs(float(lfm.lfm_similarity(before) - lfm.lfm_similarity(after))) > 1e-3


def test_heat_of_time_zero_is_the_overlap() -> None:
    fmap = map_of(orthogonal(9)[:4, :4])
    torch.testing.assert_close(lfm.heat_overlap(fmap, time=0.0, raw=True), lfm.subspace_overlap(fmap))
    rest = lfm.FunctionalMap(fmap.C[1:, 1:], fmap.evals_x[1:], fmap.evals_y[1:])
    torch.testing.assert_close(lfm.heat_overlap(fmap, time=0.0), lfm.subspace_overlap(rest))
    for time in (-1, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"time must be finite and not negative, got {time}"):
            lfm.heat_overlap(fmap, time=time)


def test_readings_are_differentiable() -> None:
    c = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    a, b = (torch.rand(n, dtype=torch.float64, requires_grad=True) for n in (5, 4))

    def readings(c: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        fmap = lfm.FunctionalMap(c, a, b)
        return torch.stack(
            [lfm.lfm_similarity(fmap, symmetric=True), lfm.lfm_similarity(fmap, squared=False), lfm.heat_overlap(fmap)]
        )

    assert torch.autograd.gradcheck(readings, (c, a, b))
    perfect = torch.eye(4, dtype=torch.float64, requires_grad=True)
    lfm.lfm_similarity(map_of(perfect), squared=False).backward()
    assert perfect.grad is not None
    assert bool(perfect.grad.isfinite().all())


def test_the_first_function_is_the_constant_also_of_a_disconnected_graph() -> None:
    x = torch.cat([randn(30, 3) + 40, randn(50, 3, seed=1) - 40, randn(25, 3, seed=2) * torch.tensor([1, 1, 40])])
    graph = lfm.build_graph(x, n_neighbors=8)
    assert int(graph.n_components) > 1
    basis = representation_basis(x, n_neighbors=8, n_basis=10)
    constant = graph.degree.sqrt() / graph.degree.sum().sqrt()
    torch.testing.assert_close((basis.evecs[:, 0] @ constant).abs(), torch.ones((), dtype=torch.float64))
    torch.testing.assert_close(basis.evecs.mT @ basis.evecs, torch.eye(10, dtype=torch.float64), atol=1e-7, rtol=0)
    L = graph.laplacian()
    residual = L @ basis.evecs - basis.evecs * basis.evals
    assert float(residual.norm(dim=0).max()) < 1e-6


@pytest.mark.parametrize(("m_y", "m_x"), [(3, 3), (5, 8), (8, 5), (1, 4), (70, 33)])
def test_errors_as_defined(m_y: int, m_x: int) -> None:
    c = randn(m_y, m_x) / math.sqrt(m_x * m_y)
    a, b = randn(m_x, seed=1).abs(), randn(m_y, seed=2).abs()
    fmap = lfm.FunctionalMap(c, a, b)
    small = c if m_y >= m_x else c.mT
    gram = small.mT @ small
    m = min(m_x, m_y)
    wanted = (gram - torch.eye(m, dtype=c.dtype)).norm() / math.sqrt(m)
    assert float(orthogonality_error(fmap)) == pytest.approx(float(wanted))
    commutator = torch.diag(b) @ c - c @ torch.diag(a)
    assert float(commutativity_error(fmap)) == pytest.approx(float(commutator.norm() / c.norm()))
    assert float(spectral_distance(fmap)) == pytest.approx(float((a[:m] - b[:m]).square().mean().sqrt()))
    if m > 1:
        wanted = commutator[1:, 1:].norm() / c[1:, 1:].norm()
        assert float(commutativity_error(fmap, centered=True)) == pytest.approx(float(wanted))
        rest = lfm.FunctionalMap(c[1:, 1:], a[1:], b[1:])
        for symmetric in (False, True):
            centered = lfm.lfm_similarity(fmap, symmetric=symmetric, centered=True)
            torch.testing.assert_close(centered, lfm.lfm_similarity(rest, symmetric=symmetric))


def test_bases_rounded_to_tf32_move_the_default_measures_by_1e_5() -> None:
    """What a GPU does with them at float32_matmul_precision "high", where sums stay in single precision."""
    base = randn(400, 10)
    points = [base + 0.3 * k * randn(400, 10, seed=k) for k in range(4)]
    bases = [representation_basis(x, n_neighbors=60, n_basis=50) for x in points]
    evecs, evals = torch.stack([b.evecs.mT for b in bases]).float(), torch.stack([b.evals for b in bases]).float()
    bits = evecs.contiguous().view(torch.int32)
    rounded = ((bits + 0xFFF + (bits >> 13 & 1)) & ~0x1FFF).view(torch.float32)  # to nearest, ten bits of mantissa
    assert 1e-4 < float((rounded / evecs - 1).abs().max()) < 2**-11 * 1.01
    exact, coarse = (Maps.between(vectors, evals, vectors, evals) for vectors in (evecs, rounded))
    for name in DEFAULT_MEASURES:
        moved = (MAP_MEASURES[name].read(coarse) - MAP_MEASURES[name].read(exact)).abs().max()
        assert 0 < float(moved) < 4e-5


@pytest.mark.parametrize("order", list(itertools.permutations(DEFAULT_MEASURES)))
def test_the_default_measures_take_one_pass(order: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*args: Any) -> torch.Tensor:
        calls.append(args[-1])
        return map_energies(*args)

    monkeypatch.setattr(sys.modules[Maps.__module__], "map_energies", counted)
    evecs, evals = torch.linalg.qr(randn(3, 40, 6)).Q.mT, randn(3, 6).abs()
    maps = Maps.between(evecs, evals, evecs, evals)
    for name in order:
        MAP_MEASURES[name].read(maps)
    assert calls == [1]


def test_heat_is_the_cosine_of_diffusion_kernels_without_their_share_of_the_identity() -> None:
    n, m, time = 90, 40, 1.3
    x = randn(n, 4)
    bases = [representation_basis(p, n_neighbors=12, n_basis=m) for p in (x, x + 0.4 * randn(n, 4, seed=1))]
    kernels, traces = [], []
    for basis in bases:
        weights = torch.exp(-time * 0.75 * basis.evals / basis.evals[29])
        kernels.append(basis.evecs[:, 1:] @ torch.diag(weights[1:]) @ basis.evecs[:, 1:].mT)
        traces.append(float(kernels[-1].trace()))
    (k, other), (s, t) = kernels, traces

    def inner(a: torch.Tensor, b: torch.Tensor, trace_a: float, trace_b: float) -> float:
        return float((a * b).sum()) - trace_a * trace_b / (n - 1)

    wanted = inner(k, other, s, t) / math.sqrt(inner(k, k, s, s) * inner(other, other, t, t))
    fmap = lfm.paired_map(*bases)
    assert float(lfm.heat_overlap(fmap, time=time)) == pytest.approx(wanted, abs=1e-12)
    assert float(lfm.heat_overlap(fmap.adjoint, time=time)) == pytest.approx(wanted, abs=1e-12)
    same = lfm.paired_map(bases[0], bases[0])
    assert all(float(lfm.heat_overlap(same, time=t)) == pytest.approx(1, abs=1e-9) for t in (0.0, 2.0, 1e6))


@pytest.mark.parametrize("n", [40, 200, 500, 2000])
def test_heat_of_unrelated_spaces_is_0_at_any_number_of_samples(n: int) -> None:
    values = []
    for seed in range(4 if n < 2000 else 1):
        x, y = (randn(n, d, seed=100 * seed + d).float() for d in (16, 48))
        values.append(lfm.similarity(x, y, measures="heat")["heat"])
    # the spread of one value is about 1 / n; of the plain cosine it is .3 to .5 that is chance
    assert float(torch.stack(values).mean().abs()) < min(0.05, 8 / n)


def test_heat_compares_across_neighbours_and_samples() -> None:
    x = randn(1200, 3)
    y = x + 0.15 * randn(1200, 3, seed=1)
    settings = [(1200, 180), (1200, 60), (600, 90), (300, 45)]
    values = {
        name: [float(lfm.similarity(x[:n], y[:n], measures=name, n_neighbors=k)[name]) for n, k in settings]
        for name in ("heat", "heat_raw")
    }
    spread = {name: max(column) - min(column) for name, column in values.items()}
    assert spread["heat"] < 0.6 * spread["heat_raw"]


def test_a_map_that_knows_no_number_of_samples_is_not_corrected() -> None:
    basis_x, basis_y = (representation_basis(randn(80, 3, seed=s), n_basis=20) for s in (0, 1))
    fmap = lfm.paired_map(basis_x, basis_y)
    assert fmap.n_samples == 80
    assert abs(float(lfm.heat_overlap(fmap))) < 0.1 < float(lfm.heat_overlap(replace(fmap, n_samples=None)))


def test_heat_of_a_graph_in_many_parts_and_of_a_single_function() -> None:
    codes = torch.eye(50, dtype=torch.float64)[torch.arange(400) % 50]  # more parts than eigenvectors
    for points in (codes, codes.float()):
        assert float(lfm.similarity(points, points, measures="heat", n_neighbors=5)["heat"]) == pytest.approx(
            1, abs=1e-4
        )
    with pytest.raises(ValueError, match="n_basis must be at least 2"):
        lfm.similarity(randn(40, 3), randn(40, 3, seed=1), measures="heat", n_basis=1)


def test_all_pairs_at_once_are_the_single_maps() -> None:
    evecs_x, evecs_y = (torch.linalg.qr(randn(k, 40, 6, seed=k)).Q.mT for k in (3, 2))
    evals_x, evals_y = randn(3, 6).abs(), randn(2, 6, seed=1).abs()
    maps = Maps.between(evecs_x, evals_x, evecs_y, evals_y)
    for i in range(2):
        for j in range(3):
            single = Maps.of(lfm.FunctionalMap(evecs_y[i] @ evecs_x[j].mT, evals_x[j], evals_y[i]))
            for name in maps.energies()._fields:
                got, wanted = getattr(maps.energies(skip=1), name)[i, j], getattr(single.energies(skip=1), name)[0, 0]
                torch.testing.assert_close(got, wanted)
            swapped = getattr(maps.swapped.energies(), "on_x")[i, j]  # noqa: B009
            torch.testing.assert_close(swapped, single.energies().on_y[0, 0])
