"""Comparison on a Ray cluster, or the workers of a local one: ``compare(..., engine="ray")``."""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from lfm_torch.comparison.jobs.job import Job
from lfm_torch.comparison.jobs.pieces import quiet_workers, run_task


class RayEngine:
    """Actors on the CPUs of a Ray cluster, one piece each at a time; they must see the store and the checkpoints.

    An initialised Ray is used as it is (also a cluster joined through ``RAY_ADDRESS``); otherwise one is started on
    this machine and ended with the comparison.

    Args:
        workers: How many actors; None for one a CPU (one a GPU, where pairs are computed there).

    Raises:
        ImportError: ray is missing.
    """

    def __init__(self, workers: int | None = None) -> None:
        try:
            import ray
        except ImportError as error:
            raise ImportError('engine="ray" needs ray: pip install "lfm-torch[ray]"') from error
        self._ray, self._workers = ray, workers
        self._started = not ray.is_initialized()
        if self._started:
            address = os.environ.get("RAY_ADDRESS")
            options: dict[str, Any] = {"address": address} if address else {"include_dashboard": False}
            ray.init(log_to_driver=False, logging_level="ERROR", **options)
        self._actors: list[Any] = []
        self._sent: tuple[Any, ...] = ()

    def run(self, job: Job, tasks: Sequence[Any], *, limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """Do the tasks and yield ``(index, result)`` in the order they finish."""
        self._prepare(job, len(tasks))
        waiting = iter(enumerate(tasks))
        running: dict[Any, tuple[int, Any]] = {}
        first = itertools.islice(waiting, 2 * len(self._actors))
        for actor, (index, task) in zip(itertools.cycle(self._actors), first, strict=False):
            running[actor.run.remote(task)] = (index, actor)
        while running:
            done, _ = self._ray.wait(list(running))
            for reference in done:
                index, actor = running.pop(reference)
                following = next(waiting, None)
                if following is not None:
                    running[actor.run.remote(following[1])] = (following[0], actor)
                yield index, self._result(reference)

    def close(self, result: Any = None) -> None:
        """Let the actors go, and Ray where it was started here."""
        for actor in self._actors:
            self._ray.kill(actor)
        self._actors = []
        if self._started:
            self._ray.shutdown()

    def _prepare(self, job: Job, n_tasks: int) -> None:
        on_gpu = job.device != "cpu"
        resources = self._ray.cluster_resources()
        count = self._workers or int(resources.get("GPU" if on_gpu else "CPU", 1))
        if not self._actors:
            options: dict[str, Any] = {"num_gpus": 1} if on_gpu else {"num_cpus": 1}
            kind = self._ray.remote(**options)(_actor_class())
            path = [entry or os.getcwd() for entry in sys.path]
            sent = self._ray.put(self._ray.cloudpickle.dumps(job))
            self._actors = [kind.remote(path, sent) for _ in range(max(1, min(count, n_tasks)))]
        if self._sent != (job.cache_bytes,):
            self._ray.get([actor.set_cache.remote(job.cache_bytes // len(self._actors)) for actor in self._actors])
            self._sent = (job.cache_bytes,)

    def _result(self, reference: Any) -> Any:
        try:
            return self._ray.get(reference)
        except self._ray.exceptions.RayTaskError as error:
            # what the task raised, not the wrapper with the worker's traceback in its message
            raise error.cause from error


def _actor_class() -> type:
    """The class of the actors, sent to them as code: a worker learns only from it where modules are to be found here.

    Ray's own ways to say so fail: a ``runtime_env`` starts no worker where a path holds a space.
    """

    class Actor:
        def __init__(self, path: list[str], job: bytes) -> None:
            import sys

            sys.path[:] = [*path, *(entry for entry in sys.path if entry not in path)]
            from ray import cloudpickle

            from lfm_torch.integrations.ray import _Worker

            self._worker = _Worker(cloudpickle.loads(job))

        def set_cache(self, cache_bytes: int) -> None:
            self._worker.set_cache(cache_bytes)

        def run(self, task: Any) -> Any:
            return self._worker.run(task)

    return Actor


class _Worker:
    """One process: holds the job and does one task after the other, on one thread like everyone."""

    def __init__(self, job: Job) -> None:
        torch.set_num_threads(1)
        quiet_workers()
        self._job = job

    def set_cache(self, cache_bytes: int) -> None:
        self._job.cache_bytes = cache_bytes

    def run(self, task: Any) -> Any:
        return run_task(self._job, task)
