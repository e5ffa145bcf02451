from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from small_networks import OPTIONS, net, probe

from lfm_torch.comparison.jobs.plan import plan
from lfm_torch.comparison.jobs.settings import Settings
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.run import compare
from lfm_torch.representations.checkpoints import Checkpoints


def test_a_plan_counts_what_is_to_do(tmp_path: Path) -> None:
    for seed in range(3):
        torch.manual_seed(seed)
        torch.save(net().state_dict(), tmp_path / f"model_seed_{seed}.pt")
    settings = Settings(("heat", "linear_cka"), 8, 6, "angular", "gaussian")
    first = Checkpoints(sorted(tmp_path.glob("*.pt"))[:2], net(), probe(), layers=["0", "2"])
    found = plan(first, settings, None)
    assert (found.checkpoints, found.representations, found.stored, found.pairs) == (2, 4, 0, 10)
    assert found.samples == 60
    assert found.seconds is not None
    assert 0 < found.seconds < 60
    store = Store(tmp_path / "store")
    compare(first, measures=["heat", "linear_cka"], store=store, **OPTIONS)
    assert plan(first, settings, store).pairs == 0
    more = Checkpoints([tmp_path, tmp_path / "missing.pt"], net(), probe(), layers=["0", "2"])
    found = plan(more, settings, store)
    assert (found.representations, found.stored, found.pairs) == (6, 4, 2 * 4 + 3)
    assert "missing" in found.problems[0]
    with pytest.raises(ValueError, match="n_basis must be between"):
        plan(first, Settings(("heat",), None, 60, "angular", "gaussian"), None)
    assert not math.isnan(found.seconds or 0)
