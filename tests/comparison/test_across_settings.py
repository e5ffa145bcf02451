"""Sensitivity to settings, on planted relations."""

from __future__ import annotations

import pytest
from clouds import related

import lfm_torch as lfm

SETTINGS = {"n_neighbors": 12, "n_basis": 10}


def test_sensitivity_changes_one_setting_at_a_time() -> None:
    x, y = related()
    found = lfm.sensitivity(
        x, y, measures=["heat", "overlap", "linear_cka"], n_samples=[120, 240], n_neighbors=[12, 36], n_basis=[5, 20]
    )
    wanted = lfm.similarity(x, y, measures=["heat"], n_neighbors=found.base["n_neighbors"], n_basis=20)["heat"]
    assert found.values["n_basis"][20]["heat"] == pytest.approx(float(wanted), abs=1e-6)
    assert found.values["n_basis"][5]["linear_cka"] == found.values["n_basis"][20]["linear_cka"]
    assert found.spread("overlap")["n_basis"] > found.spread("heat")["n_basis"]
    assert found.spread("linear_cka")["n_neighbors"] == 0
    assert lfm.sensitivity(x, y).base == {"n_samples": 240, "n_neighbors": 36, "n_basis": 50}
