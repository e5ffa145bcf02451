"""Do the same layers of independently trained networks match best? The layer-matching task of Kornblith et al. (2019)
and figure 2 of the LFM paper, on CIFAR-10 networks trained from different seeds, for every measure of the library.

    python examples/layer_matching.py --data FOLDER [--images 2000] [--pooling mean flatten] [--sweep] [--out DIR]

For every layer of one network, is the most similar layer of another one the same layer? Accuracy over all ordered pairs
of networks, with its standard error over pairs. The folder is described in `cifar10.py`.

`--sweep --choose` varies settings on the first three networks and the last 2,000 images alone, so that they can be
chosen without a look at what is scored; "held out" is the accuracy on the other networks only.
"""

# %%
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from cifar10 import DEFAULT_DATA, LAYERS, load_images, load_networks
from matplotlib.figure import Figure

import lfm_torch as lfm
from lfm_torch.measures import MEASURES
from lfm_torch.report.figures import layer_figure, png

N_CHOOSING = 3
SHOWN = ("lfm", "overlap", "heat", "linear_cka")
# canonical correlations and rotations of flattened layers, thousands of features on 2,000 images, take minutes per pair
# and say nothing: any two such layers can be rotated into each other
NARROW = ("mean_cca", "svcca", "pwcca", "procrustes", "procrustes_angular", "linear_regression")


def layer_matching(
    folder: Path, rows: slice, pooling: str, measures: Sequence[str], count: int | None, **settings: Any
) -> lfm.Comparison:
    """All layers of all networks against each other."""
    images, _ = load_images(folder, rows)
    networks = load_networks(folder, count)
    if len(networks) < 2:
        raise SystemExit(f"need at least two checkpoints cifar10_cnn/*.pth in {folder}, found {len(networks)}")
    layers = {name: lfm.extract(model, images, layers=LAYERS, pooling=pooling) for name, model in networks.items()}
    return lfm.compare(layers, measures=measures, **settings)


def table_of(comparison: lfm.Comparison) -> dict[str, dict[str, float]]:
    """Accuracy and standard error per measure, on all networks and on those that settings were not chosen on."""
    names = [checkpoint.name for checkpoint in comparison.checkpoints]
    held_out = names[N_CHOOSING:]
    rows = {}
    for measure in comparison.measures:
        whole = comparison.layer_matching(measure, checkpoints=names)
        assert whole is not None
        rows[measure] = {"accuracy": whole.accuracy, "stderr": whole.stderr, "chance": whole.chance}
        rows[measure] |= {"same_layer": whole.same_layer, "other_layer": whole.other_layer}
        if len(held_out) > 1:
            rest = comparison.layer_matching(measure, checkpoints=held_out)
            assert rest is not None
            rows[measure] |= {"held_out": rest.accuracy, "held_out_stderr": rest.stderr}
    return rows


def accuracy_figure(tables: dict[str, dict[str, dict[str, float]]]) -> Figure:
    """A dot with its standard error per measure and pooling, best on top."""
    names = sorted({name for table in tables.values() for name in table}, key=lambda n: _best(tables, n))
    with matplotlib.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.2, 0.6 + 0.26 * len(names)), layout="constrained")
        ax = figure.subplots()
        for k, (pooling, table) in enumerate(tables.items()):
            shown = [name for name in names if name in table]
            ax.errorbar(
                [table[name]["accuracy"] for name in shown],
                [names.index(name) + 0.22 * (k - (len(tables) - 1) / 2) for name in shown],
                xerr=[table[name]["stderr"] for name in shown],
                fmt="os"[k % 2],
                color=("#0072B2", "#D55E00")[k % 2],
                markersize=4.5,
                elinewidth=1.2,
                label={"mean": "averaged over space", "flatten": "flattened"}.get(pooling, pooling),
            )
        ax.axvline(1 / len(LAYERS), color="0.5", linewidth=0.8, linestyle=":")
        ax.text(1 / len(LAYERS), len(names) - 0.4, " guessing", color="0.4", fontsize=8, va="top")
        ax.set_yticks(range(len(names)), [MEASURES[name].title for name in names])
        ax.set_xlim(0, 1.02)
        ax.grid(axis="x", color="0.92")
        ax.set_axisbelow(True)
        ax.set_xlabel("share of layers found again in another network")
        ax.legend(loc="lower left", bbox_to_anchor=(0.15, 0.02), frameon=False)
    return figure


