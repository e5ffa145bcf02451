"""A callback for the Trainer of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lfm_torch.integrations._options import check_figures, check_intervals
from lfm_torch.representations.layers import Layers
from lfm_torch.training import Monitor, MonitorOptions, Point, metrics_of
from lfm_torch.training.distributed import is_rank_zero
from lfm_torch.training.tracker import Reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError('LFMTrainerCallback needs transformers: pip install "lfm-torch[transformers]"') from error

STATE_FILE = "lfm_monitor.pt"


class LFMTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Logs how similar layers are to a reference, on a fixed probe set, while a transformers Trainer trains.

    ``callback.attach(trainer)`` adds it and logs ``lfm/<measure>/<layer>`` through ``trainer.log``, and so to
    everything in ``report_to``; added by ``callbacks=[...]`` alone it writes its files only, since the Trainer tells
    its callbacks nothing of itself. State is saved in every checkpoint folder and read back on resuming.

    Args:
        probe: Inputs of the model, as in :func:`extract`: a dict of tensors ("input_ids", "attention_mask").
        layers: Layers of it, as in :func:`extract`.
        every_n_epochs: Measure at the end of every so many epochs; the default is 1.
        every_n_steps: Measure every so many optimizer steps instead.
        reference: "previous", "initial", "best" (by ``monitor``), a checkpoint file, a module, representations.
        monitor: For ``reference="best"``: the logged metric that says which is best, smallest unless ``mode="max"``.
        dirpath: Where files go; None for the folder ``lfm`` in ``output_dir``.
        figures: Draw figures at the end of the training.
        **options: As for :class:`Monitor`; ``pooling="mean"``, "cls" or "last" knows padding by ``attention_mask``.

    Raises:
        ImportError: figures without matplotlib.
        ValueError: options that contradict each other; the others are judged when training starts.
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
        dirpath: str | Path | None = None,
        figures: bool = True,
        **options: Unpack[MonitorOptions],
    ) -> None:
        check_figures(figures)
        self.every_n_epochs, self.every_n_steps = check_intervals(every_n_epochs, every_n_steps)
        if (reference == "best") != (monitor is not None):
            raise ValueError(f"monitor must name a metric for reference='best', and only then, got {monitor!r}")
        self.probe, self.layers, self.reference, self.monitor = probe, layers, reference, monitor
        self.dirpath, self.figures, self.options = dirpath, figures, options
        self.watcher: Monitor | None = None
        self.trainer: Any = None
        self._logged = 0

    def attach(self, trainer: Any) -> LFMTrainerCallback:
        """Add to a Trainer, and log through it."""
        trainer.add_callback(self)
        self.trainer = trainer
        return self

    @property
    def history(self) -> list[Point]:
        """The points so far."""
        return [] if self.watcher is None else self.watcher.history

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure the state before training; of a resumed one the history goes on."""
        directory = Path(args.output_dir) / "lfm" if self.dirpath is None else Path(self.dirpath)
        self.watcher = Monitor(
            kwargs["model"],
            self.probe,
            layers=self.layers,
            reference=self.reference,
            directory=directory,
            **self.options,
        )
        saved = _checkpoint_folder(args, state) / STATE_FILE
        if state.global_step > 0 and saved.exists():
            self.watcher.load_state_dict(torch.load(saved, map_location="cpu", weights_only=True))
        self._logged = len(self.history)
        if not self.history and self.monitor is None:
            self._measure(state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where the interval in optimizer steps is full."""
        if self.every_n_steps is not None and state.global_step % self.every_n_steps == 0:
            self._measure(state, control)

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure where the interval in epochs is full."""
        if self.every_n_epochs is not None and round(state.epoch) % self.every_n_epochs == 0:
            self._measure(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the state into the checkpoint's folder."""
        if self.watcher is None:
            return
        self.watcher.flush()
        folder = _checkpoint_folder(args, state)
        if is_rank_zero() and folder.is_dir():
            torch.save(self.watcher.state_dict(), folder / STATE_FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write history and figures."""
        if self.watcher is None:
            return
        self.watcher.flush()
        self._log()
        self.watcher.save(figures=self.figures)
        self.watcher.close()

    def _measure(self, state: Any, control: Any) -> None:
        assert self.watcher is not None
        score = None
        if self.monitor is not None:
            logged = [entry[self.monitor] for entry in state.log_history if self.monitor in entry]
            if not logged:
                known = sorted({name for entry in state.log_history for name in entry})
                raise ValueError(f"monitor must be a metric that was logged, among {known}, got {self.monitor!r}")
            score = float(logged[-1])
        self.watcher.measure(step=state.global_step, epoch=state.epoch, score=score)
        self._log()
        if self.watcher.should_stop:
            control.should_training_stop = True

    def _log(self) -> None:
        for point in self.history[self._logged :]:
            metrics = metrics_of(point)
            if self.trainer is not None and metrics:
                self.trainer.log(metrics)
        self._logged = len(self.history)


def _checkpoint_folder(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"
