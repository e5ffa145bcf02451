"""One comparison, many ways to it: interrupted, in other orders, on other engines, with less memory: the same bits."""

from __future__ import annotations

import importlib.util
import math
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from extras import need
from processes import environment
from torch import Tensor, nn

from lfm_torch import LFMWarning
from lfm_torch.comparison.jobs import blocks, pieces
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import Block, Reduction
from lfm_torch.comparison.result import Comparison
from lfm_torch.comparison.run import compare
from lfm_torch.measures.table import MEASURES
from lfm_torch.representations.checkpoints import Checkpoints
from lfm_torch.representations.fingerprints import model_digest

OPTIONS: dict[str, Any] = {"n_basis": 8, "n_neighbors": 12, "measures": ["lfm", "overlap", "heat", "linear_cka"]}
LAYERS = ["one", "two"]


class Net(nn.Module):
    def __init__(self, slope: float = 1.0) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 5)
        self.slope = slope

    def forward(self, x: Tensor) -> Tensor:
        return self.two((self.slope * self.one(x)).tanh())


def probe(seed: int = 0) -> Tensor:
    return torch.randn(90, 4, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    directory = tmp_path / "runs"
    directory.mkdir()
    for seed in range(6):
        torch.manual_seed(seed)
        torch.save(Net().state_dict(), directory / f"model_seed_{seed}.pt")
    return directory


def compared(runs: Path, store: Path | None = None, **options: Any) -> Comparison:
    source = Checkpoints(runs, options.pop("model", Net), options.pop("data", probe()), layers=LAYERS)
    return compare(source, store=store, **(OPTIONS | options))


def assert_same_bits(a: Comparison, b: Comparison) -> None:
    assert a.items == b.items
    for name in a.measures:
        assert a.matrix(name).equal(b.matrix(name)), name
        assert a.chance[name].equal(b.chance[name]), name


@pytest.fixture
def worked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """The tasks that were done."""
    done: list[Any] = []
    run_task = pieces.run_task

    def counted(job: pieces.Job, task: Any) -> Any:
        done.append(task)
        return run_task(job, task)

    monkeypatch.setattr("lfm_torch.comparison.jobs.engines.run_task", counted)
    yield done
    done.clear()


def test_a_second_run_does_nothing_and_a_new_checkpoint_only_its_pairs(
    runs: Path, tmp_path: Path, worked: list[Any]
) -> None:
    new = runs / "model_seed_5.pt"
    content = new.read_bytes()
    new.unlink()
    without = compared(runs, tmp_path / "store")
    worked.clear()
    assert_same_bits(without, compared(runs, tmp_path / "store"))
    assert worked == []
    new.write_bytes(content)
    grown = compared(runs, tmp_path / "store")
    assert [task.checkpoint for task in worked if isinstance(task, Reduction)] == ["model_seed_5"]
    blocks = [task for task in worked if isinstance(task, Block)]
    pairs = [(task.kind, task.x.keys[i], task.y.keys[j]) for task in blocks for i in task.rows for j in task.columns]
    # for maps and for points: two layers against themselves and the ten others
    assert len({(kind, *sorted(keys)) for kind, *keys in pairs}) == 2 * (2 * 10 + 3)
    assert_same_bits(grown, compared(runs))
    worked.clear()
    compared(runs, tmp_path / "store", measures=["heat", "lfm"])
    assert worked == []


@pytest.mark.parametrize(
    "changed",
    [
        {"n_basis": 7},
        {"n_neighbors": 13},
        {"metric": "euclidean"},
        {"weights": "binary"},
        {"data": probe(1)},
        {"model": lambda: Net(slope=2.0)},
    ],
)
def test_a_changed_setting_never_meets_an_old_result(runs: Path, tmp_path: Path, changed: dict[str, Any]) -> None:
    first = compared(runs, tmp_path / "store")
    second = compared(runs, tmp_path / "store", **changed)
    assert_same_bits(second, compared(runs, **changed))
    assert not second.matrix("heat").equal(first.matrix("heat"))


def test_changed_weights_are_another_checkpoint(runs: Path, tmp_path: Path) -> None:
    compared(runs, tmp_path / "store")
    torch.manual_seed(77)
    torch.save(Net().state_dict(), runs / "model_seed_2.pt")
    assert_same_bits(compared(runs, tmp_path / "store"), compared(runs))


def test_code_of_the_model_is_part_of_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for factor in (1, 2):
        module = tmp_path / f"edited{factor}.py"
        module.write_text(f"import torch\nclass Net(torch.nn.Linear):\n    def forward(self, x): return {factor} * x\n")
        spec = importlib.util.spec_from_file_location("edited", module)
        assert spec is not None
        assert spec.loader is not None
        edited = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, "edited", edited)
        spec.loader.exec_module(edited)
        digests.add(model_digest(edited.Net(2, 2)))
    assert len(digests) == 2
    assert model_digest(Net()) == model_digest(Net())  # not of the weights
    assert model_digest(Net()) != model_digest(Net(slope=3.0))


