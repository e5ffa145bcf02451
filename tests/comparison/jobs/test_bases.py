"""Bases of several layers in one batch: the way of a GPU, taken here by saying how much room there is."""

from __future__ import annotations

import pytest
import torch

from lfm_torch.comparison.jobs import bases
from lfm_torch.comparison.jobs.bases import bases_of
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.spectral.basis import Basis
from lfm_torch.spectral.compute import spectral_basis

SETTINGS = Settings(("heat",), 12, 10, "angular", "gaussian")


def layers() -> list[torch.Tensor]:
    points = [torch.randn(150, d) for d in (4, 9, 30, 4)]
    points.insert(2, torch.ones(150, 5))  # collapsed: an error of its own
    return points


@pytest.mark.parametrize("room", [0, 200_000, 1 << 30])
def test_a_batch_gives_what_each_layer_does(room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []

    def counted(graph: object, **options: object) -> Basis:
        batches.append(getattr(graph, "batch_shape", ()))
        return spectral_basis(graph, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bases, "spectral_basis", counted)
    points = layers()
    alone, together = list(bases_of(points, SETTINGS)), list(bases_of(points, SETTINGS, room=room))
    assert len(alone) == len(together) == 5
    for i, (one, other) in enumerate(zip(alone, together, strict=True)):
        if i == 2:
            assert isinstance(one, ValueError)
            assert str(one) == str(other)
            continue
        assert not isinstance(one, Exception)
        assert not isinstance(other, Exception)
        torch.testing.assert_close(one[0].evals, other[0].evals, atol=2e-5, rtol=0)
        # the same space, whatever turns inside near-repeated eigenvalues
        overlap = (one[0].evecs[:, :8].mT @ other[0].evecs).square().sum()
        assert float(overlap) == pytest.approx(8, abs=1e-3)
        assert one[1] == other[1] == ""
    assert batches == {0: [], 200_000: [(2,), (2,)], 1 << 30: [(4,)]}[room]


def test_without_room_batches_are_halved(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def small(graph: object, **options: object) -> Basis:
        (size,) = graph.batch_shape  # type: ignore[attr-defined]
        sizes.append(size)
        if size > 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        return spectral_basis(graph, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bases, "spectral_basis", small)
    found = list(bases_of(layers(), SETTINGS, room=1 << 30))
    assert [isinstance(one, Exception) for one in found] == [False, False, True, False, False]
    assert sizes == [4, 2, 2]


def test_an_error_of_another_kind_stays_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(graph: object, **options: object) -> Basis:
        raise RuntimeError("cusolver error")

    monkeypatch.setattr(bases, "spectral_basis", broken)
    found = list(bases_of(layers(), SETTINGS, room=1 << 30))
    assert [isinstance(one, Exception) for one in found] == [False, False, True, False, False]


def test_a_graph_without_room_is_tried_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, calls = bases.representation_graph, []

    def once(x: torch.Tensor, **options: object) -> object:
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        return whole(x, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(bases, "representation_graph", once)
    found = list(bases_of(layers(), SETTINGS, room=1 << 30))
    assert [isinstance(one, Exception) for one in found] == [False, False, True, False, False]
