from __future__ import annotations

import pytest

from lfm_torch.comparison.jobs import memory

GIB = 2**30


def test_what_is_used_and_free_is_known() -> None:
    assert 10 * 2**20 < memory.resident_bytes() < 64 * GIB
    assert memory.available_bytes() > 0


def test_a_budget_is_what_is_left_for_bases_and_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "resident_bytes", lambda: GIB // 2)
    assert memory.cache_bytes(2 * GIB, reserved=GIB // 2) == GIB - GIB // 4
    with pytest.raises(ValueError, match=r"memory_budget must be at least 1\.3 GiB here \(512\.0 MiB in use"):
        memory.cache_bytes(GIB, reserved=GIB // 2)
    assert memory.workers(2 * GIB, GIB // 4) == 4
    assert memory.workers(GIB // 2, 10 * GIB) == 1
    monkeypatch.setattr(memory, "available_bytes", lambda: 4 * GIB)
    assert memory.workers(None, GIB) == 1
    assert memory.cache_bytes(None, reserved=0) == 2 * GIB - GIB // 4
