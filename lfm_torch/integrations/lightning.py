"""A callback for Lightning, under both of its names (``lightning`` and ``pytorch_lightning``)."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lfm_torch.integrations._options import check_figures, check_intervals
from lfm_torch.representations.layers import Layers
from lfm_torch.representations.probe import is_sharded
from lfm_torch.training import Monitor, MonitorOptions, Point, metrics_of
from lfm_torch.training.distributed import is_rank_zero, world_size
from lfm_torch.training.tracker import Reference

if TYPE_CHECKING:
    from typing_extensions import Unpack


def _callback_classes() -> tuple[Any, ...]:
    # both where both are installed: the trainer may be of either
    found = [name for name in ("lightning", "pytorch_lightning") if find_spec(name) is not None]
    if not found:
        raise ImportError('the Lightning callback needs Lightning: pip install "lfm-torch[lightning]"')
    modules = ["lightning.pytorch" if name == "lightning" else name for name in found]
    return tuple(import_module(name).Callback for name in modules)


class LFMCallback(*_callback_classes()):  # type: ignore[misc]
    """Logs how similar layers are to a reference, on a fixed probe set, while a Trainer trains.

    Scalars ``lfm/<measure>/<layer>`` go to every logger of the Trainer and to ``trainer.callback_metrics``, so that
    EarlyStopping and ModelCheckpoint can watch them; at the end the history and its figures are written, and the
    figures handed to TensorBoard, Weights & Biases and MLflow. The history is part of every checkpoint: a resumed
    training continues the curve. The training itself is left as it is, bit for bit, see :class:`Monitor`.

    Args:
        probe: Inputs that the LightningModule (or its part ``module``) is called with, as in :func:`extract`.
        layers: Layers of it, as in :func:`extract`.
        every_n_epochs: Measure at the end of every so many epochs; the default is 1.
        every_n_steps: Measure every so many optimizer steps instead.
        reference: "previous", "initial", "best" (by ``monitor``), a checkpoint file, a module, representations.
        monitor: For ``reference="best"``: the logged metric that says which is best, smallest unless ``mode="max"``.
        module: Dotted name of the part of the LightningModule to call; None for all of it.
        dirpath: Where files go; None for the folder ``lfm`` in the Trainer's log directory.
        figures: Draw figures at the end of the training.
        **options: ``measures``, ``alerts``, ``on_event``, ``on_error``, ``pooling``, ``batch_size``, ``n_neighbors``,
            ``n_basis``, ``metric``, ``weights``, ``mode``, ``background``: see :class:`Monitor`.

    Raises:
        ImportError: figures without matplotlib.
        ValueError: options that contradict each other; the others are judged when training starts.

    Example:
        >>> import torch
        >>> callback = LFMCallback(torch.randn(500, 1, 8, 8), layers="model.layers.*", reference="initial")
        >>> # Trainer(callbacks=[callback], ...).fit(module, loader)
    """

    def __init__(
        self,
        probe: Any,
        layers: Layers,
        *,
        every_n_epochs: int | None = None,
        every_n_steps: int | None = None,
        reference: Reference = "previous",
        monitor: str | None = None,
        module: str | None = None,
        dirpath: str | Path | None = None,
        figures: bool = True,
        **options: Unpack[MonitorOptions],
    ) -> None:
        super().__init__()
        check_figures(figures)
        self.every_n_epochs, self.every_n_steps = check_intervals(every_n_epochs, every_n_steps)
        if (reference == "best") != (monitor is not None):
            raise ValueError(f"monitor must name a metric for reference='best', and only then, got {monitor!r}")
        self.probe, self.layers, self.reference = probe, layers, reference
        self.monitor, self.module, self.dirpath, self.figures = monitor, module, dirpath, figures
        self.options = options
        self.watcher: Monitor | None = None
        self._restored: dict[str, Any] | None = None
        self._logged = 0

    @property
    def history(self) -> list[Point]:
        """The points so far."""
        return [] if self.watcher is None else self.watcher.history

    @property
    def state_key(self) -> str:
        """Where the state lies in a checkpoint: callbacks with other layers or references have other places."""
        kind = self.reference if isinstance(self.reference, (str, Path)) else type(self.reference).__name__
        return f"LFMCallback[layers={self.layers!r}, reference={kind!s}, module={self.module}]"

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Measure the state before training; of a resumed one the history goes on."""
        # a property that talks to the other ranks: read on all of them
        log_dir = trainer.log_dir or trainer.default_root_dir
        self.watcher = Monitor(
            self._model(trainer, pl_module),
            self.probe,
            layers=self.layers,
            reference=self.reference,
            directory=Path(log_dir) / "lfm" if self.dirpath is None else self.dirpath,
            **self.options,
        )
        if self._restored is not None:
            self.watcher.load_state_dict(self._restored)
        self._logged = len(self.history)
        if not self.history and self.monitor is None:
            self._measure(trainer, trainer.current_epoch)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        """Measure where the interval in optimizer steps is full; micro-batches in between count nothing."""
        if self.every_n_steps is None or trainer.global_step % self.every_n_steps or self.watcher is None:
            return
        if self.watcher.last_step != trainer.global_step:
            self._measure(trainer, trainer.current_epoch, pl_module, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure where the interval in epochs is full."""
        if self.every_n_epochs is not None and (trainer.current_epoch + 1) % self.every_n_epochs == 0:
            self._measure(trainer, trainer.current_epoch + 1, pl_module, on_step=False, on_epoch=True)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Write history and figures, and hand the figures to the loggers."""
        if self.watcher is None:
            return
        self.watcher.flush()
        self._log(trainer)
        written = self.watcher.save(figures=self.figures)
        self.watcher.close()
        for path in written:
            if path.suffix == ".png":
                for logger in trainer.loggers:
                    log_figure(logger, f"lfm/{path.stem}", path, trainer.global_step)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Keep the history that there is."""
        if self.watcher is not None:
            self.watcher.abandon()

    def state_dict(self) -> dict[str, Any]:
        """State for the Trainer's checkpoint; called on all ranks."""
        if self.watcher is None:
            return self._restored or {}
        self.watcher.flush()
        return self.watcher.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the training starts."""
        self._restored = state_dict

    def _model(self, trainer: Any, pl_module: Any) -> nn.Module:
        wrapped: nn.Module = trainer.strategy.model
        if wrapped is not None and is_sharded(wrapped):
            if self.module is not None:
                raise ValueError(f"module must be None under FSDP, which runs as a whole, got {self.module!r}")
            return wrapped
        module: nn.Module = pl_module
        return module if self.module is None else module.get_submodule(self.module)

    def _measure(self, trainer: Any, epoch: int, pl_module: Any = None, **when: bool) -> None:
        assert self.watcher is not None
        score = None
        if self.monitor is not None:
            if self.monitor not in trainer.callback_metrics:
                known = ", ".join(map(repr, sorted(trainer.callback_metrics))) or "none"
                raise ValueError(f"monitor must be a metric that was logged, {known}, got {self.monitor!r}")
            score = float(trainer.callback_metrics[self.monitor])
        self.watcher.measure(step=trainer.global_step, epoch=epoch, score=score)
        metrics = self._log(trainer)
        if metrics and pl_module is not None:
            pl_module.log_dict(metrics, logger=False, batch_size=1, sync_dist=world_size() > 1, **when)
        if self.watcher.should_stop:
            trainer.should_stop = True

    def _log(self, trainer: Any) -> dict[str, float]:
        """Hand points that are new to the loggers; returns the metrics of the newest."""
        metrics: dict[str, float] = {}
        for point in self.history[self._logged :]:
            metrics = metrics_of(point)
            for logger in trainer.loggers if metrics and is_rank_zero() else ():
                logger.log_metrics(metrics, step=point.step)
        self._logged = len(self.history)
        return metrics


def log_figure(logger: Any, tag: str, path: Path, step: int) -> bool:
    """Hand a PNG to a logger through its public methods; False where it has none for images."""
    if hasattr(logger, "log_image"):  # Weights & Biases
        logger.log_image(key=tag, images=[str(path)], step=step)
        return True
    experiment: Any = getattr(logger, "experiment", None)
    if hasattr(experiment, "add_image"):  # TensorBoard
        from matplotlib.image import imread

        experiment.add_image(tag, imread(path), step, dataformats="HWC")
        return True
    if hasattr(experiment, "log_artifact") and hasattr(logger, "run_id"):  # MLflow
        experiment.log_artifact(logger.run_id, str(path), "lfm")
        return True
    return False
