"""Zero-shot stitching on MNIST: encoder of one network, decoder or classifier head of another, joined by a translator
found from a few known pairs (the stitching task of Moschella et al. 2023 and of the LFM paper, section 5.2).

    python examples/stitching.py --data FOLDER [--anchors 5 10 25 50 100 300] [--seeds 3] [--out DIR]

FOLDER holds `t10k-images-idx3-ubyte.gz` and `t10k-labels-idx1-ubyte.gz`. Two convolutional autoencoders and two
classifiers are trained from different seeds on the first 7,000 images; the correspondence is sought on 2,000 of these,
and reconstruction error and accuracy are measured on the other 3,000.
"""

# %%
from __future__ import annotations

import argparse
import gzip
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch.alignment import Translator

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parent.parent / "shared" / "data"
COUNTS = (0, 5, 10, 25, 50, 100, 300)
METHODS = ("LFM", "anchors", "relative")
N_TRAIN, N_GRAPH = 7000, 2000
WIDTHS = (8, 10, 10, 14, 10, 10, 12, 7)


def load_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    parts = []
    for name, header in (("t10k-images-idx3-ubyte.gz", 16), ("t10k-labels-idx1-ubyte.gz", 8)):
        path = folder / name
        if not path.is_file():
            raise SystemExit(f"no {name} in {folder}; name a folder with --data")
        parts.append(np.frombuffer(gzip.decompress(path.read_bytes()), dtype=np.uint8, offset=header))
    images = torch.from_numpy(parts[0].copy()).view(-1, 1, 28, 28).float() / 255
    return images, torch.from_numpy(parts[1].astype(np.int64))


# %% the networks
def encoder(latent: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, stride=2, padding=1), nn.GELU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.GELU(),
        nn.Flatten(), nn.Linear(32 * 49, latent),
    )  # fmt: skip


def decoder(latent: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(latent, 32 * 49), nn.GELU(), nn.Unflatten(1, (32, 7, 7)),
        nn.ConvTranspose2d(32, 16, 4, stride=2, padding=1), nn.GELU(),
        nn.ConvTranspose2d(16, 1, 4, stride=2, padding=1), nn.Sigmoid(),
    )  # fmt: skip


