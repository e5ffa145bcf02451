"""What watching costs: ResNet-18 on CIFAR-size images, a probe of 2,000, four layers, once per epoch of 50,000.

An epoch takes a quarter of an hour and more on two cores, so a few training steps are timed and multiplied; the row
says by what. Measurements are split into the forward pass and the reduction (neighbours, graph, basis, scores), which
starts from the last basis once the layers move little: the last steps are small, with settled batch statistics.
"""

from __future__ import annotations

import functools

import harness
import torch
from torch import Tensor, nn

from lfm_torch.training import Monitor

N_TRAINING, BATCH = 50_000, 128


class Block(nn.Module):
    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.second = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or channels_in != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(channels_in, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm2(self.second(self.norm1(self.first(x)).relu()))
        return (y + self.shortcut(x)).relu()


class ResNet18(nn.Module):
    """ResNet-18 as it is used on CIFAR: a 3 x 3 stem without pooling (He et al. 2016; 11.2 million weights)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        sizes = [(width, width, 1), (width, 2 * width, 2), (2 * width, 4 * width, 2), (4 * width, 8 * width, 2)]
        self.layers = nn.ModuleList(nn.Sequential(Block(i, o, s), Block(o, o, 1)) for i, o, s in sizes)
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


def images(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Ten classes of smooth patterns in noise: something that can be learnt, and costs what CIFAR-10 costs."""
    patterns = nn.functional.interpolate(
        torch.randn(10, 3, 4, 4, generator=torch.Generator().manual_seed(9)), size=32, mode="bilinear"
    )
    labels = torch.randint(10, (n,), generator=generator)
    return patterns[labels] + torch.randn(n, 3, 32, 32, generator=generator), labels


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, rate: float, x: Tensor, y: Tensor) -> None:
    optimizer.param_groups[0]["lr"] = rate
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.1 if rate > 0.001 else 0.0
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()


def main() -> None:
    args = harness.arguments(__doc__.splitlines()[0])
    width, n_probe = (16, 600) if args.quick else (64, 2000)
    steps = 20 if args.device == "cuda" else 2
    rates = (None, 0.05, 0.0005, 0.0005, 0.0005)
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    model = ResNet18(width).to(args.device)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    probe = images(n_probe, generator)[0].to(args.device)
    if args.device == "cuda":  # what is loaded and made at a first call is not a cost of watching
        Monitor(model, probe, layers="layers.*", background=False).measure(step=0)
        train_step(model, optimizer, 0.0, *(part.to(args.device) for part in images(BATCH, generator)))
    monitor = Monitor(model, probe, layers="layers.*", background=False)
    step_seconds: list[float] = []
    with harness.Record("training", args=args) as record:
        for i, rate in enumerate(rates):
            for _ in range(0 if rate is None else steps):
                x, y = (part.to(args.device) for part in images(BATCH, generator))
                step = functools.partial(train_step, model, optimizer, rate, x, y)
                step_seconds.append(harness.once(step)[0])
            total, point = harness.once(lambda i=i: monitor.measure(step=i))
            reduce = point.seconds["reduce"]
            heats = [scores.get("heat", float("nan")) for scores in point.scores.values()]
            row: harness.Row = {
                "what": "first measurement" if i == 0 else f"after steps of rate {rate}",
                "seconds": total,
                "forward": point.seconds["extract"],
                "reduce": reduce,
                "percent of an epoch": None,  # known at the end
                "reduce, times cheaper": record.rows[0]["reduce"] / reduce if record.rows else 1.0,
                "heat to the last": sum(heats) / len(heats),
            }
            record.add(row)
        per_epoch = N_TRAINING / BATCH
        epoch = harness.median(step_seconds) * per_epoch
        for row in record.rows:
            row["percent of an epoch"] = 100 * row["seconds"] / epoch
        record.add(
            {
                "what": f"epoch, from {len(step_seconds)} steps of {BATCH} times {per_epoch / len(step_seconds):.1f}",
                "seconds": epoch,
                "forward": harness.median(step_seconds),
            }
        )


if __name__ == "__main__":
    main()
