"""Translate between two word embeddings from a few known word pairs, or from none: the retrieval task of the LFM paper
(section 5.3). 2,000 words are in the graphs; the others are to be found in the second space after translation.

    python examples/word_retrieval.py --data FILE.npz [--seeds 5] [--anchors 0 2 5 10 25 50 75 100 150 200 300]

FILE.npz holds two arrays `[n, d]` of the same words, by default `word2vec` and `fasttext` (--spaces names others). The
rows of the second space are shuffled before anything is aligned; 0 anchors means that nothing at all is known.
"""

# %%
from __future__ import annotations

import argparse
import json
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import lfm_torch as lfm
from lfm_torch.alignment import relative_representations

HERE = Path(__file__).parent
DEFAULT_DATA = HERE.parent.parent / "shared" / "data" / "word_embeddings.npz"
COUNTS = (0, 2, 5, 10, 25, 50, 75, 100, 150, 200, 300)
METHODS = ("LFM + orthogonal", "LFM + linear", "anchors, orthogonal", "anchors, linear", "relative")


def load(path: Path, names: tuple[str, str]) -> tuple[Tensor, Tensor]:
    if not path.is_file():
        raise SystemExit(f"no file {path}; name one with --data")
    with np.load(path) as file:
        missing = [name for name in names if name not in file]
        if missing:
            raise SystemExit(f"{path} has no array {missing[0]!r} (it has {', '.join(file)}); name them with --spaces")
        x, y = (torch.from_numpy(file[name].astype(np.float32)) for name in names)
    return x, y


# %% one seed: which words are in the graphs, and every number of anchors
def run_seed(x: Tensor, y: Tensor, n_graph: int, counts: list[int], seed: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randperm(len(x), generator=generator)
    graph, rest = words[:n_graph], words[n_graph:]
    # about the mean of the graph words, for every method alike
    x, y = x - x[graph].mean(0), y - y[graph].mean(0)
    shuffle = torch.randperm(n_graph, generator=generator)
    order = torch.randperm(n_graph, generator=generator)
    x_graph, y_graph, x_rest, y_rest = x[graph], y[graph][shuffle], x[rest], y[rest]
    all_pairs = torch.stack([shuffle, torch.arange(n_graph)], 1)

    def rank(translator: lfm.transfer.Translator) -> float:
        return float(lfm.mean_reciprocal_rank(translator(x_rest), y_rest))

    record: dict[str, object] = {"seed": seed}
    record["ceiling"] = {
        kind: rank(lfm.fit_translator(x_graph, y_graph, pairs=all_pairs, kind=kind))
        for kind in ("orthogonal", "linear")
    }
    rows = []
    for count in counts:
        anchors = all_pairs[order[:count]]
        start = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lfm.LFMWarning)
            alignment = lfm.align(x_graph, y_graph, anchors=anchors if count else None)
        seconds = time.perf_counter() - start
        found = alignment.untrusted
        row: dict[str, object] = {"anchors": count, "seconds": seconds, "found": alignment.found}
        row |= {"confidence": alignment.confidence, "chance": alignment.chance, "method": alignment.method}
        row["matched"] = float((found.idx_yx == shuffle).float().mean())
        row["LFM + orthogonal"] = rank(found.translator)
        row["LFM + linear"] = rank(lfm.fit_translator(x_graph, y_graph, pairs=found.pairs, kind="linear"))
        if count:
            for kind in ("orthogonal", "linear"):
                row[f"anchors, {kind}"] = rank(lfm.fit_translator(x_graph, y_graph, pairs=anchors, kind=kind))
            queries = relative_representations(x_rest, x_graph[anchors[:, 0]])
            candidates = relative_representations(y_rest, y_graph[anchors[:, 1]])
            row["relative"] = float(lfm.mean_reciprocal_rank(queries, candidates))
        rows.append(row)
    record["rows"] = rows
    return record


# %% spaces in which there is nothing to find
def controls(x: Tensor, y: Tensor, n_graph: int) -> list[dict[str, object]]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randperm(len(x), generator=generator)
    x_graph, y_graph = x[words[:n_graph]], y[words[:n_graph]]
    other = words[n_graph : 2 * n_graph]
    noise = torch.randn(n_graph, y.shape[1], generator=generator)
    centred = y_graph - y_graph.mean(0)
    columns = torch.stack([c[torch.randperm(n_graph, generator=generator)] for c in y_graph.T], 1)
    _, sizes, axes = torch.linalg.svd(centred, full_matrices=False)
    unrelated = {
        "the same covariance, Gaussian": noise * sizes / n_graph**0.5 @ axes,
        "each column shuffled": columns,
        "other words": y[other],
    }
    rows = []
    for name, space in unrelated.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", lfm.LFMWarning)
            alignment = lfm.align(x_graph, space)
        rows.append({"space": name, "found": alignment.found, "confidence": alignment.confidence})
        rows[-1]["chance"] = alignment.chance
    return rows


