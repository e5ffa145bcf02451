"""The options of a monitor, and what a callback hands on to the monitor that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, TypedDict

from lfm_torch.graphs.points import Metric
from lfm_torch.graphs.weights import Weights
from lfm_torch.representations.pooling import Pooling
from lfm_torch.training.alerts import Alert, Event

OnEvent = Callable[[Event], bool | None]


class ProbeOptions(TypedDict, total=False):
    """How the probe is run and reduced: the options of :func:`extract`, :func:`build_graph` and the basis.

    Numbers of neighbours and eigenvectors that the probe has no samples for are cut to what it has, with a warning.
    ``mode`` says which score is "best" ("min" or "max"); ``background`` whether graphs and bases are made in a thread
    of their own (see :class:`Monitor`).
    """

    pooling: Pooling
    batch_size: int
    n_neighbors: int | None
    n_basis: int | None
    metric: Metric
    weights: Weights
    mode: Literal["min", "max"]
    background: bool | None


class MonitorOptions(ProbeOptions, total=False):
    """What a callback hands on to its :class:`Monitor`."""

    measures: str | Sequence[str]
    alerts: Sequence[Alert]
    on_event: OnEvent | None
    on_error: Literal["warn", "raise"]