def _best(tables: dict[str, dict[str, dict[str, float]]], name: str) -> float:
    return max(table[name]["accuracy"] for table in tables.values() if name in table)


def sweep(folder: Path, rows: slice, poolings: Sequence[str], count: int | None) -> dict[str, dict[str, float]]:
    """Accuracy of the map measures over numbers of neighbours and eigenvectors."""
    found = {}
    for pooling in poolings:
        for neighbors in (100, 200, 300):
            for basis in (50, 70, 100):
                options = {"n_neighbors": neighbors, "n_basis": basis}
                comparison = layer_matching(folder, rows, pooling, SHOWN[:3], count, **options)
                names = [checkpoint.name for checkpoint in comparison.checkpoints]
                matches = {m: comparison.layer_matching(m, checkpoints=names) for m in comparison.measures}
                line = {name: match.accuracy for name, match in matches.items() if match is not None}
                found[f"{pooling}, {neighbors} neighbors, {basis} eigenvectors"] = line
                shown = "  ".join(f"{name} {value:.3f}" for name, value in line.items())
                print(f"{pooling:8} {neighbors} neighbors {basis:3} eigenvectors  {shown}", flush=True)
    return found


def main(argv: list[str] | None = None) -> dict[str, dict[str, dict[str, float]]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA, help="folder with images and checkpoints")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--models", type=int, default=None, help="use only the first so many networks")
    parser.add_argument("--pooling", nargs="+", choices=("mean", "flatten"), default=["mean"])
    parser.add_argument("--measures", nargs="+", default=None, help="names; all that are feasible when left out")
    parser.add_argument("--sweep", action="store_true", help="also vary neighbours and eigenvectors (minutes)")
    parser.add_argument("--choose", action="store_true", help="sweep on the images and networks for choosing settings")
    parser.add_argument("--out", type=Path, default=None, help="folder for figures, report and JSON")
    args = parser.parse_args(argv)

    tables: dict[str, dict[str, dict[str, float]]] = {}
    for pooling in args.pooling:
        measures = args.measures or [name for name in MEASURES if pooling == "mean" or name not in NARROW]
        start = time.perf_counter()
        comparison = layer_matching(args.data, slice(args.images), pooling, measures, args.models)
        seconds = time.perf_counter() - start
        tables[pooling] = table_of(comparison)
        n, items = comparison.settings["n_samples"], len(comparison.items)
        print(f"\n{len(comparison.checkpoints)} networks, {n} images, {pooling}: {items**2} pairs in {seconds:.0f} s")
        print(f"{'measure':34}{'accuracy':>16}{'held out':>16}{'same layer':>12}{'others':>8}")
        for name, row in sorted(tables[pooling].items(), key=lambda item: -item[1]["accuracy"]):
            held = f"{row['held_out']:.3f} ± {row['held_out_stderr']:.3f}" if "held_out" in row else "-"
            print(
                f"{MEASURES[name].title:34}{row['accuracy']:8.3f} ± {row['stderr']:.3f}{held:>16}"
                f"{row['same_layer']:12.3f}{row['other_layer']:8.3f}",
                flush=True,
            )
        if args.out is not None:
            comparison.report(args.out / pooling)
            few = [name for name in SHOWN if name in comparison.matrices]
            picture = layer_figure(_only(comparison, few))
            (args.out / f"layers_{pooling}.png").write_bytes(png(picture))
    record: dict[str, Any] = {"images": args.images, "tables": tables}
    if args.sweep or args.choose:
        rows, count = (slice(3000, 5000), N_CHOOSING) if args.choose else (slice(args.images), args.models)
        record["chosen on" if args.choose else "sweep"] = sweep(args.data, rows, args.pooling, count)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "layer_matching.png").write_bytes(png(accuracy_figure(tables)))
        (args.out / "layer_matching.json").write_text(json.dumps(record, indent=1) + "\n")
    return tables


def _only(comparison: lfm.Comparison, measures: Sequence[str]) -> lfm.Comparison:
    from dataclasses import replace

    return replace(comparison, matrices={name: comparison.matrices[name] for name in measures})


# %%
if __name__ == "__main__":
    main()