def summarize(records: list[dict[str, object]], counts: list[int]) -> dict[str, object]:
    ceiling = np.array([r["ceiling"]["orthogonal"] for r in records])
    table = []
    for place, count in enumerate(counts):
        rows = [r["rows"][place] for r in records]
        line: dict[str, object] = {"anchors": count}
        line |= {name: float(np.mean([row[name] for row in rows])) for name in METHODS if name in rows[0]}
        shares = np.array([row["LFM + orthogonal"] for row in rows]) / ceiling
        line |= {"share of ceiling": float(shares.mean()), "worst seed": float(shares.min())}
        line |= {
            "found": sum(bool(row["found"]) for row in rows),
            "seconds": float(np.mean([r["seconds"] for r in rows])),
        }
        table.append(line)
    linear = [r["ceiling"]["linear"] for r in records]
    return {"ceiling": {"orthogonal": float(ceiling.mean()), "linear": float(np.mean(linear))}, "table": table}


def draw(summary: dict[str, object], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    table = [row for row in summary["table"] if row["anchors"]]
    figure, axes = plt.subplots(figsize=(6.4, 3.6), constrained_layout=True)
    styles = dict(zip(METHODS, (("C0", "o-"), ("C0", "o:"), ("C1", "s-"), ("C1", "s:"), ("C2", "^-")), strict=True))
    for name, (color, style) in styles.items():
        axes.plot([r["anchors"] for r in table], [r[name] for r in table], style, color=color, ms=4, label=name)
    axes.axhline(summary["ceiling"]["orthogonal"], color="0.4", lw=1, ls="--", label="all pairs, orthogonal")
    none = [row["LFM + orthogonal"] for row in summary["table"] if not row["anchors"]]
    if none:
        axes.axhline(none[0], color="C3", lw=1, label="LFM + orthogonal, no anchors")
    axes.set(xscale="log", xlabel="known word pairs", ylabel="mean reciprocal rank", ylim=(0, 1))
    crowded = (75, 150)
    names = ["" if r["anchors"] in crowded else str(r["anchors"]) for r in table]
    axes.set_xticks([r["anchors"] for r in table], names, fontsize=8)
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> dict[str, object]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--spaces", nargs=2, default=("word2vec", "fasttext"), metavar="NAME")
    parser.add_argument("--graph-words", type=int, default=2000, help="words in the graphs")
    parser.add_argument("--anchors", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--no-controls", action="store_true", help="leave out the spaces without anything to find")
    parser.add_argument("--out", type=Path, default=None, help="folder for the figure and the JSON")
    args = parser.parse_args(argv)
    x, y = load(args.data, tuple(args.spaces))
    counts = sorted(set(args.anchors))
    records = [run_seed(x, y, args.graph_words, counts, seed) for seed in range(args.seeds)]
    summary = summarize(records, counts)

    # %% the table
    ceiling = summary["ceiling"]
    print(
        f"{args.graph_words} words aligned, {len(x) - args.graph_words} to be retrieved, {args.seeds} seeds; ", end=""
    )
    print(f"all pairs known: MRR {ceiling['orthogonal']:.3f} orthogonal, {ceiling['linear']:.3f} linear")
    head = ("anchors", *METHODS, "of ceiling", "worst seed", "found", "s")
    print("  ".join(f"{name:>10}" for name in head))
    for row in summary["table"]:
        cells = [str(row["anchors"]), *(f"{row[m]:.3f}" if m in row else "-" for m in METHODS)]
        cells += [f"{row['share of ceiling']:.4f}", f"{row['worst seed']:.4f}", f"{row['found']}/{args.seeds}"]
        cells.append(f"{row['seconds']:.1f}")
        print("  ".join(f"{cell:>{max(10, len(name))}}" for cell, name in zip(cells, head, strict=True)))
    if not args.no_controls:
        summary["controls"] = controls(x, y, args.graph_words)
        print("\nnothing to find, no anchors:")
        for row in summary["controls"]:
            verdict = "FOUND" if row["found"] else "no alignment found"
            print(f"  {row['space']:32}{verdict}, confidence {row['confidence']:.3f}, chance {row['chance']:.3f}")
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        draw(summary, args.out / "word_retrieval.png")
        (args.out / "word_retrieval.json").write_text(json.dumps({**summary, "seeds": records}, indent=1) + "\n")
    return summary


# %%
if __name__ == "__main__":
    main()
