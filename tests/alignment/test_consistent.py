"""A shared latent basis: exact for consistent maps, better than the given ones for noisy maps, and connected."""

from __future__ import annotations

import pytest
import torch

import lfm_torch as lfm
from lfm_torch.alignment.consistent import consistent_maps


def rotations(count: int, m: int) -> list[torch.Tensor]:
    return [torch.linalg.qr(torch.randn(m, m, dtype=torch.float64)).Q for _ in range(count)]


def given(
    q: list[torch.Tensor], pairs: list[tuple[int, int]], noise: float = 0.0
) -> dict[tuple[int, int], lfm.FunctionalMap]:
    evals = torch.arange(len(q[0]), dtype=torch.float64)
    return {(i, j): lfm.FunctionalMap(q[j] @ q[i].T + noise * torch.randn_like(q[0]), evals, evals) for i, j in pairs}


def test_consistent_maps_are_returned_and_missing_ones_filled_in() -> None:
    q = rotations(4, 7)
    shared = consistent_maps(given(q, [(0, 1), (1, 2), (3, 2)]))
    assert shared.cycle_error is None
    assert shared.pair_error < 1e-10
    assert float(shared.spectrum.max()) < 1e-10
    for i in range(4):
        for j in range(4):
            torch.testing.assert_close(shared.fmap(i, j).C, q[j] @ q[i].T)


def test_noise_of_many_maps_averages_out() -> None:
    q = rotations(8, 10)
    pairs = [(i, j) for i in range(8) for j in range(8) if i != j]
    maps = given(q, pairs, noise=0.1)
    shared = consistent_maps(maps)
    assert shared.cycle_error is not None
    assert 0.2 < shared.cycle_error < 1

    def error(C: torch.Tensor, pair: tuple[int, int]) -> float:
        return float((C - q[pair[1]] @ q[pair[0]].T).norm())

    before = sum(error(maps[pair].C, pair) for pair in pairs)
    after = sum(error(shared.fmap(*pair).C, pair) for pair in pairs)
    assert after < 0.6 * before
    around = shared.fmap(2, 0).C @ shared.fmap(1, 2).C @ shared.fmap(0, 1).C
    torch.testing.assert_close(around, torch.eye(10, dtype=torch.float64))


def test_what_only_some_spaces_share_comes_last() -> None:
    q = rotations(3, 6)
    maps = given(q, [(0, 1), (1, 2), (2, 0)])
    # the last direction is carried wrongly by one map
    broken = torch.eye(6, dtype=torch.float64)
    broken[5, 5] = -1
    maps[2, 0] = lfm.FunctionalMap(q[0] @ broken @ q[2].T, maps[2, 0].evals_x, maps[2, 0].evals_y)
    shared = consistent_maps(maps)
    assert float(shared.spectrum[4]) < 1e-10
    assert float(shared.spectrum[5]) > 0.1
    assert consistent_maps(maps, n_shared=5).fmap(0, 1).C.shape == (6, 6)


def test_real_spaces_of_other_sizes() -> None:
    x = torch.randn(300, 5, dtype=torch.float64)
    bases = [
        lfm.spectral_basis(lfm.build_graph(x @ rotation, n_neighbors=20), n_basis=m)
        for rotation, m in zip(rotations(3, 5), (12, 10, 11), strict=True)
    ]
    maps = {(i, j): lfm.paired_map(bases[i], bases[j]) for i, j in ((0, 1), (1, 2), (2, 0))}
    shared = consistent_maps(maps)
    assert [y.shape for y in shared.latent] == [(12, 10), (10, 10), (11, 10)]
    assert float(lfm.lfm_similarity(shared.fmap(0, 2))) > 0.9


def test_wrong_input_is_refused() -> None:
    q = rotations(4, 3)
    with pytest.raises(ValueError, match="at least one functional map"):
        consistent_maps({})
    with pytest.raises(ValueError, match="must connect all 4 spaces, got 2 separate groups"):
        consistent_maps(given(q, [(0, 1), (2, 3)]))
    with pytest.raises(ValueError, match="must number the spaces from 0"):
        consistent_maps(given(q, [(1, 2)]))
    with pytest.raises(ValueError, match="n_shared must be between 1 and 3"):
        consistent_maps(given(q, [(0, 1)]), n_shared=4)
    evals = torch.arange(4.0)
    maps = {
        (0, 1): lfm.FunctionalMap(torch.eye(4), evals, evals),
        (1, 2): lfm.FunctionalMap(torch.eye(3), evals[:3], evals[:3]),
    }
    with pytest.raises(ValueError, match="agree on the basis of space 1, got 4 and 3"):
        consistent_maps(maps)
