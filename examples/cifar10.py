"""Real networks on real images, shared by the examples: seven CIFAR-10 networks that differ in their seed only,
published with the LFM paper.

The folder holds `cifar10_probe.npz` (images uint8 [n, 32, 32, 3], labels) or CIFAR-10's own binary batch
`test_batch.bin`, and state dicts `cifar10_cnn/model_seed_*.pth` of the network below.
"""

# %% what the networks look like
from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch.representations.state_dicts import load_weights

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parent.parent / "shared" / "data"
LAYERS = [f"layers.{i}" for i in range(8)]


class CifarCNN(nn.Module):
    """Eight convolutions with batch norm and ReLU, no padding, then global average pooling and a linear head."""

    def __init__(self) -> None:
        super().__init__()
        shapes = [(3, 16, 3, 1), (16, 16, 3, 1), (16, 32, 3, 2), (32, 32, 3, 1)]
        shapes += [(32, 32, 3, 1), (32, 64, 3, 2), (64, 64, 3, 1), (64, 64, 1, 1)]
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Conv2d(i, o, kernel, stride), nn.BatchNorm2d(o), nn.ReLU())
            for i, o, kernel, stride in shapes
        )
        self.fc = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


# %% real images and real checkpoints
def load_images(folder: Path, rows: slice) -> tuple[Tensor, Tensor]:
    """Images of the probe set, normalised as in training, and their labels."""
    if not folder.is_dir():
        raise SystemExit(f"no folder {folder}; name one with --data")
    probe, batch = folder / "cifar10_probe.npz", folder / "test_batch.bin"
    if probe.exists():
        with np.load(probe) as file:
            images, labels = file["images"].transpose(0, 3, 1, 2), file["labels"]
    elif batch.exists():
        records = np.fromfile(batch, dtype=np.uint8).reshape(-1, 3073)
        images, labels = records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0]
    else:
        raise SystemExit(f"no cifar10_probe.npz or test_batch.bin in {folder}; name a folder with --data")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)))
    x = torch.from_numpy(np.ascontiguousarray(images[rows])).float() / 255
    return (x - mean) / std, torch.from_numpy(labels[rows].astype(np.int64))


def load_networks(folder: Path, count: int | None = None) -> dict[str, CifarCNN]:
    """The first `count` networks by name, in eval mode."""
    paths = sorted((folder / "cifar10_cnn").glob("*.pth"))[:count]
    if not paths:
        raise SystemExit(f"no checkpoints cifar10_cnn/*.pth in {folder}; name a folder with --data")
    networks = {}
    for path in paths:
        networks[path.stem] = CifarCNN().eval()
        load_weights(networks[path.stem], path)
    return networks
