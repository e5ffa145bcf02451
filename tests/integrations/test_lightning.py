"""The Lightning callback, under both names of the package."""

from __future__ import annotations

import copy
import csv
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from extras import need, reason
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lfm_torch.training import Alert

pytest.importorskip("pytorch_lightning", reason=reason("pytorch_lightning"))
pytest.importorskip("matplotlib", reason=reason("matplotlib"))
from lfm_torch.integrations.lightning import LFMCallback, log_figure

PROBE = torch.randn(80, 6, generator=torch.Generator().manual_seed(7))
pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:FutureWarning")


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def pl(request: pytest.FixtureRequest) -> ModuleType:
    need(request.param)
    return import_module(request.param)


def module_of(pl: ModuleType) -> Any:
    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 3))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Any, _index: int) -> Tensor:
            loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
            self.log("loss", loss, on_epoch=True)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=1e-2)

    torch.manual_seed(3)
    return Classifier()


def loader() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(60, 6, generator=generator)
    return DataLoader(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=10, shuffle=True)


def fit(pl: ModuleType, path: Path, *callbacks: Any, ckpt_path: Any = None, module: Any = None, **options: Any) -> Any:
    module = module_of(pl) if module is None else module
    trainer = pl.Trainer(
        **{"max_epochs": 3, "logger": pl.loggers.CSVLogger(path), "enable_checkpointing": False, **options},
        accelerator="cpu",
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        num_sanity_val_steps=0,
    )
    torch.manual_seed(11)
    trainer.fit(module, loader(), ckpt_path=ckpt_path)
    return trainer


def callback_of(**options: Any) -> LFMCallback:
    return LFMCallback(PROBE, **{"layers": ["net.0", "net.2"], "n_basis": 8, "reference": "initial", **options})


@pytest.mark.parametrize("options", [{}, {"accumulate_grad_batches": 4}, {"precision": "bf16-mixed"}])
def test_weights_are_the_same_bit_for_bit(tmp_path: Path, pl: ModuleType, options: dict[str, Any]) -> None:
    states = []
    for watched in (False, True):
        callbacks = (
            [callback_of(), callback_of(every_n_steps=1, reference="previous", figures=False)] if watched else []
        )
        trainer = fit(pl, tmp_path, *callbacks, **options)
        states.append([*trainer.lightning_module.state_dict().values(), torch.get_rng_state()])
    for alone, together in zip(*states, strict=True):
        assert torch.equal(alone, together)


def test_scalars_files_and_callback_metrics(tmp_path: Path, pl: ModuleType) -> None:
    callback = callback_of(every_n_epochs=2)
    trainer = fit(pl, tmp_path, callback, max_epochs=4)
    assert [(point.epoch, point.step) for point in callback.history] == [(0, 0), (2, 12), (4, 24)]
    newest = callback.history[-1].scores["net.2"]["heat"]
    assert float(trainer.callback_metrics["lfm/heat/net.2"]) == pytest.approx(newest)
    log_dir = Path(trainer.log_dir)
    rows = list(csv.DictReader((log_dir / "metrics.csv").open()))
    logged = {int(row["step"]): float(row["lfm/heat/net.2"]) for row in rows if row.get("lfm/heat/net.2")}
    assert logged == {p.step: pytest.approx(p.scores["net.2"]["heat"]) for p in callback.history[1:]}
    names = {path.name for path in (log_dir / "lfm").iterdir()}
    assert names == {"history.json", "history.csv", "curves.png", "layers.png"}


