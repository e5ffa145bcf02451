"""The chance level of a comparison: every representation against itself with its rows shuffled."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lfm_torch.comparison.jobs.engines import Engine
from lfm_torch.comparison.jobs.index import Waiting
from lfm_torch.comparison.jobs.job import Job
from lfm_torch.comparison.jobs.settings import value_name
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import Chance, Reduced
from lfm_torch.measures.table import MEASURES

# at least so many over all representations, and representations to a task
_CHANCE_DRAWS = 100
_CHANCE_TASK = 8


def chance_levels(
    job: Job, store: Store | None, engine: Engine, reduced: Sequence[Reduced]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Similarity of each item to itself with shuffled rows.

    Returns:
        Per measure the means ``[N]``, and the standard deviation over all draws of all items.
    """
    settings = job.settings
    draws = math.ceil(_CHANCE_DRAWS / len(reduced))
    size = (len(reduced), draws)
    values = {name: torch.full(size, math.nan, dtype=torch.float64, device="cpu") for name in settings.measures}
    for kind in settings.kinds:
        measures = settings.measures_of(kind)
        names = [value_name("chance", kind, entry.contents[kind], draws) for entry in reduced]
        present = set() if store is None else _stored_chance(store, names, measures, values)
        missing = [i for i in range(len(reduced)) if i not in present]
        parts = [missing[start : start + _CHANCE_TASK] for start in range(0, len(missing), _CHANCE_TASK)]
        keys = [tuple(reduced[i].keys[kind] for i in part) for part in parts]
        tasks = [Chance(kind, tuple(measures), of_part, reduced[0].n, draws) for of_part in keys]
        with Waiting(None if store is None else store.draws.write) as waiting:
            for index, found in engine.run(job, tasks):
                for i, drawn in zip(parts[index], found, strict=True):
                    for measure, numbers in drawn.items():
                        values[measure][i] = torch.tensor(numbers, dtype=torch.float64, device="cpu")
                        waiting.add([(names[i], measure, np.array(numbers).tobytes())])
    for name in settings.measures:
        if not MEASURES[name].paired:  # the order of rows is nothing to it: there is no chance level
            values[name].fill_(math.nan)
    return {name: v.mean(1) for name, v in values.items()}, {name: float(v.std()) for name, v in values.items()}


def _stored_chance(
    store: Store, names: Sequence[bytes], measures: Sequence[str], values: dict[str, Tensor]
) -> set[int]:
    """Write stored draws into ``values`` and return the items that have them for every measure."""
    present = set(range(len(names)))
    for measure in measures:
        found = store.draws.read(names, measure)
        present &= {i for i, name in enumerate(names) if name in found}
        for i in present:
            values[measure][i] = torch.from_numpy(np.frombuffer(found[names[i]]).copy())
    return present