def test_bits_depend_neither_on_threads_nor_memory_nor_order(
    runs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    wanted = compared(runs)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert_same_bits(compared(runs), wanted)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("lfm_torch.comparison.jobs.memory.cache_bytes", lambda budget, reserved: 1)
    assert_same_bits(compared(runs, tmp_path / "store"), wanted)
    given = {name: Checkpoints(runs, Net, probe(), layers=LAYERS)[name] for name in wanted.finals}
    backwards = compare(dict(reversed(given.items())), **OPTIONS)
    assert backwards.matrix("lfm").flip(0, 1).equal(_layers_flipped(wanted.matrix("lfm")))


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64, torch.float32)])
def test_the_value_of_a_pair_depends_on_the_pair_alone(
    dtypes: tuple[torch.dtype, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every measure, in blocks of other sizes, among other representations, and partly from a store."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(70, 5, generator=generator)
    given = {
        f"{k}": (base + 0.3 * k**0.5 * torch.randn(70, 5, generator=generator)).to(dtypes[k % len(dtypes)])
        for k in range(14)
    }
    given["copy of 3"] = given["3"].clone()
    options: dict[str, Any] = {"n_basis": 7, "n_neighbors": 12, "measures": list(MEASURES)}
    wanted = compare(given, **options)
    few = {name: given[name] for name in ("7", "copy of 3", "1", "12", "3")}
    in_few = compare(few, store=tmp_path / "store", **options)
    monkeypatch.setattr(blocks, "_COLUMNS", {"cpu": 3 * 7})
    monkeypatch.setattr(blocks, "_STATES", 2)
    monkeypatch.setattr(blocks, "_SQUARE", 2)
    smaller, grown = compare(given, **options), compare(given, store=tmp_path / "store", **options)
    order = [item.checkpoint for item in wanted.items]
    places = [order.index(item.checkpoint) for item in in_few.items]
    for name in MEASURES:
        assert smaller.matrix(name).equal(wanted.matrix(name)), name
        assert grown.matrix(name).equal(wanted.matrix(name)), name
        of_few = wanted.matrix(name)[places][:, places]
        # a matrix is as precise as the most precise of what is compared
        assert in_few.matrix(name).equal(of_few.to(in_few.matrix(name).dtype)), name


def _layers_flipped(matrix: Tensor) -> Tensor:
    # the layers of a checkpoint keep their order when the checkpoints are turned round
    n = len(matrix)
    return matrix.view(n // 2, 2, n // 2, 2).flip(1, 3).reshape(n, n)


def test_copies_of_a_checkpoint_share_its_pieces(runs: Path, tmp_path: Path, worked: list[Any]) -> None:
    (runs / "copy.pt").write_bytes((runs / "model_seed_0.pt").read_bytes())
    comparison = compared(runs, tmp_path / "store", measures=["lfm"])
    assert len(Store(tmp_path / "store").ls()) == 2 * 6
    assert_same_bits(comparison, compared(runs, measures=["lfm"]))


PROGRAM = """
    import sys, torch
    from test_jobs import LAYERS, OPTIONS, Net, probe
    from lfm_torch.representations.checkpoints import Checkpoints
    from lfm_torch.comparison.run import compare

    runs, store, out = sys.argv[1:4]
    options = {"engine": sys.argv[4]} if len(sys.argv) > 4 else {}
    data = probe()
    if len(sys.argv) > 5:
        data[7], options["nonfinite"] = float("nan"), sys.argv[5]
    comparison = compare(Checkpoints(runs, Net, data, layers=LAYERS), store=store, **OPTIONS, **options)
    import os
    if os.environ.get("RANK", "0") == "0":
        comparison.save(out)
"""


def program(tmp_path: Path) -> Path:
    script = tmp_path / "program.py"
    script.write_text(textwrap.dedent(PROGRAM))
    return script


def test_killed_at_random_moments_it_ends_with_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    script = program(tmp_path)
    undisturbed = compared(runs).save(tmp_path / "undisturbed.csv").read_bytes()
    command = [sys.executable, str(script), str(runs), str(tmp_path / "store"), str(tmp_path / "out.csv")]
    started = time.monotonic()
    subprocess.run([*command[:3], str(tmp_path / "dry"), str(tmp_path / "dry.csv")], env=environment(), check=True)
    seconds = time.monotonic() - started
    chance = random.Random(0)
    for _ in range(2):
        with subprocess.Popen(command, env=environment()) as running:
            # most of the time is start-up: kill in what follows it
            time.sleep(seconds * chance.uniform(0.6, 1.0))
            running.send_signal(signal.SIGKILL)
    assert Store(tmp_path / "store").verify() == []
    subprocess.run(command, env=environment(), check=True)
    assert (tmp_path / "out.csv").read_bytes() == undisturbed


def test_two_processes_on_gloo_give_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    script = program(tmp_path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, str(script), str(runs), str(tmp_path / "store"), str(tmp_path / "out.csv"), "torch", "drop"]
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)
    data = probe()
    data[7] = math.nan
    with pytest.warns(LFMWarning, match="1 of 90 samples are left out everywhere"):
        wanted = compared(runs, data=data, nonfinite="drop")
    assert (tmp_path / "out.csv").read_bytes() == wanted.save(tmp_path / "one.csv").read_bytes()


@pytest.mark.slow
def test_a_local_ray_gives_the_same_bytes(runs: Path, tmp_path: Path) -> None:
    need("ray")
    folder = tmp_path / "a folder with spaces"
    folder.mkdir()
    script, inherited = program(folder), environment()
    # the workers learn where modules are from the process that compares, not from the environment
    found = inherited.pop("PYTHONPATH").split(os.pathsep)
    (folder / "model_of_the_user.py").write_text("from test_jobs import Net as UsersNet\n")
    importing = f"import sys\nsys.path[:0] = {[str(folder), *found]}\nfrom model_of_the_user import UsersNet\n"
    script.write_text(importing + script.read_text().replace("runs, Net,", "runs, UsersNet,"))
    command = [sys.executable, str(script), str(runs), str(folder / "store"), str(folder / "out.csv"), "ray"]
    subprocess.run(command, env=inherited, check=True, timeout=180)
    assert (folder / "out.csv").read_bytes() == compared(runs).save(tmp_path / "one.csv").read_bytes()


def test_a_failing_disk_keeps_what_was_finished(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, written = Store.write, []

    def full(store: Store, key: str, *rest: Any) -> None:
        if len(written) >= 7:
            raise OSError(28, "No space left on device")
        write(store, key, *rest)
        written.append(key)

    with monkeypatch.context() as patched:
        patched.setattr(Store, "write", full)
        with pytest.raises(OSError, match="No space left"):
            compared(runs, tmp_path / "store")
    store = Store(tmp_path / "store")
    assert {piece.key for piece in store.ls()} == set(written)
    assert store.verify() == []
    assert_same_bits(compared(runs, tmp_path / "store"), compared(runs))


def test_blocks_without_room_are_made_smaller_and_then_reported(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = compared(runs)
    values = pieces._map_values

    def little_room(x: Any, y: Any, measures: Any) -> dict[str, Tensor]:
        if len(x.evals) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return values(x, y, measures)

    monkeypatch.setattr(pieces, "_map_values", little_room)
    smaller = compared(runs)
    assert_same_bits(smaller, wanted)
    assert smaller.failures == ()

    def no_room(x: Any, y: Any, measures: Any) -> dict[str, Tensor]:
        raise MemoryError("can't allocate memory")

    monkeypatch.setattr(pieces, "_map_values", no_room)
    with pytest.warns(LFMWarning, match="could not be compared"):
        without = compared(runs, tmp_path / "store")
    assert bool(without.matrix("heat").isnan().all())
    assert without.failures[0].other is not None
    assert without.matrix("linear_cka").equal(wanted.matrix("linear_cka"))
    monkeypatch.setattr(pieces, "_map_values", values)
    assert_same_bits(compared(runs, tmp_path / "store"), wanted)  # what failed was not stored


def test_what_is_used_again_is_not_pruned_for_its_age(runs: Path, tmp_path: Path, worked: list[Any]) -> None:
    compared(runs, tmp_path / "store")
    store = Store(tmp_path / "store")
    for table in ("pieces", "pairs", "numbered", "draws"):
        store._index.execute(f"UPDATE {table} SET used = 100")
    compared(runs, tmp_path / "store")
    before = len(store.ls()), store.n_values()
    store.prune(unused_days=1)
    assert (len(store.ls()), store.n_values()) == before
    worked.clear()
    compared(runs, tmp_path / "store")
    assert worked == []


def test_engines_that_cannot_be_had_say_why(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="store must be a directory that all workers see for engine='ray'"):
        compared(runs, engine="ray")
    with pytest.raises(ValueError, match="started by torchrun"):
        compared(runs, tmp_path / "store", engine="torch")
    with pytest.raises(ValueError, match="'local', 'torch', 'ray', got 'rai'; did you mean 'ray'"):
        compared(runs, tmp_path / "store", engine="rai")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ImportError, match=r'pip install "lfm-torch\[ray\]"'):
        compared(runs, tmp_path / "store", engine="ray")
    with pytest.raises(ValueError, match=r"memory_budget must be at least .* here .* got 1\.0 KiB"):
        compared(runs, memory_budget=1024)
