"""Do the same layers of independently trained networks match best? The layer-matching task of Kornblith et al. (2019)
and of the LFM paper (figure 2), on CIFAR-10 networks trained from different seeds.

    python examples/cifar10_layers.py --data FOLDER [--images 2000] [--flatten]

FOLDER holds `cifar10_probe.npz` (images uint8 [n, 32, 32, 3], labels) or CIFAR-10's own binary batch
`test_batch.bin`, and state dicts `cifar10_cnn/model_seed_*.pth` of the network below.
"""

# %% what the networks look like
from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch.checkpoints import load_weights

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parent.parent / "shared" / "data"
LAYERS = [f"layers.{i}" for i in range(8)]
MEASURES = ("lfm", "overlap", "heat", "linear_cka")


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
def load_images(folder: Path, count: int) -> tuple[Tensor, Tensor]:
    """The first `count` images of the probe set, normalised as in training, and their labels."""
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
    x = torch.from_numpy(np.ascontiguousarray(images[:count])).float() / 255
    return (x - mean) / std, torch.from_numpy(labels[:count].astype(np.int64))


def main(argv: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with images and checkpoints")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--neighbors", type=int, default=300)
    parser.add_argument("--basis", type=int, default=50)
    parser.add_argument(
        "--flatten", action="store_true", help="flatten the feature maps instead of averaging over space"
    )
    parser.add_argument("--models", type=int, default=None, help="use only the first so many checkpoints")
    parser.add_argument("--out", type=Path, default=None, help="folder for the report, the table and a JSON summary")
    args = parser.parse_args(argv)
    if not args.data.is_dir():
        raise SystemExit(f"no folder {args.data}; name one with --data")
    images, labels = load_images(args.data, args.images)
    paths = sorted((args.data / "cifar10_cnn").glob("*.pth"))[: args.models]
    if len(paths) < 2:
        raise SystemExit(f"need at least two checkpoints cifar10_cnn/*.pth in {args.data}, found {len(paths)}")

    # %% one representation per network and layer
    representations = {}
    for path in paths:
        model = CifarCNN()
        load_weights(model, path)
        with torch.no_grad():
            accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
        print(f"{path.stem}: accuracy {accuracy:.3f} on {len(images)} images")
        pooling = "flatten" if args.flatten else "mean"
        representations[path.stem] = lfm.extract(model, images, layers=LAYERS, pooling=pooling)

    # %% every layer of every network against every other
    start = time.perf_counter()
    # linear CKA of flattened maps would form two n x n Gram matrices of up to 14,400 features for each of the pairs
    measures = MEASURES[:3] if args.flatten else MEASURES
    comparison = lfm.compare(representations, measures=measures, n_neighbors=args.neighbors, n_basis=args.basis)
    seconds = time.perf_counter() - start
    found = {name: comparison.layer_matching(name) for name in measures}

    kind = "flattened" if args.flatten else "spatially pooled"
    print(
        f"\n{len(paths)} networks, {len(LAYERS)} layers {kind}, {len(images)} images, {args.neighbors} neighbors, ",
        end="",
    )
    print(f"{args.basis} eigenvectors: {len(comparison.items) ** 2} pairs in {seconds:.1f} s")
    print(f"{'measure':12}{'layer matching':>16}{'same layer':>12}{'other layers':>14}")
    for name, match in found.items():
        print(f"{name:12}{match.accuracy:16.3f}{match.same_layer:12.3f}{match.other_layer:14.3f}")
    accuracies = {name: match.accuracy for name, match in found.items()}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        comparison.report(args.out)
        summary = {"settings": dict(comparison.settings), "seconds": seconds, "layer_matching": accuracies}
        (args.out / "cifar10_layers.json").write_text(json.dumps(summary, indent=1, default=str) + "\n")
    return accuracies


# %%
if __name__ == "__main__":
    main()
