"""Two processes on gloo: no deadlock, the same numbers on both ranks, the same training with and without us."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from extras import needs
from processes import environment

import lfm_torch as lfm

SCRIPT = Path(__file__).with_name("two_ranks.py")
pytestmark = [
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="torch without distributed or gloo"
    ),
    needs("pytorch_lightning", "torchmetrics"),
]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """Results of every scenario, by rank: one start of two processes for all."""
    folder = tmp_path_factory.mktemp("ranks")
    names = ["ddp", "failing", "fsdp", "torchmetrics", "lightning"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(2):
        given = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "GROUP_RANK": 0}
        given |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
        inherited = environment(**{name: str(value) for name, value in given.items()})
        command = [sys.executable, str(SCRIPT), ",".join(names), str(folder)]
        processes.append(
            subprocess.Popen(command, env=inherited, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    try:
        outputs = [process.communicate(timeout=150)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(2)] for name in names}


def test_ranks_agree_to_the_bit_and_training_is_untouched(ranks: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ranks["ddp"]
    for background in ("False", "True"):
        # also the seconds: one measurement was made, and handed on
        assert first[f"history {background}"] == second[f"history {background}"]
        assert [point[0] for point in first[f"history {background}"]] == [0, 1, 2, 3, 4]
        assert first[f"stop {background}"] is second[f"stop {background}"] is True
        assert (first[f"told {background}"], second[f"told {background}"]) == (["drift"], [])
        for rank in (first, second):
            assert rank[f"weights {background}"] == rank["weights None"]
    scores = [[point[1] for point in first[f"history {background}"]] for background in ("False", "True")]
    assert scores[0] == scores[1]


def test_a_failure_on_rank_zero_reaches_all(ranks: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ranks["failing"]
    assert first["failures"] == second["failures"] == {"0": "RuntimeError: this rank cannot"}
    assert (first["warned"], second["warned"]) == (1, 0)
    assert first["raised"] == "this rank cannot"
    assert second["raised"] == "rank 0 failed: RuntimeError: this rank cannot"


def test_split_weights_take_part_in_the_pass(ranks: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ranks["fsdp"]
    for layer, scores in first["alone"].items():
        assert scores == pytest.approx(first["whole"][layer], rel=1e-4)
    assert first["rows"] == second["rows"]
    assert {row["step"] for row in first["rows"]} == {0, 1, 2}


def test_lightning_trains_the_same_on_both(ranks: dict[str, list[dict[str, Any]]]) -> None:
    first, second = ranks["lightning"]
    for rank in (first, second):
        assert rank["weights True"] == rank["weights False"]
    assert first["points"] == second["points"]
    assert len(first["points"]) == 3
    assert first["metric"] == second["metric"] == pytest.approx(first["points"][-1][1]["net.2"]["heat"])


def test_the_metric_sees_the_rows_of_all(ranks: dict[str, list[dict[str, Any]]]) -> None:
    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    y = x.tanh() @ torch.randn(5, 4, generator=torch.Generator().manual_seed(4))
    wanted = lfm.similarity(x, y, measures=["heat", "linear_cka"], n_basis=8)
    for found in ranks["torchmetrics"]:
        assert found == pytest.approx({name: float(value) for name, value in wanted.items()}, abs=1e-5)
