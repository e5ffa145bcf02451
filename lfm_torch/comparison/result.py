"""The record of a comparison: one matrix per measure over all representations, and the views people ask of it."""

from __future__ import annotations

import csv
import functools
import io
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from lfm_torch import _checks, _files
from lfm_torch._warnings import kind_of
from lfm_torch.measures.table import MEASURES, below_chance, full_name
from lfm_torch.representations.checkpoint_files import Checkpoint

if TYPE_CHECKING:
    import pandas

_COLUMNS = ("checkpoint", "layer", "run", "step")


@dataclass(frozen=True)
class Item:
    """One representation that was compared, and what its basis says about itself.

    Attributes:
        checkpoint: name of the network or checkpoint.
        layer: name of the layer.
        n_components: connected components of its neighbour graph.
        n_unconverged: eigenpairs that did not reach the solver's tolerance.
        note: how it was computed where that was not the usual way (on the CPU, for lack of memory on a GPU).
        notes: what is to be known of its points under a metric of angles: rows of zeros, an offset that dwarfs all.
    """

    checkpoint: str
    layer: str
    n_components: int = 1
    n_unconverged: int = 0
    note: str = ""
    notes: tuple[str, ...] = ()

    @property
    def remarks(self) -> tuple[str, ...]:
        """Whatever a report says of it: ``notes``, and ``note`` where there is one."""
        return (*self.notes, *[self.note] * bool(self.note))


@dataclass(frozen=True)
class Remark:
    """What is to be known of several representations, in the words that the first of them has for it."""

    text: str
    items: tuple[Item, ...]

    def names(self, most: int) -> str:
        """The representations, the first ``most`` by name."""
        listed = [f"{item.checkpoint}, layer {item.layer}" for item in self.items[:most]]
        more = [f"{len(self.items) - most:,} more"] if len(self.items) > most else []
        return "; ".join(listed + more)


@dataclass(frozen=True)
class Failure:
    """What could not be compared, and why; ``layer`` is None where a network failed as a whole or has only one.

    ``other`` is the second network where a pair of them failed, each of which is compared to the rest.
    """

    checkpoint: str
    layer: str | None
    reason: str
    other: str | None = None

    def __str__(self) -> str:
        layer = f", layer {self.layer}" if self.layer else ""
        other = f" against {self.other}" if self.other else ""
        return f"{self.checkpoint}{layer}{other}: {self.reason}"


@dataclass(frozen=True)
class LayerMatching:
    """How often a layer is most similar to the same layer of another network: see :meth:`Comparison.layer_matching`.

    Attributes:
        accuracy: Share of decisions that are right.
        chance: That of guessing.
        n_decisions: Layers of all ordered pairs of networks.
        same_layer: Mean similarity of the same layers.
        other_layer: Mean similarity of different layers.
        stderr: Standard error of the accuracy over ordered pairs of networks.
    """

    accuracy: float
    chance: float
    n_decisions: int
    same_layer: float
    other_layer: float
    stderr: float = math.nan


@dataclass(frozen=True)
class Trajectory:
    """Similarity of a run's checkpoints to its last, layer by layer: see :meth:`Comparison.trajectories`.

    Attributes:
        run: the training run.
        steps: ``T`` epochs or steps.
        layers: ``L`` layer names.
        values: ``[T, L]``; the last row compares the last checkpoint to itself and is 1 by definition.
    """

    run: str
    steps: tuple[int, ...]
    layers: tuple[str, ...]
    values: Tensor


