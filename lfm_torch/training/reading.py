"""The layers that a monitor follows, read on the probe set: of the model in training, and of a fixed reference."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lfm_torch.representations.extraction import activations
from lfm_torch.representations.layers import unwrapped
from lfm_torch.representations.pooling import Pooling
from lfm_torch.representations.probe import is_sharded
from lfm_torch.representations.state_dicts import fitting_weights
from lfm_torch.training.distributed import is_rank_zero
from lfm_torch.training.tracker import Extracted, Reference, Tracker


@dataclass(frozen=True)
class LayerReader:
    """Reads the same layers of a model on the same probe, whenever it is asked."""

    probe: Any
    layers: list[str]
    pooling: Pooling
    batch_size: int

    def extract(self, model: nn.Module, tracker: Tracker) -> Extracted | Exception | None:
        """Extract on the ranks that must; None elsewhere. An error is a value: all ranks must come to the next step.

        The tracker gets its fixed reference where it has none yet.
        """
        start = time.perf_counter()
        try:
            if not is_rank_zero() and not is_sharded(model):
                return None
            layers = self._activations(model)
            if is_rank_zero() and tracker.needs_reference:
                tracker.set_reference(self._fixed_reference(model, tracker.reference))
        except Exception as error:
            return error
        device = next(iter(layers.values())).device
        ready = None
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            ready = torch.cuda.current_stream(device).record_event()
        return Extracted(layers, time.perf_counter() - start, ready)

    def _fixed_reference(self, model: nn.Module, reference: Reference) -> Mapping[str, Tensor]:
        if isinstance(reference, Mapping):
            return reference
        if isinstance(reference, nn.Module):
            return self._activations(reference)
        if is_sharded(model):
            raise ValueError(
                "reference must be a module, or representations, for a model that FSDP has split, got "
                f"{str(reference)!r}"
            )
        return self._activations(model, fitting_weights(unwrapped(model), reference))

    def _activations(self, model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return activations(
            model,
            self.probe,
            layers=self.layers,
            pooling=self.pooling,
            batch_size=self.batch_size,
            weights=weights,
        )
