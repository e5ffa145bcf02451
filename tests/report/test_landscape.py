from __future__ import annotations

import base64
import itertools
import json
import re

import numpy as np
import pytest
import torch
from extras import REPORT, need, needs

from lfm_torch import LFMWarning
from lfm_torch.comparison.items import Item
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare
from lfm_torch.report.landscape import classical_scaling, dendrogram, landscape, leaves, linkage, outliers
from lfm_torch.representations.checkpoint_files import Checkpoint


def apart(places: np.ndarray) -> np.ndarray:
    """All distances between the places."""
    return np.linalg.norm(places[:, None] - places, axis=-1)


def planted(n_runs: int = 4, n_epochs: int = 5, *, stray: int | None = None) -> tuple[Comparison, np.ndarray]:
    """Checkpoints on a plane whose heat overlap is made so that their distance is that on the plane."""
    rng = np.random.default_rng(0)
    n = n_runs * n_epochs
    places = rng.normal(size=(n_runs, 1, 2)) * 0.2 + rng.normal(size=(n_runs, n_epochs, 2)) * 0.02
    places = places.reshape(n, 2)
    if stray is not None:
        places[stray] += 0.9
    squares = apart(places) ** 2
    names = [(f"seed{r}", e) for r in range(n_runs) for e in range(n_epochs)]
    checkpoints = tuple(Checkpoint(f"{run}/epoch={step}", run, step) for run, step in names)
    items = tuple(Item(checkpoint.name, "layer") for checkpoint in checkpoints)
    matrix = torch.from_numpy(1 - squares / 2)
    chance = torch.full((n,), 0.1)
    comparison = Comparison(items, checkpoints, ("layer",), {"heat": matrix}, {"heat": chance}, {"n_samples": 9})
    return comparison, places


@pytest.mark.parametrize("n", [3, 10, 60])
def test_linkage_is_that_of_scipy(n: int) -> None:
    distances = apart(np.random.default_rng(n).normal(size=(n, 3)))
    wanted = need("scipy.cluster.hierarchy").linkage(distances[np.triu_indices(n, 1)], method="average")
    merges = linkage(distances)
    np.testing.assert_allclose(merges, wanted[:, :3], rtol=1e-12)
    order = leaves(merges)
    assert sorted(order) == list(range(n))
    brackets = dendrogram(merges, order)
    # branches never cross: every bracket spans leaves that stand together
    assert all(left < right for left, _, right, _, _ in brackets)
    assert brackets[-1][4] == pytest.approx(wanted[-1, 2])


def test_equal_models_end_the_clustering_too() -> None:
    merges = linkage(np.zeros((6, 6)))
    assert sorted(leaves(merges)) == list(range(6))
    assert merges[:, 2].tolist() == [0] * 5


def test_the_map_keeps_distances_on_a_plane_and_finds_who_stands_apart() -> None:
    comparison, places = planted(stray=7)
    found = landscape(comparison)
    assert found is not None
    assert (found.measure, found.proper) == ("heat", True)
    np.testing.assert_allclose(apart(found.places), apart(places), atol=1e-6)
    assert found.kept == pytest.approx(1)
    assert [i for i, _, _ in found.outliers] == [7]
    # the stray apart, the runs stand together in the order of the clusters
    runs = [i // 5 for i in found.order if i != 7]
    assert sum(a != b for a, b in itertools.pairwise(runs)) == 3


def test_models_alike_have_no_outliers() -> None:
    assert outliers(np.zeros((8, 8))) == []
    assert classical_scaling(np.zeros((4, 4)))[1] == 1.0


def rendered(comparison: Comparison) -> str:
    # it imports what draws and what fills in templates
    from lfm_torch.report.html import render

    return render(comparison)


def held(page: str) -> dict[str, object]:
    match = re.search(r'<script type="application/json" id="landscape">(.*?)</script>', page, re.DOTALL)
    assert match is not None
    found: dict[str, object] = json.loads(match.group(1))
    return found


@needs(*REPORT)
def test_the_page_holds_every_value_to_a_step() -> None:
    generator = torch.Generator().manual_seed(0)
    networks = {f"net</script>{k}": {n: torch.randn(50, 4, generator=generator) for n in "ab"} for k in range(5)}
    comparison = compare(networks, n_basis=6, n_neighbors=8)
    page = rendered(comparison)
    content = held(page)
    low, high = float(content["low"]), float(content["high"])  # type: ignore[arg-type]
    triangle = np.frombuffer(base64.b64decode(content["triangle"]["values"]), np.uint8)  # type: ignore[index]
    rows, columns = np.triu_indices(10)
    wanted = comparison.matrix("heat").numpy()[rows, columns]
    np.testing.assert_allclose(low + (high - low) * triangle / 254, wanted, atol=0.51 * (high - low) / 254)
    assert content["names"] == list(networks)
    assert "net</script>" not in page
    assert page.count('class="cluster"') == 2 * 3


@needs(*REPORT)
def test_pairs_that_failed_are_shown_as_such() -> None:
    networks = {f"m{k}": torch.randn(40, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    comparison = compare(networks, n_basis=5, n_neighbors=6, measures=["heat"])
    comparison.matrix("heat")[0, 2] = comparison.matrix("heat")[2, 0] = float("nan")
    content = held(rendered(comparison))
    values = np.frombuffer(base64.b64decode(content["measures"][0]["values"]), np.uint8).reshape(4, 4)  # type: ignore[index]
    assert (values == 255).sum() == 2
    assert landscape(compare({"a": networks["m0"], "b": networks["m1"]}, n_basis=5, n_neighbors=6)) is None


@needs(*REPORT)
def test_a_measure_without_a_distance_says_so() -> None:
    networks = {f"m{k}": torch.randn(40, 3, generator=torch.Generator().manual_seed(k)) for k in range(4)}
    page = rendered(compare(networks, n_basis=5, n_neighbors=6, measures=["lfm"]))
    assert "it is no proper distance" in page
    with pytest.warns(LFMWarning):
        compare({**networks, "nan": torch.full((40, 3), float("nan"))}, n_basis=5, n_neighbors=6)
