"""From a model in training and a fixed probe set to a history: how far its layers have moved, and alerts.

Takes the module, inputs and the names of layers, measures them against a reference again and again, and leaves the
training as it is, bit for bit; gives a :class:`Monitor` with its :class:`Point` s, the files of them, and events.
"""

from lfm_torch.training.alerts import Alert, Event
from lfm_torch.training.history import Point, metrics_of
from lfm_torch.training.monitor import Monitor
from lfm_torch.training.options import MonitorOptions

__all__ = ["Alert", "Event", "Monitor", "MonitorOptions", "Point", "metrics_of"]
