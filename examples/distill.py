"""Align a small student to a teacher on handwritten digits: which loss makes their representations alike, at what cost?

    python examples/distill.py [--seeds 3] [--epochs 60] [--weight 1]

The student has a seventeenth of the teacher's weights. It learns alone, and with each alignment loss between its last
features and the teacher's, from the same start and the same batches. Reported on held-out digits, mean over seeds:
accuracy, and the similarity of its features to the teacher's. About a minute on two idle cores.
"""

# %% a teacher and a student, the same kind of network
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import lfm_torch as lfm
from lfm_torch.baselines import linear_cka
from lfm_torch.cli.demo import N_TRAINING, digits

BATCH = 300
MEASURES = ("heat", "overlap", "linear_cka")


class Features(nn.Module):
    """Convolutions to features `[n, d]` (no ReLU at the end: a dead row has no direction), and a linear head."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        blocks, channels = [], 1
        for i in range(depth):
            after = width * (1 if i < depth // 2 else 2)
            stride = 2 if i == depth // 2 else 1
            blocks += [nn.Conv2d(channels, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU()]
            channels = after
        self.body = nn.Sequential(*blocks, nn.Conv2d(channels, channels, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.head = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


Alignment = Callable[[Tensor, Tensor], Tensor]


def train(
    model: Features, images: Tensor, labels: Tensor, epochs: int, align: Alignment | None, teacher: Tensor
) -> None:
    """Cross entropy, and the alignment of the body's features to the teacher's on the same batch."""
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(epochs):
        for part in torch.randperm(len(images)).split(BATCH):
            if len(part) < 100:
                continue
            features = model.body(images[part])
            loss = nn.functional.cross_entropy(model.head(features), labels[part])
            if align is not None:
                loss = loss + align(features, teacher[part])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


def losses() -> dict[str, Alignment | None]:
    settings = {"n_basis": 16, "n_neighbors": 30}
    exact, dirichlet = lfm.losses.LFMAlignmentLoss(**settings), lfm.losses.DirichletAlignmentLoss(**settings)
    return {
        "none": None,
        "linear CKA": lambda x, y: 1 - linear_cka(x, y),
        "LFM, exact (heat)": exact,
        "Dirichlet energy": dirichlet,
    }


def main(argv: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--weight", type=float, default=1.0, help="of the alignment beside the cross entropy")
    parser.add_argument("--out", type=Path, default=None, help="a JSON file for the table")
    args = parser.parse_args(argv)
    images, labels = digits()
    held_images, held_labels = images[N_TRAINING:], labels[N_TRAINING:]
    images, labels = images[:N_TRAINING], labels[:N_TRAINING]

    # %% the teacher, once
    torch.manual_seed(100)
    teacher = Features(32, 4)
    train(teacher, images, labels, max(5, args.epochs // 2), None, images)
    with torch.no_grad():
        target, held_target = teacher.body(images), teacher.body(held_images)
    accuracy = (teacher.head(held_target).argmax(1) == held_labels).float().mean()
    sizes = [sum(w.numel() for w in model.parameters()) for model in (teacher, Features(8, 3))]
    print(f"teacher: {sizes[0]} weights, accuracy {accuracy:.3f}; student: {sizes[1]} weights\n")

    # %% students: each loss from the same initial weights and the same batches
    table: dict[str, dict[str, float]] = {}
    for name, align in losses().items():
        rows, start = [], time.perf_counter()
        for seed in range(args.seeds):
            torch.manual_seed(seed)
            student = Features(8, 3)
            weighted = None if align is None else lambda x, y, align=align: args.weight * align(x, y)
            train(student, images, labels, args.epochs, weighted, target)
            with torch.no_grad():
                features = student.body(held_images)
                correct = (student.head(features).argmax(1) == held_labels).float().mean()
            scores = lfm.similarity(features, held_target, measures=MEASURES)
            rows.append(torch.stack([correct, *scores.values()]))
        values = torch.stack(rows)
        columns = ("accuracy", *MEASURES)
        table[name] = dict(zip(columns, values.mean(0).tolist(), strict=True))
        table[name]["accuracy spread"] = float(values[:, 0].std()) if len(rows) > 1 else 0.0
        table[name]["seconds"] = (time.perf_counter() - start) / args.seeds

    # %% the table
    print(f"{'alignment':20}" + "".join(f"{column:>17}" for column in next(iter(table.values()))))
    for name, values in table.items():
        print(f"{name:20}" + "".join(f"{value:>17.3f}" for value in values.values()))
    if args.out is not None:
        args.out.write_text(json.dumps(table, indent=1) + "\n")
    return table


# %%
if __name__ == "__main__":
    main()
