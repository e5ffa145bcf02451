"""Watch a network's layers while it learns handwritten digits: one callback in a Lightning Trainer.

    python examples/callback_lightning.py [--out FOLDER] [--epochs 8]
    tensorboard --logdir FOLDER

Two callbacks compare each layer after every epoch, one to the epoch before and one to the untrained network. Scalars
and figures go to TensorBoard; `FOLDER/.../lfm-initial/curves.png` is the same as a picture.
"""

# %% the data and the network of `lfm-torch demo`
from __future__ import annotations

import argparse
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lfm_torch.cli.demo import N_TRAINING, DigitsCNN, digits
from lfm_torch.integrations.lightning import LFMCallback
from lfm_torch.training import Alert


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.model = DigitsCNN()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: Any, _index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch: Any, _index: int) -> None:
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main(argv: list[str] | None = None) -> dict[str, list[tuple[float | None, dict[str, float]]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lightning-output"))
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args(argv)
    images, labels = digits()
    training = TensorDataset(images[:N_TRAINING], labels[:N_TRAINING])
    held_out = TensorDataset(images[N_TRAINING:], labels[N_TRAINING:])

    # %% the callbacks: the probe is what the network never trains on
    callbacks = {
        reference: LFMCallback(
            images[N_TRAINING:],
            layers="model.layers.*",
            reference=reference,
            dirpath=args.out / f"lfm-{reference}",
            # ends the training once no layer moves any more
            alerts=[Alert.settled(above=0.99, stop=True)] if reference == "previous" else [],
        )
        for reference in ("previous", "initial")
    }

    # %% everything else is a training as always
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        trainer = pl.Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            logger=pl.loggers.TensorBoardLogger(args.out, name="digits"),
            callbacks=[callbacks["previous"], callbacks["initial"]],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=10,
        )
        trainer.fit(
            Classifier(), DataLoader(training, batch_size=64, shuffle=True), DataLoader(held_out, batch_size=600)
        )

    # %% the curves, as numbers
    print(f"accuracy {float(trainer.callback_metrics['accuracy']):.3f} after {trainer.current_epoch} epochs\n")
    for reference, callback in callbacks.items():
        layers = list(callback.history[0].scores)
        print(f"heat overlap to {'the epoch before' if reference == 'previous' else 'the untrained network'}")
        print(f"{'epoch':>7}" + "".join(f"{layer.removeprefix('model.'):>11}" for layer in layers))
        for point in callback.history[1:]:
            print(f"{point.epoch:>7}" + "".join(f"{point.scores[layer]['heat']:>11.3f}" for layer in layers))
        print()
    return {
        name: [
            (point.epoch, {layer: s.get("heat", float("nan")) for layer, s in point.scores.items()})
            for point in c.history
        ]
        for name, c in callbacks.items()
    }


# %%
if __name__ == "__main__":
    main()
