"""What a comparison would do, and about how long it would take: ``lfm-torch compare --dry-run``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lfm_torch import _checks
from lfm_torch.comparison.jobs.settings import Settings, identity_without
from lfm_torch.comparison.jobs.store import Store
from lfm_torch.comparison.jobs.tasks import known_rows, left_out_of
from lfm_torch.measures.stacked_maps import Maps
from lfm_torch.pipeline import representation_basis
from lfm_torch.representations.nonfinite import Nonfinite
from lfm_torch.representations.sources import Source

# samples of the trial that the estimate is made of, at most
_TRIAL = 2000
_TRIAL_WIDTH = 64


@dataclass(frozen=True)
class Plan:
    """What is there and what is to do.

    Attributes:
        checkpoints: number of networks.
        representations: number of layers in all of them.
        stored: how many of these are in the store.
        pairs: pairs to compare that involve a representation not in the store, at least.
        samples: number of samples, None where it is not known without reading.
        seconds: about how long reducing and comparing take on this machine, extraction not counted.
        store_bytes: about what the store grows by.
        problems: networks that could not be looked at, with the reason.
    """

    checkpoints: int
    representations: int
    stored: int
    pairs: int
    samples: int | None
    seconds: float | None
    store_bytes: int | None
    problems: tuple[str, ...]


def plan(source: Source, settings: Settings, store: Store | None, *, nonfinite: Nonfinite = "raise") -> Plan:
    """Look at files and store, time one piece of each kind on made-up data, and say what there is to do.

    With ``nonfinite="drop"`` the samples left out are known as far as a former comparison has found them.
    """
    total, stored = 0, 0
    seconds: list[float] = []
    problems = []
    samples = source.n_samples
    looked_at = [_identities(source, name, store) for name in source]
    left_out: tuple[int, ...] = ()
    if nonfinite == "drop" and store is not None:
        found, left_out = left_out_of([one for layers, _ in looked_at for one in known_rows(store, layers).values()])
        samples = samples if found is None else found - len(left_out)
    for identities, problem in looked_at:
        problems += [problem] if problem else []
        for whole in identities.values():
            total += 1
            identity = identity_without(whole, left_out)
            infos = [] if store is None else [store.info(settings.key(kind, identity)) for kind in settings.kinds]
            present = [info for info in infos if info is not None]
            if present and len(present) == len(infos):
                stored += 1
            seconds += [info["seconds"] for info in present if "seconds" in info]
            samples = present[0]["n"] if samples is None and present else samples
    missing = total - stored
    pairs = missing * stored + missing * (missing + 1) // 2
    if samples is None:
        return Plan(len(source), total, stored, pairs, None, None, None, tuple(problems))
    settings.check_against(samples)
    each = sum(seconds) / len(seconds) if seconds else _seconds_of_a_basis(samples, settings)
    threads = torch.get_num_threads() if source.device == "cpu" else 1
    duration = (missing * each + pairs * _seconds_of_a_pair(samples, settings)) / threads
    size = missing * 4 * settings.basis_of(samples) * (samples + 1) if settings.map_measures else 0
    return Plan(len(source), total, stored, pairs, samples, duration, size, tuple(problems))


def _identities(source: Source, name: str, store: Store | None) -> tuple[dict[str, str], str]:
    try:
        return source.identities(name, (lambda path, compute: compute(path)) if store is None else store.digest_of), ""
    # isolation, as in the comparison itself
    except Exception as error:
        return {}, f"{name}: {_checks.one_line(error)}"


def _seconds_of_a_basis(n: int, settings: Settings) -> float:
    """Time graph and basis of random points; beyond the trial's size they grow with n squared."""
    if not settings.map_measures:
        return 0.0
    trial = min(n, _TRIAL)
    neighbors = None if settings.n_neighbors is None else min(settings.n_neighbors, trial - 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(trial, _TRIAL_WIDTH, generator=generator, dtype=torch.float32, device="cpu")
    n_basis = min(settings.basis_of(n), trial - 1)

    def reduce() -> None:
        representation_basis(
            x, n_neighbors=neighbors, n_basis=n_basis, metric=settings.metric, weights=settings.weights
        )

    return _seconds(reduce) * (n / trial) ** 2


def _seconds_of_a_pair(n: int, settings: Settings) -> float:
    """Time a small block of maps and their readings, for one pair."""
    trial, side, times = min(n, _TRIAL), 8, 3
    generator, m = torch.Generator().manual_seed(0), settings.basis_of(n)
    evecs = torch.randn(side, m, trial, generator=generator, dtype=torch.float32, device="cpu")
    evals = evecs.new_zeros(side, m)

    def compare() -> None:
        for _ in range(times):
            Maps.between(evecs, evals, evecs, evals).totals()

    return _seconds(compare) / (times * side**2) * (n / trial)


def _seconds(work: Callable[[], None]) -> float:
    """Time work on one thread, as workers do it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started
    finally:
        torch.set_num_threads(threads)
