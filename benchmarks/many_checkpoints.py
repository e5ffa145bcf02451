"""Checkpoints of real training runs for bench_compare: small CNNs on handwritten digits, by seed and epoch."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn

from lfm_torch.cli.demo import N_TRAINING, DigitsCNN, digits

N_PROBE = 2000


def probe() -> Tensor:
    """2,000 inputs no network is trained on: the held-out digits, then all of them moved by one pixel."""
    images, _ = digits()
    held_out = images[N_TRAINING:]
    moved = [torch.roll(images, shift, dims) for shift, dims in ((1, 2), (-1, 3))]
    return torch.cat([held_out, *moved])[:N_PROBE]


def train(directory: Path, n_runs: int, n_epochs: int) -> None:
    """Save ``seed*/epoch=*.pt`` for every epoch of every run that is not there yet."""
    images, labels = digits()
    images, labels = images[:N_TRAINING], labels[:N_TRAINING]
    for seed in range(n_runs):
        folder = directory / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / f"epoch={n_epochs - 1}.pt").exists():
            continue
        torch.manual_seed(seed)
        network = DigitsCNN()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        for epoch in range(n_epochs):
            order = torch.randperm(N_TRAINING)
            for batch in order.split(100):
                loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            torch.save(network.state_dict(), folder / f"epoch={epoch}.pt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--epochs", type=int, default=10)
    arguments = parser.parse_args()
    train(arguments.directory, arguments.runs, arguments.epochs)