def train(parts: nn.Sequential, x: Tensor, target: Tensor, loss: nn.Module, *, epochs: int, seed: int) -> nn.Sequential:
    generator = torch.Generator().manual_seed(seed)
    steps = epochs * (len(x) // 128)
    optimizer = torch.optim.AdamW(parts.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator)[: len(x) // 128 * 128].view(-1, 128):
            optimizer.zero_grad()
            loss(parts(x[rows]), target[rows]).backward()
            optimizer.step()
            schedule.step()
    return parts.eval()


def networks(x: Tensor, labels: Tensor, latent: int, epochs: int) -> dict[str, list[nn.Sequential]]:
    found: dict[str, list[nn.Sequential]] = {"autoencoder": [], "classifier": []}
    for seed in range(2):
        torch.manual_seed(seed)
        autoencoder = nn.Sequential(encoder(latent), decoder(latent))
        found["autoencoder"].append(train(autoencoder, x, x, nn.MSELoss(), epochs=epochs, seed=seed))
        head = nn.Sequential(nn.GELU(), nn.Linear(latent, 10))
        classifier = nn.Sequential(encoder(latent), head)
        found["classifier"].append(train(classifier, x, labels, nn.CrossEntropyLoss(), epochs=epochs, seed=seed))
    return found


# %% translators between the two latent spaces
def translators(x: Tensor, y: Tensor, count: int, seed: int, kind: str) -> tuple[dict[str, Translator], lfm.Alignment]:
    generator = torch.Generator().manual_seed(seed)
    shuffle, order = (torch.randperm(len(x), generator=generator) for _ in range(2))
    y = y[shuffle]
    anchors = torch.stack([shuffle, torch.arange(len(x))], 1)[order[:count]]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lfm.LFMWarning)
        alignment = lfm.align(x, y, anchors=anchors if count else None, kind=kind)
    found = {"LFM": alignment.untrusted.translator}
    if count:
        found["anchors"] = lfm.fit_translator(x, y, pairs=anchors, kind=kind)
        found["relative"] = relative_translator(x, y, anchors)
    return found, alignment


def relative_translator(x: Tensor, y: Tensor, anchors: Tensor) -> Translator:
    """Through relative representations: cosines to the anchors of x, and back by the pseudo-inverse of those of y
    (Maiorca et al. 2024, arXiv 2406.15057). Rows of x are taken at their mean length, to make it a linear map.
    """
    origin_x, origin_y = x.mean(0), y.mean(0)
    unit_x, unit_y = (torch.nn.functional.normalize(z, dim=1) for z in (x - origin_x, y - origin_y))
    matrix = unit_x[anchors[:, 0]].T @ torch.linalg.pinv(unit_y[anchors[:, 1]], rtol=0.1).T
    scale = (y - origin_y).norm(dim=1).mean() / ((x - origin_x) @ matrix).norm(dim=1).mean()
    return Translator(scale * matrix, origin_x, origin_y, "relative", len(anchors))


def measure(task: str, parts: nn.Sequential, x: Tensor, labels: Tensor) -> float:
    """Mean squared error of the reconstruction, or accuracy."""
    with torch.no_grad():
        out = parts(x)
    return float((out - x).square().mean() if task == "autoencoder" else (out.argmax(1) == labels).float().mean())


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--anchors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seeds", type=int, default=3, help="choices of anchors")
    parser.add_argument("--latent", type=int, default=64)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--train-images", type=int, default=N_TRAIN)
    parser.add_argument("--graph-images", type=int, default=N_GRAPH, help="images to be matched")
    parser.add_argument("--kind", default="orthogonal", help="of translator: orthogonal, linear, affine, ridge")
    parser.add_argument("--out", type=Path, default=None, help="folder for the picture and the JSON")
    args = parser.parse_args(argv)
    images, labels = load_mnist(args.data)
    start = time.perf_counter()
    rows = slice(args.train_images)
    models = networks(images[rows], labels[rows], args.latent, args.epochs)
    print(f"four networks trained in {time.perf_counter() - start:.0f} s")
    graph, test, test_labels = images[: args.graph_images], images[N_TRAIN:], labels[N_TRAIN:]

    result: dict[str, object] = {}
    pictures: list[tuple[str, Tensor]] = [("input", test[:10])]
    for task, (one, other) in models.items():
        with torch.no_grad():
            x, y = one[0](graph), other[0](graph)
        ceiling = lfm.fit_translator(x, y, kind=args.kind)

        def stitched(translator: Translator, one: nn.Sequential = one, other: nn.Sequential = other) -> nn.Module:
            return lfm.stitch(one[0], other[1], translator)

        unit = "error" if task == "autoencoder" else "accuracy"
        ends = [measure(task, m, test, test_labels) for m in (one, other, stitched(ceiling))]
        print(f"\n{task}, {unit}: own parts {ends[0]:.4f} and {ends[1]:.4f}, all {len(graph)} pairs {ends[2]:.4f}")
        names = ("anchors", "LFM", "worst", "anchors only", "relative", "matched", "confidence", "found")
        head = zip(names, WIDTHS, strict=True)
        print("".join(f"{name:>{width}}" for name, width in head))
        rows = []
        for count in sorted(set(args.anchors)):
            scores: dict[str, list[float]] = {name: [] for name in METHODS}
            seen = []
            for seed in range(args.seeds):
                found, alignment = translators(x, y, count, seed, args.kind)
                for name, translator in found.items():
                    scores[name].append(measure(task, stitched(translator), test, test_labels))
                moved = alignment.untrusted.translator(x)
                hits = lfm.knn(moved, y, n_neighbors=1).indices[:, 0] == torch.arange(len(x))
                seen.append((float(hits.float().mean()), alignment.confidence, alignment.found))
                if task == "autoencoder" and seed == 0 and count in (5, 50):
                    with torch.no_grad():
                        pictures += [(f"{n}, {count}", stitched(t)(test[:10])) for n, t in found.items()]
            worst = max if task == "autoencoder" else min
            row: dict[str, float] = {"count": count, **{name: float(np.mean(v)) for name, v in scores.items() if v}}
            row |= {"worst": worst(scores["LFM"]), "matched": float(np.mean([s[0] for s in seen]))}
            row |= {"confidence": float(np.mean([s[1] for s in seen])), "found": sum(s[2] for s in seen)}
            rows.append(row)
            print(
                f"{count:>8}{row['LFM']:>10.4f}{row['worst']:>10.4f}"
                + (f"{row['anchors']:>14.4f}{row['relative']:>10.4f}" if count else f"{'-':>14}{'-':>10}")
                + f"{row['matched']:>10.3f}{row['confidence']:>12.3f}{row['found']:>5}/{args.seeds}"
            )
        result[task] = {"own": ends[:2], "all pairs": ends[2], "rows": rows}
        if task == "autoencoder":
            with torch.no_grad():
                pictures += [("all pairs", stitched(ceiling)(test[:10])), ("own decoder", one(test[:10]))]
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(pictures, args.out / "stitching.png")
        (args.out / "stitching.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def draw(rows: list[tuple[str, Tensor]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(rows), 1, figsize=(6.0, 0.62 * len(rows)), constrained_layout=True)
    for axis, (name, pictures) in zip(axes, rows, strict=True):
        axis.imshow(torch.cat(list(pictures.squeeze(1)), 1).numpy(), cmap="gray_r", vmin=0, vmax=1)
        axis.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
        axis.set(xticks=[], yticks=[])
        for side in axis.spines.values():
            side.set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# %%
if __name__ == "__main__":
    main()
