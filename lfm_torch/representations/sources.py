"""Where representations come from: given tensors, checkpoints, saved activations, pretrained models by name."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lfm_torch import _checks
from lfm_torch._checks import ArrayLike
from lfm_torch.representations.fingerprints import DigestOf, digest, value_digest

if TYPE_CHECKING:
    from lfm_torch.representations.checkpoint_files import Checkpoint

SINGLE_LAYER = "representation"


class Source(Mapping[str, Any]):
    """Names of networks and how to read their representations, ``{layer: [n, d]}``, one network at a time.

    Attributes:
        checkpoints: their runs and steps; empty to read them from the names.
        settings: what a report should say about them.
        device: where the representations are.
        threads: how many threads may read at once; None for any number.
    """

    device: str = "cpu"
    checkpoints: Sequence[Checkpoint] = ()

    @property
    def settings(self) -> dict[str, Any]:
        """What a report should say about where the representations come from."""
        return {}

    @property
    def threads(self) -> int | None:
        """How many threads may read at once; None for any number."""
        return None

    @property
    def n_samples(self) -> int | None:
        """Number of samples, where it is known without reading."""
        return None

    @abstractmethod
    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return for each layer of a network the digest of all its values depend on, without computing them.

        Args:
            name: The network.
            digest_of: ``digest_of(path, file_digest)`` gives the digest of a file, remembered by the store.
        """


class Given(Source):
    """Tensors or arrays, or any mapping that gives them: ``{network: {layer: [n, d]}}`` or ``{network: [n, d]}``."""

    def __init__(self, representations: Mapping[str, ArrayLike | Mapping[str, ArrayLike]]) -> None:
        self._given = representations
        try:
            tensors = (x for value in representations.values() for x in _layers_of(value).values())
            self.device = str(next((x.device for x in tensors if isinstance(x, Tensor)), torch.device("cpu")))
        # a mapping that fails when read fails again, name by name, where that is reported
        except Exception:
            self.device = "cpu"

    def __len__(self) -> int:
        return len(self._given)

    def __iter__(self) -> Iterator[str]:
        return iter(self._given)

    def __getitem__(self, name: str) -> ArrayLike | Mapping[str, ArrayLike]:
        return self._given[name]

    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return digests of the values themselves; what is no tensor or array is refused where it is read."""
        layers = _layers_of(self._given[name])
        return {layer: _digest(layer, x) for layer, x in layers.items()}


def _digest(layer: str, x: Any) -> str:
    try:
        return value_digest(_checks.as_tensor(layer, x))
    except TypeError:
        return digest("no tensor")


def _layers_of(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {SINGLE_LAYER: value}
