"""Watching representations while a model trains: :class:`Monitor` for any loop, with alerts."""

from lfm_torch.training.alerts import Alert, Event
from lfm_torch.training.monitor import Monitor, MonitorOptions, metrics_of
from lfm_torch.training.tracker import Point

__all__ = ["Alert", "Event", "Monitor", "MonitorOptions", "Point", "metrics_of"]
