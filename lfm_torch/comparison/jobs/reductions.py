"""All representations of a comparison: which are in the store, which are read and reduced, and what failed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lfm_torch import _checks
from lfm_torch.comparison.items import Failure
from lfm_torch.comparison.jobs import memory
from lfm_torch.comparison.jobs.engines import Engine
from lfm_torch.comparison.jobs.index import Waiting
from lfm_torch.comparison.jobs.job import Job
from lfm_torch.comparison.jobs.settings import identity_without, rows_key
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import Reduced, Reduction, Screened, Screening, known_rows, left_out_of
from lfm_torch.representations.nonfinite import Nonfinite

Progress = Callable[[str, int, int], None]
# that of the public function: who reads the log chooses by its name
logger = logging.getLogger("lfm_torch.compare")


@dataclass
class Reductions:
    """The representations of one comparison on their way: what is done, and where to."""

    job: Job
    store: Store | None
    engine: Engine
    progress: Progress
    memory_budget: int | None
    nonfinite: Nonfinite
    left_out: tuple[int, ...] = ()

    def screen_all(self) -> int | None:
        """Find the samples to leave out and return how many there are in all; None where nothing can be read."""
        names = list(self.job.source)
        screened: dict[str, dict[str, Screened]] = {}
        tasks = []
        for name in names:
            identities, screened[name] = self._screened(name)
            if identities is None or identities:
                tasks.append(Screening(name, identities))
        done = len(names) - len(tasks)
        self.progress("samples", done, len(names))
        with Waiting(None if self.store is None else self.store.keep) as waiting:
            for index, found in self.engine.run(self.job, tasks, limit=self._readers(None)):
                task = tasks[index]
                screened[task.checkpoint] |= found
                done += 1
                self.progress("samples", done, len(names))
                if task.identities is not None:
                    waiting.add([(rows_key(task.identities[layer]), one.info) for layer, one in found.items()])
        every = [one for name in names for one in screened[name].values()]
        n, self.left_out = left_out_of(every)
        if n is not None:
            self.job.settings.check_against(n - len(self.left_out))
        return n

    def _screened(self, name: str) -> tuple[dict[str, str] | None, dict[str, Screened]]:
        """Return the identities of the layers to be looked at (None for all) and what the store knows of the others."""
        if self.store is None:
            return None, {}
        try:
            identities = self.job.source.identities(name, self.store.digest_of)
        # said where it is reduced
        except Exception:
            return {}, {}
        known = known_rows(self.store, identities)
        return {layer: identity for layer, identity in identities.items() if layer not in known}, known

    def reduce_all(self) -> tuple[list[Reduced], list[Failure]]:
        """Reduce what is not in the store; what fails is listed with its reason, in the order of the source."""
        names = list(self.job.source)
        n = self.screen_all() if self.nonfinite == "drop" else None
        reduced: dict[str, list[Reduced]] = {}
        failures: dict[str, list[Failure]] = {name: [] for name in names}
        tasks = []
        for name in names:
            identities, reduced[name] = self._present(name, failures[name])
            if identities is None or identities:
                tasks.append(Reduction(name, identities, n, self.left_out))
        if self.store is not None:
            self.store.keep(_pieces_of([entry for entries in reduced.values() for entry in entries]))
        done = len(names) - len(tasks)
        self.progress("representations", done, len(names))
        if done:
            logger.info("%d of %d checkpoints are in the store", done, len(names))
        first = next((entries[0] for entries in reduced.values() if entries), None)
        n = n if first is None else first.n + len(self.left_out)
        while tasks and n is None:
            # the first one says how many samples there are, which all the others must have
            n = next(self._reduce(tasks[:1], reduced, failures))
            done += 1
            self.progress("representations", done, len(names))
            tasks = tasks[1:]
        rest = [task._replace(n=n) for task in tasks]
        for _ in self._reduce(rest, reduced, failures, limit=self._readers(n)):
            done += 1
            self.progress("representations", done, len(names))
        for name in names:
            for entry in [entry for entry in reduced[name] if entry.n + len(self.left_out) != n]:
                reduced[name].remove(entry)
                reason = f"the representation must have the {n} rows of the others, got {entry.n}"
                failures[name].append(Failure(name, entry.layer, reason))
        return [e for name in names for e in reduced[name]], [f for name in names for f in failures[name]]

    def _present(self, name: str, failures: list[Failure]) -> tuple[dict[str, str] | None, list[Reduced]]:
        """Return the identities of the layers to be reduced (None for all) and the layers that are in the store."""
        if self.store is None:
            return None, []
        try:
            identities = self.job.source.identities(name, self.store.digest_of)
        # isolation, as where it is read: a missing file fails alone
        except Exception as error:
            failures.append(Failure(name, None, _checks.one_line(error)))
            return {}, []
        settings = self.job.settings
        identities = {layer: identity_without(identity, self.left_out) for layer, identity in identities.items()}
        found = []
        for place, (layer, identity) in enumerate(identities.items()):
            keys = {kind: settings.key(kind, identity) for kind in settings.kinds}
            infos = [self.store.info(key) for key in keys.values()]
            if all(info is not None for info in infos):
                info = infos[0] or {}
                stats = {field: info[field] for field in ("n_components", "n_unconverged", "note")}
                stats["notes"] = tuple(dict.fromkeys(text for about in infos for text in (about or {})["notes"]))
                contents = {kind: (about or {})["content"] for kind, about in zip(keys, infos, strict=True)}
                found.append(Reduced(name, layer, place, info["n"], info["dtype"], keys, contents, **stats))
        present = {entry.layer for entry in found}
        return {layer: identity for layer, identity in identities.items() if layer not in present}, found

    def _reduce(
        self,
        tasks: Sequence[Reduction],
        reduced: dict[str, list[Reduced]],
        failures: dict[str, list[Failure]],
        limit: int | None = 1,
    ) -> Iterator[int | None]:
        with Waiting(None if self.store is None else self.store.keep) as waiting:
            for index, (found, failed) in self.engine.run(self.job, tasks, limit=limit):
                name = tasks[index].checkpoint
                failures[name] += failed
                reduced[name] = sorted((*reduced[name], *found), key=lambda entry: entry.place)
                waiting.add(_pieces_of(found))
                for failure in failed:
                    logger.warning("not compared: %s", failure)
                yield found[0].n + len(self.left_out) if found else None

    def _readers(self, n: int | None) -> int | None:
        """How many checkpoints may be reduced side by side: as many as source and memory allow."""
        settings = self.job.settings
        # edges of the graph while it is made symmetric, and the vectors of the eigensolver
        of_sample = 48 * settings.neighbors_of(n or 2) + 64 * settings.basis_of(n or 2)
        each = (n or 0) * of_sample if settings.map_measures else 0
        by_memory = memory.workers(self.memory_budget, each)
        return min(by_memory, self.job.source.threads or by_memory)

    def plan_memory(self, reduced: Sequence[Reduced]) -> None:
        """Say how much of the bases may be held in memory at a time."""
        matrices = len(reduced) ** 2 * 4 * len(self.job.settings.measures)
        self.job.cache_bytes = memory.cache_bytes(self.memory_budget, reserved=2 * matrices)


def _pieces_of(reduced: Sequence[Reduced]) -> list[tuple[str, dict[str, Any]]]:
    return [(key, {"kind": kind, **entry.info}) for entry in reduced for kind, key in entry.keys.items()]