@dataclass(frozen=True, repr=False, eq=False)
class Comparison:
    """All pairwise similarities of a set of representations.

    Attributes:
        items: The N representations compared, in the order of the matrices.
        checkpoints: The networks or checkpoints they come from, in order of run and step.
        layers: Layer names, in the order of the network.
        matrices: Per measure ``[N, N]``; entry i, j is the similarity from item i (x) to item j (y). "lfm" is not
            symmetric.
        chance: Per measure ``[N]``, the mean similarity of each item to itself with its rows shuffled: what the measure
            gives where nothing corresponds.
        settings: How it was computed.
        failures: What could not be compared, with the reason.
        chance_std: Per measure the standard deviation of the single values behind ``chance``, over all items.
    """

    items: tuple[Item, ...]
    checkpoints: tuple[Checkpoint, ...]
    layers: tuple[str, ...]
    matrices: Mapping[str, Tensor]
    chance: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    failures: tuple[Failure, ...] = ()
    chance_std: Mapping[str, float] = field(default_factory=dict)

    def __repr__(self) -> str:
        failed = f", {len(self.failures)} failed" if self.failures else ""
        return (
            f"Comparison({len(self.checkpoints)} checkpoints in {len(self.runs)} runs x {len(self.layers)} layers, "
            f"{len(self.items)} representations of {self.settings.get('n_samples')} samples, "
            f"{', '.join(self.matrices)}{failed})"
        )

    @property
    def measures(self) -> tuple[str, ...]:
        """Names of the measures."""
        return tuple(self.matrices)

    @functools.cached_property
    def runs(self) -> dict[str, list[Checkpoint]]:
        """Checkpoints by run, each in order of training."""
        runs: dict[str, list[Checkpoint]] = {}
        for checkpoint in self.checkpoints:
            runs.setdefault(checkpoint.run, []).append(checkpoint)
        return runs

    @property
    def finals(self) -> list[str]:
        """Name of the last checkpoint of each run."""
        return [checkpoints[-1].name for checkpoints in self.runs.values()]

    @functools.cached_property
    def _index(self) -> dict[tuple[str, str], int]:
        return {(item.checkpoint, item.layer): i for i, item in enumerate(self.items)}

    def matrix(self, measure: str) -> Tensor:
        """Return the full ``[N, N]`` matrix over items.

        Raises:
            ValueError: a measure that was not computed.
        """
        measure = full_name(measure)
        _checks.check_choice("measure", measure, self.measures)
        return self.matrices[measure]

    def block(self, measure: str, rows: Sequence[tuple[str, str]], columns: Sequence[tuple[str, str]]) -> Tensor:
        """Return the values for (checkpoint, layer) pairs, NaN where one of them failed."""
        values = self.matrix(measure).new_full((len(rows), len(columns)), math.nan)
        at = [[(k, self._index[key]) for k, key in enumerate(keys) if key in self._index] for keys in (rows, columns)]
        if at[0] and at[1]:
            (to_row, from_row), (to_column, from_column) = (
                torch.tensor(pairs, dtype=torch.int64, device="cpu").unbind(1) for pairs in at
            )
            values[to_row[:, None], to_column] = self.matrix(measure)[from_row[:, None], from_column]
        return values

    def between_checkpoints(self, measure: str, layer: str | None = None) -> Tensor:
        """Return the similarity of the same layer in every two checkpoints, ``[C, C]``.

        Args:
            measure: Name of a measure.
            layer: One layer; None for the mean over layers.

        Returns:
            Rows and columns as ``checkpoints``; NaN where a layer failed everywhere.

        Raises:
            ValueError: an unknown measure or layer.
        """
        if layer is not None:
            _checks.check_choice("layer", layer, self.layers)
        parts = []
        for part in self.layers if layer is None else (layer,):
            keys = [(checkpoint.name, part) for checkpoint in self.checkpoints]
            parts.append(self.block(measure, keys, keys))
        return torch.stack(parts).nanmean(0)

    def between_layers(self, measure: str, *, checkpoints: Sequence[str] | None = None) -> Tensor:
        """Return the similarity of every two layers, ``[L, L]``: the mean over ordered pairs of different checkpoints.

        Args:
            measure: Name of a measure.
            checkpoints: Which to average over; None for the last one of each run, or all where there is a single run.

        Returns:
            Rows and columns as ``layers``; of a single checkpoint its own layers.

        Raises:
            ValueError: an unknown measure or checkpoint.
        """
        values = self._networks(measure, self.compared(checkpoints))
        return values.double().nanmean((0, 2)).to(values.dtype)

    def _networks(self, measure: str, names: Sequence[str]) -> Tensor:
        """Values ``[C, L, C, L]`` between networks; NaN within one (unless it is the only one) and for failures."""
        keys = [(name, layer) for name in names for layer in self.layers]
        values = self.block(measure, keys, keys).view(2 * (len(names), len(self.layers)))
        if len(names) > 1:
            values.diagonal(dim1=0, dim2=2).fill_(math.nan)
        return values

    def compared(self, checkpoints: Sequence[str] | None = None) -> list[str]:
        """Return the names of the checkpoints whose layers are compared, by default as :meth:`between_layers` says."""
        known = [checkpoint.name for checkpoint in self.checkpoints]
        if checkpoints is None:
            return self.finals if len(self.runs) > 1 else known
        for name in checkpoints:
            _checks.check_choice("checkpoints", name, known)
        return list(dict.fromkeys(checkpoints))

    def layer_matching(self, measure: str, *, checkpoints: Sequence[str] | None = None) -> LayerMatching | None:
        """Count how often the most similar layer of another network is the same layer.

        For every ordered pair of different checkpoints and every layer of the first, the layer of the second that is
        most similar (at the smallest distance) is taken; a tie counts as wrong. Guessing gives ``1 / L``.

        Args:
            measure: Name of a measure.
            checkpoints: As in :meth:`between_layers`.

        Returns:
            None where there are not two checkpoints with two layers each.

        Raises:
            ValueError: an unknown measure or checkpoint.
        """
        names = self.compared(checkpoints)
        self.matrix(measure)
        if len(names) < 2:
            return None
        right, decisions, same, other = 0, 0, 0.0, 0.0
        shares: list[float] = []
        sign = -1 if measure in MEASURES and MEASURES[measure].is_distance else 1
        for rows in self._networks(measure, names).double():
            # of one network: its layer i against layer j of network b, [b, i, j]
            rows = rows.transpose(0, 1)
            own = rows.diagonal(dim1=1, dim2=2).clone()
            rows.diagonal(dim1=1, dim2=2).fill_(math.nan)
            present = ~rows.isnan()
            decided = ~own.isnan() & present.any(-1)
            best = (sign * rows).masked_fill(~present, -math.inf).amax(-1)
            found, asked = (decided & (sign * own > best)).sum(-1), decided.sum(-1)
            shares += (found / asked)[asked > 0].tolist()
            right, decisions = right + int(found.sum()), decisions + int(asked.sum())
            same += float(own[decided].sum())
            other += float(rows.nanmean(-1)[decided].sum())
        if not decisions:
            return None
        stderr = statistics.stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
        means = same / decisions, other / decisions
        return LayerMatching(right / decisions, 1 / len(self.layers), decisions, *means, stderr)

    def remarks(self) -> list[Remark]:
        """What is to be known of the representations, those of one kind together whatever their numbers."""
        kinds: dict[str, tuple[str, list[Item]]] = {}
        for item in self.items:
            for text in item.remarks:
                kinds.setdefault(kind_of(text), (text, []))[1].append(item)
        return [Remark(text, tuple(items)) for text, items in kinds.values()]

    def below_chance(self) -> dict[str, str]:
        """Say of each measure that lies on the wrong side of chance what that means, ``{measure: sentence}``.

        It is one whose mean over the same layers of different checkpoints (over different layers, where there is one
        checkpoint) is farther than shuffled rows by three of their standard deviations and by 5% of the way to the
        value of equals. Pairs have chance levels of their own, and differ a little from that of an item to itself.
        """
        found = {}
        for name in self.measures:
            if name not in MEASURES or not self.chance_std.get(name, math.nan) > 0:
                continue
            several = len(self.checkpoints) > 1
            values = (self.between_checkpoints(name) if several else self.between_layers(name)).double()
            values = values[~torch.eye(len(values), dtype=torch.bool, device=values.device)]
            mean, chance = float(values.nanmean()), float(self.chance[name].mean())
            closest = MEASURES[name].closest
            farther = mean - chance if MEASURES[name].is_distance else chance - mean
            if farther > max(3 * self.chance_std[name], 0.05 * abs(closest - chance)):
                found[name] = below_chance(name, mean, chance)
        return found

    def trajectories(self, measure: str) -> list[Trajectory]:
        """Return for each run the similarity of its checkpoints to its last one, layer by layer.

        Runs with fewer than two checkpoints whose step is known are left out. A last checkpoint without a step is
        counted one step after the one before it.

        Raises:
            ValueError: an unknown measure.
        """
        self.matrix(measure)
        found = []
        for run, members in self.runs.items():
            checkpoints = [checkpoint for checkpoint in members[:-1] if checkpoint.step is not None] + members[-1:]
            if len(checkpoints) < 2:
                continue
            steps = [checkpoint.step for checkpoint in checkpoints if checkpoint.step is not None]
            if len(steps) < len(checkpoints):
                steps.append(steps[-1] + 1)
            values = [
                self.block(measure, [(c.name, layer) for c in checkpoints], [(checkpoints[-1].name, layer)])
                for layer in self.layers
            ]
            found.append(Trajectory(run, tuple(steps), self.layers, torch.cat(values, dim=1)))
        return found

    @property
    def _sides(self) -> list[list[Any]]:
        by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        return [[i.checkpoint, i.layer, by_name[i.checkpoint].run, by_name[i.checkpoint].step] for i in self.items]

    @property
    def _header(self) -> list[str]:
        return [*(f"x_{name}" for name in _COLUMNS), *(f"y_{name}" for name in _COLUMNS), *self.measures]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with a row per ordered pair of items and a column per measure."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError('to_pandas needs pandas: pip install "lfm-torch[pandas]"') from error
        n = len(self.items)
        columns = [pandas.Series(list(values), dtype=object) for values in zip(*self._sides, strict=True)]
        frame = pandas.DataFrame()
        for side, order in (("x", np.repeat(np.arange(n), n)), ("y", np.tile(np.arange(n), n))):
            for name, column in zip(_COLUMNS, columns, strict=True):
                dtype = "Int64" if name == "step" else pandas.Series(["a"]).dtype
                frame[f"{side}_{name}"] = column.astype(dtype).take(order).reset_index(drop=True)
        for measure in self.measures:
            frame[measure] = np.concatenate([np.array(row) for row in _rounded(self.matrices[measure])])
        return frame

    def save(self, path: str | Path) -> Path:
        """Write a row per ordered pair of items to a .csv or .parquet file, or to ``similarity.csv`` in a directory.

        Returns:
            The file written.

        Raises:
            ValueError: another ending.
        """
        path = Path(path)
        if path.is_dir() or not path.suffix:
            path = path / "similarity.csv"
        if path.suffix not in (".csv", ".parquet"):
            raise ValueError(f"path must be a directory or end on .csv or .parquet, got {path.name!r}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            binary = io.BytesIO()
            self.to_pandas().to_parquet(binary, index=False)
            _files.write_atomically(path, binary.getvalue())
            return path
        with _files.replacing(path) as file:
            for text in self._csv():
                file.write(text.encode())
        return path

    def _csv(self) -> Iterator[str]:
        """Return the table as text, a row of the matrices at a time: with millions of lines it is never whole."""
        yield _csv_line(self._header) + "\n"
        sides = [_csv_line(side) for side in self._sides]
        columns = [self.matrices[measure] for measure in self.measures]
        # nine digits bring every float32 back, seventeen every float64
        numbers = ",".join("%.9g" if column.dtype == torch.float32 else "%.17g" for column in columns)
        for i, side in enumerate(sides):
            line = f"{side.replace('%', '%%')},%s,{numbers}\n"
            rows = zip(sides, *(column[i].tolist() for column in columns), strict=True)
            yield "".join([line % row for row in rows])

    def report(self, directory: str | Path, *, format: Literal["csv", "parquet"] = "csv") -> Path:
        """Write ``report.html`` (self-contained), the table and PNG figures to a directory.

        Returns:
            The report.

        Raises:
            ImportError: matplotlib or jinja2 is missing.
        """
        from lfm_torch.report import write_report

        return write_report(self, directory, format=format)


def _rounded(matrix: Tensor) -> list[list[float]]:
    values: list[list[float]] = matrix.tolist()
    if matrix.dtype != torch.float32:
        return values
    # float32 as Python floats would show digits that it does not have; nine bring every one of its values back
    return [[float(f"{value:.9g}") for value in row] for row in values]


def _csv_line(values: Sequence[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="").writerow(values)
    return text.getvalue()
