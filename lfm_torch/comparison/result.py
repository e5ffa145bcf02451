"""The record of a comparison: one matrix per measure over all representations, and the views people ask of it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._warnings import kind_of
from lfm_torch.comparison.items import Failure, Item, Remark
from lfm_torch.comparison.tables import data_frame, write_table
from lfm_torch.measures.table import MEASURES, below_chance, full_name
from lfm_torch.representations.checkpoint_files import Checkpoint

if TYPE_CHECKING:
    import pandas


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
        from statistics import stdev  # takes longer to import than most of the library

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
        stderr = stdev(shares) / math.sqrt(len(shares)) if len(shares) > 1 else math.nan
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
    def _sides(self) -> list[tuple[Any, ...]]:
        by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        return [(i.checkpoint, i.layer, by_name[i.checkpoint].run, by_name[i.checkpoint].step) for i in self.items]

    def to_pandas(self) -> pandas.DataFrame:
        """Return a data frame with a row per ordered pair of items and a column per measure."""
        return data_frame(self._sides, self.matrices)

    def save(self, path: str | Path) -> Path:
        """Write a row per ordered pair of items to a .csv or .parquet file, or to ``similarity.csv`` in a directory.

        Returns:
            The file written.

        Raises:
            ValueError: another ending.
        """
        return write_table(path, self._sides, self.matrices)

    def report(self, directory: str | Path, *, format: Literal["csv", "parquet"] = "csv") -> Path:
        """Write ``report.html`` (self-contained), the table and PNG figures to a directory.

        Returns:
            The report.

        Raises:
            ImportError: matplotlib or jinja2 is missing.
        """
        from lfm_torch.report import write_report

        return write_report(self, directory, format=format)