def test_a_resumed_training_continues_the_curve(tmp_path: Path, pl: ModuleType) -> None:
    whole = callback_of()
    fit(pl, tmp_path, whole, max_epochs=4)
    first, second = callback_of(), callback_of()
    trainer = fit(pl, tmp_path, first, max_epochs=2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    fit(pl, tmp_path, second, max_epochs=4, ckpt_path=tmp_path / "half.ckpt")
    assert [point.step for point in second.history] == [point.step for point in whole.history]
    assert [point.scores for point in second.history[:3]] == [point.scores for point in first.history]
    # still compared to the initial state
    assert second.history[3].scores["net.2"]["heat"] < 0.999


def test_intervals_count_optimizer_steps(tmp_path: Path, pl: ModuleType) -> None:
    callback = callback_of(every_n_steps=2, figures=False)
    fit(pl, tmp_path, callback, accumulate_grad_batches=3, max_epochs=2)
    assert [point.step for point in callback.history] == [0, 2, 4]


def test_best_stop_and_parts(tmp_path: Path, pl: ModuleType) -> None:
    best = callback_of(reference="best", monitor="loss", module="net", layers="2", figures=False)
    stopping = callback_of(alerts=[Alert("heat", below=2.0, name="always", stop=True)], figures=False)
    trainer = fit(pl, tmp_path, best, stopping, max_epochs=5)
    assert trainer.current_epoch == 1
    assert [point.epoch for point in best.history] == [1]
    with pytest.raises(ValueError, match=r"monitor must be a metric that was logged, 'loss'.*got 'val'"):
        fit(pl, tmp_path, callback_of(reference="best", monitor="val"))


def test_early_stopping_can_watch(tmp_path: Path, pl: ModuleType) -> None:
    watch = callback_of(reference="previous", figures=False)
    stop = pl.callbacks.EarlyStopping(
        "lfm/heat/net.2", mode="max", stopping_threshold=0.0, check_on_train_epoch_end=True
    )
    trainer = fit(pl, tmp_path, watch, stop, max_epochs=5)
    assert trainer.current_epoch < 5


def test_an_exception_leaves_history_and_module(tmp_path: Path, pl: ModuleType) -> None:
    class Breaking(pl.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if trainer.current_epoch == 1:
                raise RuntimeError("elsewhere")

    module, callback = module_of(pl), callback_of(dirpath=tmp_path / "here")
    with pytest.raises(RuntimeError, match="elsewhere"):
        fit(pl, tmp_path, callback, Breaking(), module=module)
    assert (tmp_path / "here" / "history.json").exists()
    assert len(callback.history) == 3
    assert not any(part._forward_hooks for part in module.modules())


def test_compiled_modules(tmp_path: Path, pl: ModuleType) -> None:
    plain, compiled = callback_of(figures=False), callback_of(figures=False)
    fit(pl, tmp_path, plain, max_epochs=1)
    module = module_of(pl)
    module.net = torch.compile(module.net, backend="eager")
    fit(pl, tmp_path, compiled, max_epochs=1, module=module)
    assert plain.history[0].scores == compiled.history[0].scores


class Recorder:
    """Stands in for the loggers that need a service: the public methods that are called."""

    def __init__(self, *names: str) -> None:
        self.calls: list[str] = []
        for name in names:
            setattr(self, name, lambda *a, _name=name, **k: self.calls.append(_name))


def test_figures_go_where_they_are_taken(tmp_path: Path) -> None:
    from matplotlib.image import imsave

    path = tmp_path / "curves.png"
    imsave(path, torch.rand(4, 5).numpy())
    images, board, flow, plain = Recorder("log_image"), Recorder(), Recorder(), Recorder()
    board.experiment, flow.experiment, flow.run_id = Recorder("add_image"), Recorder("log_artifact"), "1"  # type: ignore[attr-defined]
    assert [log_figure(logger, "lfm/curves", path, 3) for logger in (images, board, flow, plain)] == [True] * 3 + [
        False
    ]
    assert images.calls == ["log_image"]
    assert board.experiment.calls == ["add_image"]  # type: ignore[attr-defined]
    assert flow.experiment.calls == ["log_artifact"]  # type: ignore[attr-defined]


def test_tensorboard(tmp_path: Path, pl: ModuleType) -> None:
    need("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = callback_of()
    fit(pl, tmp_path, callback, max_epochs=2, logger=pl.loggers.TensorBoardLogger(tmp_path))
    events = EventAccumulator(str(next(tmp_path.rglob("events*")).parent)).Reload()
    assert [event.step for event in events.Scalars("lfm/heat/net.2")] == [6, 12]
    assert set(events.Tags()["images"]) == {"lfm/curves", "lfm/layers"}


def test_what_it_refuses() -> None:
    with pytest.raises(ValueError, match="every_n_epochs or every_n_steps must be None"):
        callback_of(every_n_epochs=1, every_n_steps=2)
    with pytest.raises(ValueError, match="every_n_steps must be between 1"):
        callback_of(every_n_steps=0)
    with pytest.raises(ValueError, match="monitor must name a metric for reference='best', and only then, got None"):
        callback_of(reference="best")
    assert callback_of().state_key != callback_of(reference="previous").state_key
    copy.deepcopy(callback_of())
