"""Carry labels from one network's space to another's: of the images that the second network saw not one is labelled,
and a few known pairs connect it to the first, whose images are labelled.

    python examples/label_transfer.py --data FOLDER [--anchors 5 10 25 50 100 300] [--layer 7] [--out DIR]

FOLDER is that of `cifar10.py`: `cifar10_probe.npz` and `cifar10_cnn/model_seed_*.pth`. Beside the anchors the
two networks see DIFFERENT images, so that most rows of one space have no partner in the other (--same: all shared).
"""

# %%
from __future__ import annotations

import argparse
import json
import warnings
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from cifar10 import DEFAULT_DATA, load_images, load_networks
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.alignment import relative_representations
from lfm_torch.descriptors import anchor_distances

COUNTS = (5, 10, 25, 50, 100, 300)
METHODS = ("LFM, functions", "LFM + orthogonal", "anchors, orthogonal", "relative")


def features(folder: Path, images: Tensor, layer: int, models: int | None) -> list[Tensor]:
    name = f"layers.{layer}"
    return [lfm.extract(model, images, layers=[name])[name] for model in load_networks(folder, models).values()]


def nearest_class(queries: Tensor, known: Tensor, labels: Tensor, n_neighbors: int = 20) -> Tensor:
    """Majority among the nearest labelled rows."""
    votes = labels[lfm.knn(queries, known, n_neighbors=n_neighbors, metric="angular").indices]
    return torch.nn.functional.one_hot(votes, 10).sum(1).argmax(1)


# %% one ordered pair of networks: labels known on x, wanted on y
def run_pair(x: Tensor, y: Tensor, labels_x: Tensor, labels_y: Tensor, anchors: Tensor) -> dict[str, float]:
    x, y = x - x.mean(0), y - y.mean(0)

    def accuracy(predicted: Tensor) -> float:
        return float((predicted == labels_y).float().mean())

    # through the functional map alone: indicator functions of the classes, carried over
    f_x, f_y = (anchor_distances(z, rows) for z, rows in ((x, anchors[:, 0]), (y, anchors[:, 1])))
    basis_x, basis_y = (lfm.spectral_basis(lfm.build_graph(z), n_basis=30) for z in (x, y))
    fmap = lfm.functional_map(basis_x, basis_y, f_x, f_y)
    indicators = lfm.descriptors.label_indicators(labels_x, dtype=x.dtype)
    scores = {"LFM, functions": accuracy(fmap.transfer(indicators, basis_x, basis_y).argmax(1))}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", lfm.LFMWarning)
        alignment = lfm.align(x, y, anchors=anchors)
    found = alignment.untrusted
    scores["LFM + orthogonal"] = accuracy(nearest_class(y, found.translator(x), labels_x))
    translator = lfm.fit_translator(x, y, pairs=anchors)
    scores["anchors, orthogonal"] = accuracy(nearest_class(y, translator(x), labels_x))
    one, other = (relative_representations(z, rows) for z, rows in ((x, anchors[:, 0]), (y, anchors[:, 1])))
    scores["relative"] = accuracy(nearest_class(other, one, labels_x))
    return scores | {"found": float(alignment.found), "confidence": alignment.confidence}


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--anchors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--layer", type=int, default=7)
    parser.add_argument("--models", type=int, default=3, help="use only the first so many checkpoints")
    parser.add_argument("--images", type=int, default=2000, help="for each network")
    parser.add_argument("--same", action="store_true", help="both networks see the same images")
    parser.add_argument("--out", type=Path, default=None, help="folder for the figure and the JSON")
    args = parser.parse_args(argv)
    counts = sorted(set(args.anchors))
    shared = args.images if args.same else counts[-1]
    images, labels = load_images(args.data, slice(2 * args.images - shared))
    spaces = features(args.data, images, args.layer, args.models)
    # the first `shared` images are seen by both: the anchors are among these
    seen_x = torch.arange(args.images)
    seen_y = torch.cat([torch.arange(shared), torch.arange(args.images, 2 * args.images - shared)])
    pairs = list(permutations(range(len(spaces)), 2))
    ceiling = float(
        np.mean(
            [(nearest_class(s[seen_y], s[seen_x], labels[seen_x]) == labels[seen_y]).float().mean() for s in spaces]
        )
    )
    print(f"layer {args.layer}, {len(pairs)} ordered pairs of networks, {args.images} images each, {shared} shared")
    print(f"labels within one network (no transfer at all): accuracy {ceiling:.3f}")
    print(f"{'anchors':>8}" + "".join(f"{name:>22}" for name in METHODS) + f"{'found':>8}")
    rows = []
    for count in counts:
        anchors = torch.arange(count).repeat(2, 1).T
        runs = [
            run_pair(spaces[i][seen_x], spaces[j][seen_y], labels[seen_x], labels[seen_y], anchors) for i, j in pairs
        ]
        row: dict[str, float] = {"anchors": count, **{k: float(np.mean([r[k] for r in runs])) for k in runs[0]}}
        rows.append(row)
        print(f"{count:>8}" + "".join(f"{row[name]:>22.3f}" for name in METHODS) + f"{row['found']:>8.2f}", flush=True)
    result = {"within one network": ceiling, "rows": rows, "layer": args.layer, "shared": shared}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(rows, ceiling, args.out / "label_transfer.png")
        (args.out / "label_transfer.json").write_text(json.dumps(result, indent=1) + "\n")
    return result


def draw(rows: list[dict[str, float]], ceiling: float, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(5.6, 3.4), constrained_layout=True)
    counts = [row["anchors"] for row in rows]
    for name in METHODS:
        axes.plot(counts, [row[name] for row in rows], "o-", ms=4, label=name)
    axes.axhline(ceiling, color="0.4", lw=1, ls="--", label="within one network")
    axes.axhline(0.1, color="0.7", lw=1, ls=":", label="chance")
    axes.set(xscale="log", xlabel="known pairs", ylabel="accuracy of the carried labels", ylim=(0, 1))
    axes.set_xticks(counts, [str(c) for c in counts], fontsize=8)
    axes.minorticks_off()
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# %%
if __name__ == "__main__":
    main()
