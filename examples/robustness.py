"""How do measures answer when one class moves away and everything else stays? Figure 3 of the LFM paper.

    python examples/robustness.py --data FOLDER [--images 5000] [--network 0] [--steps 25] [--out DIR]

Class 0 of the pooled features of a CIFAR-10 network is moved along the normal of its linear SVM, step by step. Its
samples remain each other's neighbours, so a linear classifier loses nothing, and the graph hardly changes: a similarity
that falls to nothing measures the distance. The distortion of each sample must show which ones moved. The folder is
described in `cifar10.py`.
"""

# %%
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from cifar10 import DEFAULT_DATA, load_images, load_networks
from sklearn.svm import LinearSVC
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.measures import MEASURES
from lfm_torch.report.figures import png
from lfm_torch.report.plots import curve_figure, distortion_figure, map_figure, spectrum_figure

DEFAULTS = ("lfm", "heat", "overlap")
CLASSICAL = ("linear_cka", "rbf_cka")
FEATURES = "layers.7"
# steps that are reported: here the paper's figure has its ticks
REPORTED = (3.3, 10.0, 20.0, 80.0)


def svm_normal(x: Tensor, inside: Tensor) -> Tensor:
    """Unit normal of the linear SVM that tells `inside` from the rest, towards the class."""
    weights = LinearSVC(max_iter=20_000).fit(x.numpy(), inside.int().numpy()).coef_[0]
    normal = torch.from_numpy(weights).to(x.dtype)
    return normal / normal.norm()


def published(x: Tensor, y: Tensor) -> float:
    """The paper's settings: edges weighted by distance, the ratio of norms (with the true smallest eigenvalues)."""
    return float(lfm.similarity(x, y, measures=["lfm_unsquared"], weights="distance")["lfm_unsquared"])


def main(argv: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with images and checkpoints")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--network", type=int, default=0, help="which of the networks")
    parser.add_argument("--steps", type=int, default=25, help="steps from 0 to 80")
    parser.add_argument("--out", type=Path, default=None, help="folder for figures and JSON")
    args = parser.parse_args(argv)

    # %% the space and the direction
    images, labels = load_images(args.data, slice(args.images))
    network = list(load_networks(args.data).values())[args.network]
    x = lfm.extract(network, images, layers=[FEATURES], pooling="mean")[FEATURES]
    moved = labels == 0
    normal = svm_normal(x, moved)

    # %% step by step
    steps = sorted({round(80 * i / (args.steps - 1), 3) for i in range(args.steps)} | set(REPORTED))
    curves: dict[str, list[float]] = {name: [] for name in (*DEFAULTS, "published", *CLASSICAL)}
    aucs, shares = [], []
    basis_x = lfm.pipeline.representation_basis(x)
    for t in steps:
        y = x + t * moved.unsqueeze(1) * normal
        basis_y = lfm.pipeline.representation_basis(y)
        fmap = lfm.paired_map(basis_x, basis_y)
        for name in DEFAULTS:
            curves[name].append(float(lfm.measures.read(fmap, name)))
        curves["published"].append(published(x, y))
        for name, value in lfm.similarity(x, y, measures=CLASSICAL).items():
            curves[name].append(float(value))
        distortion = lfm.distortion(fmap, basis_y)
        aucs.append(float(distortion.auc(moved)) if t else float("nan"))
        shares.append(float(distortion.share(moved)) if t else float("nan"))
        if t == 10:
            at_ten = (y, distortion, fmap, basis_y)

    # %% what to keep
    rows = {f"{t:g}": {name: values[steps.index(t)] for name, values in curves.items()} for t in REPORTED}
    for t in REPORTED:
        rows[f"{t:g}"] |= {"auc": aucs[steps.index(t)], "share": shares[steps.index(t)]}
    print(f"{len(x)} images, {int(moved.sum())} of class 0 moved along the normal of its linear SVM by t")
    print(f"{'':28}" + "".join(f"{'t = ' + t:>10}" for t in rows))
    for name in next(iter(rows.values())):
        title = MEASURES[name].title if name in MEASURES else {
            "published": "LFM, published settings", "auc": "AUC of the distortion", "share": "share of the distortion"
        }[name]  # fmt: skip
        print(f"{title:28}" + "".join(f"{row[name]:10.3f}" for row in rows.values()))
    print(f"the moved class is {float(moved.float().mean()):.3f} of the samples")
    result = {"images": len(x), "network": args.network, "moved": int(moved.sum()), "rows": rows}
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        y, distortion, fmap, basis_y = at_ten
        named = {"LFM, published settings" if name == "published" else name: v for name, v in curves.items()}
        figures = {
            "robustness": curve_figure(steps, named, xlabel="distance by which class 0 is moved"),
            "distortion": distortion_figure(distortion, x, labels=labels, title="distortion at t = 10, t-SNE of x"),
            "map": map_figure({"x to itself": lfm.paired_map(basis_x, basis_x), "x to moved, t = 10": fmap}),
            "spectra": spectrum_figure({"x": basis_x, "moved, t = 10": basis_y}),
        }
        for name, figure in figures.items():
            (args.out / f"{name}.png").write_bytes(png(figure))
        record = {**result, "steps": steps, "curves": curves, "auc": aucs, "share": shares}
        (args.out / "robustness.json").write_text(json.dumps(record, indent=1) + "\n")
    return result


# %%
if __name__ == "__main__":
    main()
