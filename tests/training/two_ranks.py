"""What each of two processes on gloo does for ``test_distributed.py``; ``python two_ranks.py SCENARIO FOLDER``."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lfm_torch.training import Alert, Event, Monitor

PROBE = torch.randn(80, 6, generator=torch.Generator().manual_seed(7))
OPTIONS = {"n_basis": 8, "reference": "initial"}


class Network(nn.Sequential):
    fails = False

    def __init__(self) -> None:
        torch.manual_seed(3)
        super().__init__(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def forward(self, x: Tensor) -> Tensor:
        if self.fails and not self.training:
            raise RuntimeError("this rank cannot")
        out: Tensor = super().forward(x)
        return out


def train(model: nn.Module, monitor: Monitor | None, steps: int = 4) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(steps):
        # every rank has other data, and so other batch statistics
        model(torch.randn(10, 6, generator=generator)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.step()


def weights(model: nn.Module) -> list[list[float]]:
    return [value.flatten().tolist() for value in model.state_dict().values()]


def ddp(folder: Path) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for background in (None, False, True):
        model = DistributedDataParallel(Network())
        told: list[str] = []

        def tell(event: Event, told: list[str] = told) -> bool:
            told.append(event.name)
            return True

        if background is None:
            train(model, None)
        else:
            with Monitor(
                model, PROBE, layers=["0", "2"], background=background, directory=folder / str(background),
                alerts=[Alert.drift(below=0.999999, layers="2")], on_event=tell, **OPTIONS,
            ) as monitor:  # fmt: skip
                train(model, monitor)
            history = [(p.step, p.scores, [e.name for e in p.events], p.seconds) for p in monitor.history]
            results[f"history {background}"] = history
            results[f"stop {background}"], results[f"told {background}"] = monitor.should_stop, told
        results[f"weights {background}"] = weights(model)
    return results


def failing(folder: Path) -> dict[str, Any]:
    """Rank zero alone fails: in a later measurement, then in a first one."""
    model = Network()
    monitor = Monitor(model, PROBE, layers="0", **OPTIONS)
    monitor.measure(step=0)
    model.fails = dist.get_rank() == 0
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        point = monitor.measure(step=1)
    try:
        Monitor(model, PROBE, layers="0", **OPTIONS).measure(step=0)
    except RuntimeError as error:
        raised = str(error)
    return {"warned": len(caught), "failures": point and point.failures, "raised": raised}


def fsdp(folder: Path) -> dict[str, Any]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    alone = Monitor(Network(), PROBE, layers=["0", "2"], **OPTIONS).measure(step=0)
    model = Network()
    mesh = init_device_mesh("cpu", (2,))
    fully_shard(model[0], mesh=mesh)
    fully_shard(model, mesh=mesh)
    monitor = Monitor(model, PROBE, layers=["0", "2"], **OPTIONS)
    whole = monitor.measure(step=0)
    train(model, monitor, steps=2)
    assert alone is not None
    assert whole is not None
    return {"alone": alone.scores, "whole": whole.scores, "rows": monitor.rows()}


def lightning(folder: Path) -> dict[str, Any]:
    import pytorch_lightning as pl
    from torch.utils.data import DataLoader, TensorDataset

    from lfm_torch.integrations.lightning import LFMCallback

    class Module(pl.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = Network()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            return self(batch[0]).square().mean()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    results: dict[str, Any] = {}
    data = DataLoader(TensorDataset(torch.randn(40, 6, generator=torch.Generator().manual_seed(1))), batch_size=5)
    for watched in (False, True):
        callback = LFMCallback(PROBE, "net.2", **OPTIONS)  # type: ignore[arg-type]
        module = Module()
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", strategy="ddp", devices=2, logger=pl.loggers.CSVLogger(folder),
            callbacks=[callback] if watched else [], enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, data)
        results[f"weights {watched}"] = weights(module)
    trainer.save_checkpoint(folder / "last.ckpt")
    results["points"] = [(p.step, p.scores) for p in callback.history]
    results["metric"] = float(trainer.callback_metrics["lfm/heat/net.2"])
    return results


def torchmetrics(folder: Path) -> dict[str, Any]:
    from lfm_torch.integrations.torchmetrics import LFMSimilarity

    x = torch.randn(60, 5, generator=torch.Generator().manual_seed(2))
    y = x.tanh() @ torch.randn(5, 4, generator=torch.Generator().manual_seed(4))
    metric = LFMSimilarity(["heat", "linear_cka"], n_basis=8)
    # ranks see different numbers of rows
    mine = slice(0, 25) if dist.get_rank() == 0 else slice(25, 60)
    for part_x, part_y in zip(x[mine].split(10), y[mine].split(10), strict=True):
        metric.update(part_x, part_y)
    return {name: float(value) for name, value in metric.compute().items()}


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    scenario.__name__: scenario for scenario in (ddp, failing, fsdp, lightning, torchmetrics)
}


def main() -> None:
    torch.set_num_threads(1)
    folder = Path(sys.argv[2])
    dist.init_process_group("gloo")
    for name in sys.argv[1].split(","):
        (folder / name).mkdir(exist_ok=True)
        found = SCENARIOS[name](folder / name)
        (folder / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
