"""Models of different architectures as a source of representations: given ones, or pretrained ones by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch.representations.batches import as_batches
from lfm_torch.representations.extraction import activations, move_model
from lfm_torch.representations.fingerprints import DigestOf, batches_digest, digest, model_digest, value_digest
from lfm_torch.representations.layers import resolve_layers
from lfm_torch.representations.pooling import Pooling
from lfm_torch.representations.sources import Source

ORIGINS = ("timm", "torchvision", "transformers")


def named_model(name: str) -> nn.Module:
    """Make a pretrained model: ``timm:NAME``, ``torchvision:NAME`` or ``transformers:FOLDER_OR_NAME``.

    The weights are those the package has or downloads; only safetensors are taken for transformers.

    Raises:
        ValueError: not of that form, a name the package does not have, or weights that it cannot read or download.
        ImportError: the package is missing.
    """
    origin, colon, rest = name.partition(":")
    if not (colon and rest):
        raise ValueError(f"a model must be named as origin:name, the origin one of {', '.join(ORIGINS)}, got {name!r}")
    _checks.check_choice("the origin of a model", origin, ORIGINS)
    try:
        model = _MAKERS[origin](rest)
    except ImportError as error:
        raise ImportError(f"{name!r} needs {origin}, which does not import: {_checks.one_line(error)}") from error
    except OSError as error:  # no network, no such folder, an incomplete download
        raise ValueError(f"{name!r} could not be loaded by {origin}: {_checks.one_line(error)}") from error
    except (RuntimeError, KeyError) as error:
        raise ValueError(f"{name!r} must name a model of {origin}, got {_checks.one_line(error)}") from error
    if not isinstance(model, nn.Module):
        raise TypeError(f"{name!r} must make a torch.nn.Module, got {type(model).__name__}")
    return model


def _from_timm(name: str) -> Any:
    import timm

    return timm.create_model(name, pretrained=True)


def _from_torchvision(name: str) -> Any:
    from torchvision.models import get_model

    return get_model(name, weights="DEFAULT")


def _from_transformers(name: str) -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(name, use_safetensors=True, local_files_only=Path(name).is_dir())


_MAKERS: dict[str, Callable[[str], Any]] = {
    "timm": _from_timm,
    "torchvision": _from_torchvision,
    "transformers": _from_transformers,
}


class Models(Source):
    """Models of different architectures as a lazy mapping of representations, ``{name: {layer: [n, d]}}``.

    Args:
        models: ``{name: module or function that makes one}``, or names that :func:`named_model` takes.
        data: Probe inputs, as in :func:`extract`; every model gets the same.
        layers: Layer names or globs, as in :func:`extract`: each model must have a match.
        pooling: "mean" or "flatten".
        batch_size: Samples per forward pass.
        device: Where to run; None for where a model is.

    Raises:
        ValueError: no model, data that :func:`extract` refuses.

    Example:
        >>> import torch
        >>> nets = {f"width {w}": torch.nn.Sequential(torch.nn.Linear(4, w), torch.nn.Tanh()) for w in (8, 16)}
        >>> source = Models(nets, torch.randn(60, 4), layers="1")
        >>> {name: list(layers["1"].shape) for name, layers in source.items()}
        {'width 8': [60, 8], 'width 16': [60, 16]}
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module | Callable[[], nn.Module]] | Sequence[str],
        data: Any,
        *,
        layers: str | Sequence[str],
        pooling: Pooling = "mean",
        batch_size: int = 256,
        device: torch.device | str | None = None,
    ) -> None:
        named = models if isinstance(models, Mapping) else dict.fromkeys(models)
        if not named:
            raise ValueError("models must hold at least one model, got none")
        self._models, self.data, self.layers = dict(named), data, layers
        self.pooling, self.batch_size = pooling, batch_size
        self.device = "cpu" if device is None else str(move_model(nn.Linear(1, 1), device))
        as_batches(data, batch_size)

    def __len__(self) -> int:
        return len(self._models)

    def __iter__(self) -> Iterator[str]:
        return iter(self._models)

    def _model(self, name: str) -> nn.Module:
        maker = self._models[name]
        if isinstance(maker, nn.Module):
            return maker
        with torch.random.fork_rng(devices=()):
            return named_model(name) if maker is None else maker()

    def __getitem__(self, name: str) -> dict[str, Tensor]:
        options: dict[str, Any] = {"pooling": self.pooling, "batch_size": self.batch_size, "device": self.device}
        return activations(self._model(name), self.data, layers=self.layers, **options)

    @property
    def threads(self) -> int | None:
        """One: a model may be large, and two names may stand for the same module."""
        return 1

    @property
    def n_samples(self) -> int:
        """Number of probe inputs."""
        return batches_digest(as_batches(self.data, self.batch_size))[1]

    def identities(self, name: str, digest_of: DigestOf) -> dict[str, str]:
        """Return digests of model, weights and probe data; the model is made, not run."""
        model = self._model(name)
        weights = value_digest(dict(model.state_dict()))
        data, _ = batches_digest(as_batches(self.data, self.batch_size))
        common = digest(model_digest(model), weights, data, self.pooling, self.batch_size, self.device)
        return {layer: digest("model", common, layer) for layer in resolve_layers(model, self.layers)}

    @property
    def settings(self) -> dict[str, Any]:
        """What a report should say about where the representations come from."""
        return {"models": list(self), "layers": self.layers, "pooling": self.pooling}
