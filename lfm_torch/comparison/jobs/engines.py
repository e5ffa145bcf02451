"""Who does the work: threads of this process, or the processes of torch.distributed. Same tasks, same numbers.

Ray is in :mod:`lfm_torch.integrations.ray`.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import os
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from lfm_torch import _checks
from lfm_torch.comparison.jobs.job import Job
from lfm_torch.comparison.jobs.pieces import run_task

ENGINES = ("local", "torch", "ray")
_WAITING = datetime.timedelta(hours=6)


class Engine(Protocol):
    """Runs tasks of a job somewhere."""

    def run(self, job: Job, tasks: Sequence[Any], *, limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """Do the tasks, at most ``limit`` at once in a process; yield ``(index, result)`` in the order they finish."""

    def close(self, result: Any = None) -> None:
        """Let the workers go, with the result of it all where they want to know."""


def make_engine(engine: Engine | str) -> Engine:
    """Return the engine of a name, or the one given.

    Raises:
        ValueError: an unknown name, or one that cannot be had here.
        ImportError: ray is missing.
    """
    if not isinstance(engine, str):
        return engine
    _checks.check_choice("engine", engine, ENGINES)
    if engine == "ray":
        from lfm_torch.integrations.ray import RayEngine

        return RayEngine()
    return DistributedEngine() if engine == "torch" else LocalEngine()


class LocalEngine:
    """Threads of this process, one piece each: torch works outside the interpreter's lock.

    Args:
        workers: How many; None for torch's number of threads on the CPU, one on a GPU.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers

    def run(self, job: Job, tasks: Sequence[Any], *, limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """Do the tasks and yield ``(index, result)`` as they finish."""
        threads = torch.get_num_threads()
        workers = self.workers or (threads if job.device == "cpu" else 1)
        workers = max(1, min(workers, len(tasks), limit or workers))
        pool = concurrent.futures.ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
        running: dict[concurrent.futures.Future[Any], int] = {}
        waiting = iter(enumerate(tasks))
        try:
            while True:
                # a few in hand: results are taken one by one, and a task may be large
                while len(running) < 2 * workers and (pair := next(waiting, None)) is not None:
                    running[pool.submit(run_task, job, pair[1])] = pair[0]
                if not running:
                    return
                done, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
                for future in done:
                    yield running.pop(future), future.result()
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
            # set_num_threads in the workers reaches MKL's setting for all threads
            torch.set_num_threads(threads)

    def close(self, result: Any = None) -> None:
        """Nothing to let go."""


class DistributedEngine:
    """The processes of torch.distributed, started by ``torchrun``; they must see the same store and checkpoints.

    Rank 0 plans, keeps the index and writes the report. The others take their share of every list of tasks that it
    announces, each on the threads it is given (``OMP_NUM_THREADS``) or on the GPU of its local rank. Objects travel
    over gloo, so no GPU-to-GPU network is needed.

    Raises:
        ValueError: not started by ``torchrun``.
    """

    def __init__(self, *, workers: int | None = None) -> None:
        import torch.distributed as dist

        if not dist.is_available():
            raise ValueError("engine must be 'local' or 'ray': this torch is built without torch.distributed")
        if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            raise ValueError("engine='torch' must be started by torchrun: torchrun -m lfm_torch.cli compare ...")
        self._dist, self._local = dist, LocalEngine(workers)
        self._owns = not dist.is_initialized()
        if self._owns:
            dist.init_process_group("gloo", timeout=_WAITING)
        self._group = dist.new_group(backend="gloo", timeout=_WAITING)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._together = True

    def run(self, job: Job, tasks: Sequence[Any], *, limit: int | None = None) -> Iterator[tuple[int, Any]]:
        """On rank 0: announce the tasks, do a share, and yield everyone's results round by round."""
        tasks = list(tasks)
        self._together = False
        self._say(("tasks", (tasks, limit, job.cache_bytes)))
        yield from self._rounds(job, tasks, limit)
        self._together = True

    def serve(self, job: Job) -> Any:
        """On the other ranks: do shares until rank 0 closes; return its result.

        Raises:
            RuntimeError: rank 0 ended without one.
        """
        while (message := self._say(None))[0] == "tasks":
            tasks, limit, job.cache_bytes = message[1]
            for _ in self._rounds(job, tasks, limit):
                pass
        if message[1] is None:
            raise RuntimeError("rank 0 ended without a result; its error says why")
        return message[1]

    def close(self, result: Any = None) -> None:
        """Tell the other ranks that the work is done, and the result."""
        # after an interruption in the middle of a round the others wait for something else, and torchrun ends them
        if self.rank == 0 and self._together:
            self._say(("done", result))
        if self._owns and self._together:
            self._dist.destroy_process_group()

    def _say(self, message: Any) -> Any:
        box = [message]
        self._dist.broadcast_object_list(box, src=0, group=self._group)
        return box[0]

    def _rounds(self, job: Job, tasks: list[Any], limit: int | None) -> Iterator[tuple[int, Any]]:
        """Take turns: in every round each rank does two tasks a thread, then rank 0 gathers, so that little is lost."""
        mine = 2 * (self._local.workers or torch.get_num_threads())
        counts: list[Any] = [None] * self.size
        self._dist.all_gather_object(counts, mine, group=self._group)
        first = sum(counts[: self.rank])
        for start in range(0, len(tasks), sum(counts)):
            share = range(start + first, min(start + first + mine, len(tasks)))
            try:
                finished = self._local.run(job, [tasks[i] for i in share], limit=limit)
                done: Any = [(share[i], result) for i, result in finished]
            # the others wait for this rank: the error travels to rank 0, which ends all
            except Exception as error:
                done = error
            gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
            self._dist.gather_object(done, gathered, dst=0, group=self._group)
            failed = [part for part in gathered or () if isinstance(part, BaseException)]
            if self._say(bool(failed)):
                self._together = True
                if failed:
                    raise failed[0]
                return
            for part in gathered or ():
                yield from part
