"""Real data, offline: three small networks trained on handwritten digits, and their checkpoints."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

SEEDS = (0, 1, 2)
SAVED_EPOCHS = (0, 1, 2, 4, 8, 16)
N_TRAINING = 1197
LAYERS = ("layers.*",)


class DigitsCNN(nn.Module):
    """Four convolutional blocks, global average pooling and a linear classifier, for images ``[n, 1, 8, 8]``."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([_block(1, 16), _block(16, 16), _block(16, 32, stride=2), _block(32, 32)])
        self.fc = nn.Linear(32, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return class scores ``[n, 10]``."""
        for layer in self.layers:
            x = layer(x)
        scores: Tensor = self.fc(x.mean((2, 3)))
        return scores


def _block(channels_in: int, channels_out: int, *, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())


def digits() -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits: 1797 real images ``[n, 1, 8, 8]`` in [0, 1] and their labels.

    Raises:
        ImportError: scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "lfm-torch[demo]"') from error
    bunch = load_digits()
    images = torch.from_numpy(bunch.images).float().unsqueeze(1) / 16
    return images, torch.from_numpy(bunch.target).long()


def probe_images() -> Tensor:
    """Return the 600 digits that the demo's networks never see in training: what its checkpoints are compared on."""
    return digits()[0][N_TRAINING:]


def train(directory: str | Path, *, progress: Callable[[str, int, int], None] | None = None) -> dict[str, float]:
    """Train one network per seed with pytorch-lightning and save ``seed*/epoch=*.ckpt`` below ``directory``.

    Returns:
        Accuracy of each run's last checkpoint on the held-out digits.

    Raises:
        ImportError: pytorch-lightning or scikit-learn is missing.
        KeyboardInterrupt: also where Lightning has turned it into an exit.
    """
    images, labels = digits()
    accuracy = {}
    for done, seed in enumerate(SEEDS):
        if progress is not None:
            progress("training", done, len(SEEDS))
        accuracy[f"seed{seed}"] = _train_one(Path(directory) / f"seed{seed}", seed, images, labels)
    if progress is not None:
        progress("training", len(SEEDS), len(SEEDS))
    return accuracy


def _train_one(directory: Path, seed: int, images: Tensor, labels: Tensor) -> float:
    pl = _lightning()
    directory.mkdir(parents=True, exist_ok=True)
    for old in directory.glob("epoch=*.ckpt"):
        old.unlink()

    class Classifier(pl.LightningModule):  # type: ignore[misc, name-defined, unused-ignore]
        def __init__(self) -> None:
            super().__init__()
            self.model = DigitsCNN()

        def training_step(self, batch: tuple[Tensor, Tensor], _index: int) -> Tensor:
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.Adam(self.parameters(), lr=2e-3)

    class SaveEpochs(pl.Callback):  # type: ignore[misc, name-defined, unused-ignore]
        def on_train_start(self, trainer: Any, module: Any) -> None:
            self._save(trainer, 0)

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            self._save(trainer, trainer.current_epoch + 1)

        def _save(self, trainer: Any, epoch: int) -> None:
            if epoch in SAVED_EPOCHS:
                trainer.save_checkpoint(directory / f"epoch={epoch:02d}.ckpt")

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        module = Classifier()
        dataset = torch.utils.data.TensorDataset(images[:N_TRAINING], labels[:N_TRAINING])
        loader = torch.utils.data.DataLoader(dataset, batch_size=64, shuffle=True)
        trainer = pl.Trainer(
            max_epochs=max(SAVED_EPOCHS),
            accelerator="cpu",
            logger=False,
            callbacks=[SaveEpochs()],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        try:
            trainer.fit(module, loader)
        except SystemExit:
            # Lightning turns Ctrl-C into an exit of its own
            raise KeyboardInterrupt from None
    module.eval()
    with torch.no_grad():
        correct = module.model(images[N_TRAINING:]).argmax(1) == labels[N_TRAINING:]
    return float(correct.float().mean())


def _lightning() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import pytorch_lightning
    except ImportError as error:
        raise ImportError('the demo needs pytorch-lightning: pip install "lfm-torch[demo]"') from error
    # Lightning announces devices and advertises at every fit; its import sets the levels, so this comes after it
    for name in ("pytorch_lightning", "lightning.pytorch", "lightning_fabric", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return pytorch_lightning
