"""What a checkpoint is: the files its weights are in, the run and step that its name tells, its place in the run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

SUFFIXES = (".ckpt", ".pt", ".pth", ".safetensors")
# what Hugging Face's save_pretrained writes, the safer first
FOLDER_WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)


@dataclass(frozen=True)
class Checkpoint:
    """One saved state of a training run.

    Attributes:
        name: how reports call it, unique within a comparison.
        run: the training run it belongs to.
        step: its place in the run (epoch or step); None where the name tells none.
        path: the file, None for representations given directly.
    """

    name: str
    run: str
    step: int | None = None
    path: Path | None = None


def in_order(checkpoints: Sequence[Checkpoint]) -> list[Checkpoint]:
    """Sort by run (numbers in it by value), then step; a checkpoint without a step ends its run."""

    def natural(text: str) -> list[tuple[bool, int, str]]:
        parts = re.split(r"(\d+)", text)
        # not isdigit: a superscript is a digit that int() does not read
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(
        checkpoints, key=lambda c: (natural(c.run), c.step is None, -1 if c.step is None else c.step, natural(c.name))
    )


def weight_files(path: Path) -> list[Path]:
    """Return the files a checkpoint's weights are in: itself, or the shards that an index lists.

    Raises:
        ValueError: an index that does not read.
    """
    if not path.name.endswith(".index.json"):
        return [path]
    try:
        shards = sorted(set(json.loads(path.read_text("utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be an index of shards with a 'weight_map', got one that does not read"
        ) from error
    # a name in an index is a file beside it, nowhere else
    return [path, *(path.parent / Path(shard).name for shard in shards)]


# what a number in a file name counts, whatever the case of its letters; the first that is found wins
_COUNTERS = (
    r"(?:^|(?<=[^a-zA-Z]))(?:epoch|ep)[=_\-]?(\d+)",
    r"(?:^|(?<=[^a-zA-Z]))(?:global_?step|step|iteration|iter|it)s?[=_\-]?(\d+)",
    r"(?:^|(?<=[^a-zA-Z]))(?:checkpoint|ckpt)[=_\-]?(\d+)",
)
# metrics that Lightning writes behind the epoch: val_loss=0.31
_METRIC = r"[-_]?[a-zA-Z]\w*=-?\d+\.\d+(?:e-?\d+)?"
_VERSION = r"-v\d+$"
_LAST = ("last", "final")


def parse_name(name: str, *, root: str = "") -> tuple[str, int | None]:
    """Read run and step from a path below ``root``, without ending: see :func:`find_checkpoints`.

    Example:
        >>> parse_name("seed0/epoch=04-step=75"), parse_name("model_seed_3"), parse_name("a/last")
        (('seed0', 4), ('model_seed_3', None), ('a', None))
    """
    directory, _, stem = name.rpartition("/")
    step, rest = None, re.sub(_VERSION, "", re.sub(_METRIC, "", stem, flags=re.IGNORECASE))
    for counter in _COUNTERS:
        counted = re.search(counter, rest, re.IGNORECASE)
        if counted:
            step = int(counted.group(1)) if step is None else step
            rest = rest[: counted.start()] + rest[counted.end() :]
    rest = re.sub(r"[-_=.]{2,}", "-", rest).strip("-_=. ")
    if step is None and rest.lower() in _LAST:
        rest = ""
    if step is None and rest.isdecimal():
        step, rest = int(rest), ""
    return "/".join(part for part in (directory, rest) if part) or root or "run", step
