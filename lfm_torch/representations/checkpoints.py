"""Checkpoints of one architecture, read as representations one at a time."""

from __future__ import annotations

import copy
import functools
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch.representations.arrays import check_file
from lfm_torch.representations.batches import as_batches
from lfm_torch.representations.checkpoint_files import Checkpoint, weight_files
from lfm_torch.representations.checkpoint_search import find_checkpoints
from lfm_torch.representations.extraction import activations, move_model
from lfm_torch.representations.fingerprints import DigestOf, batches_digest, digest, file_digest, model_digest
from lfm_torch.representations.layers import resolve_layers
from lfm_torch.representations.pooling import POOLINGS, Pooling
from lfm_torch.representations.sources import Source
from lfm_torch.representations.state_dicts import load_weights


class Checkpoints(Source):
    """Checkpoints of one architecture as a lazy mapping of representations, ``{name: {layer: [n, d]}}``.

    Each is read, run on the probe set and let go when it is asked for, so that hundreds need the memory of one: what
    :func:`compare` takes.

    Args:
        checkpoints: What :func:`find_checkpoints` takes, or its result.
        model: A module, or a function that makes one; its weights are overwritten by each checkpoint in turn.
        data: Probe inputs, as in :func:`extract`.
        layers: Layer names or globs, as in :func:`extract`.
        pooling: "mean" or "flatten".
        batch_size: Samples per forward pass.
        device: Where to run the model; None for where it is.
        unsafe_pickle: Allow checkpoints that execute code when loaded.

    Raises:
        TypeError: ``model`` does not give a module, data of the wrong kind.
        ValueError: a layer that the model does not have, an unknown pooling, data that :func:`extract` refuses.

    Example:
        >>> import tempfile, torch
        >>> network = torch.nn.Sequential(torch.nn.Linear(4, 8))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for seed in range(2):
        ...         torch.save(network.state_dict(), f"{folder}/model_seed_{seed}.pt")
        ...     found = Checkpoints(folder, network, torch.randn(60, 4), layers="0")
        ...     {name: list(layers["0"].shape) for name, layers in found.items()}
        {'model_seed_0': [60, 8], 'model_seed_1': [60, 8]}
    """

    def __init__(
        self,
        checkpoints: str | Path | Sequence[str | Path | Checkpoint],
        model: nn.Module | Callable[[], nn.Module],
        data: Any,
        *,
        layers: str | Sequence[str],
        pooling: Pooling = "mean",
        batch_size: int = 256,
        device: torch.device | str | None = None,
        unsafe_pickle: bool = False,
    ) -> None:
        self.checkpoints = _as_checkpoints(checkpoints)
        self._by_name = {checkpoint.name: checkpoint for checkpoint in self.checkpoints}
        self.model = _made(model)
        self.layers = resolve_layers(self.model, layers)
        # what is wrong for every checkpoint is said once, before the first is read
        _checks.check_choice("pooling", pooling, POOLINGS)
        as_batches(data, batch_size)
        self.data, self.pooling, self.batch_size = data, pooling, batch_size
        self.unsafe_pickle = unsafe_pickle
        if device is not None:
            move_model(self.model, device)
        self.device = str(next((tensor.device for tensor in self.model.parameters()), torch.device("cpu")))
        self._lock = threading.Lock()
        self._idle: list[nn.Module] = []

    def __repr__(self) -> str:
        kind = type(self.model).__name__
        return f"Checkpoints({len(self)} of {kind}, layers {', '.join(self.layers)}, pooling {self.pooling})"

    def __len__(self) -> int:
        return len(self.checkpoints)

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        """Load one checkpoint and extract its layers; values that are not finite are left to the reader to judge."""
        path = self._by_name[name].path
        assert path is not None
        with self._borrowed_model() as model:
            load_weights(model, path, unsafe_pickle=self.unsafe_pickle)
            return activations(model, self.data, layers=self.layers, pooling=self.pooling, batch_size=self.batch_size)

    @contextmanager
    def _borrowed_model(self) -> Iterator[nn.Module]:
        """Lend each thread a copy of the model, or the model itself to one thread at a time."""
        if self.threads == 1:
            with self._lock:
                yield self.model
            return
        with self._lock:
            # of a model that is not in use: a copy of one in its forward pass has that pass's hooks
            model = self._idle.pop() if self._idle else copy.deepcopy(self.model)
        try:
            yield model
        finally:
            with self._lock:
                self._idle.append(model)

    @property
    def threads(self) -> int | None:
        """How many threads may read at once; None for any number."""
        one_at_a_time = not isinstance(self.data, (Tensor, np.ndarray, tuple, list, dict))
        # a data set or a loader need not be safe to read in two threads, and a GPU is shared as it is
        return 1 if one_at_a_time or self.device != "cpu" else None

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_lock", "_idle")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock, self._idle = threading.Lock(), []

    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return for each layer the digest of all that its values depend on: file, model, probe data, settings."""
        path = self._by_name[name].path
        assert path is not None
        check_file(path)
        weights = [digest_of(file, file_digest) for file in weight_files(path)]
        return {layer: digest("checkpoint", self._digest, weights, layer) for layer in self.layers}

    @functools.cached_property
    def _digest(self) -> str:
        data, _ = self._probe
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        return digest(model_digest(self.model), data, self.pooling, self.batch_size, kind)

    @functools.cached_property
    def _probe(self) -> tuple[str, int]:
        return batches_digest(as_batches(self.data, self.batch_size))

    @property
    def n_samples(self) -> int:
        """Number of probe inputs."""
        return self._probe[1]

    @property
    def settings(self) -> dict[str, Any]:
        """What a report should say about where the representations come from."""
        return {"model": type(self.model).__name__, "layers": self.layers, "pooling": self.pooling}


def _made(model: nn.Module | Callable[[], nn.Module]) -> nn.Module:
    if isinstance(model, nn.Module):
        return model
    if not callable(model):
        raise TypeError(f"model must be a torch.nn.Module or a function that makes one, got {type(model).__name__}")
    with torch.random.fork_rng(devices=()):
        made = model()
    if not isinstance(made, nn.Module):
        raise TypeError(f"model must make a torch.nn.Module, got {type(made).__name__}")
    return made


def _as_checkpoints(checkpoints: str | Path | Sequence[str | Path | Checkpoint]) -> list[Checkpoint]:
    if not isinstance(checkpoints, (str, Path)) and all(isinstance(c, Checkpoint) for c in checkpoints):
        listed = [c for c in checkpoints if isinstance(c, Checkpoint)]
        names = [c.name for c in listed]
        if not listed or len(set(names)) < len(names) or any(c.path is None for c in listed):
            raise ValueError("checkpoints must be at least one, with a path each and names that differ")
        return listed
    if isinstance(checkpoints, (str, Path)):
        return find_checkpoints(checkpoints)
    if any(isinstance(c, Checkpoint) for c in checkpoints):
        raise TypeError("checkpoints must be all paths or all Checkpoint records, got a mixture")
    return find_checkpoints([c for c in checkpoints if not isinstance(c, Checkpoint)])
