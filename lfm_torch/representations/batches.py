"""Probe inputs batch by batch, in an order that every model sees alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, SubsetRandomSampler, WeightedRandomSampler

from lfm_torch import _checks

_RANDOM_SAMPLERS = (RandomSampler, SubsetRandomSampler, WeightedRandomSampler)


def as_batches(data: Any, batch_size: int) -> Iterable[Any]:
    """Return probe inputs batch by batch; that the data is of the wrong kind is said now, not when they are read.

    Raises:
        TypeError: none of the kinds that :func:`extract` takes.
        ValueError: no samples, an order that is drawn, a batch size that is no positive int.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size must be a positive int, got {batch_size!r}")
    if isinstance(data, (tuple, list)) and data and isinstance(data[0], (Tensor, np.ndarray)):
        data = data[0]
    if isinstance(data, np.ndarray):
        data = _checks.as_tensor("data", data)
    if isinstance(data, Tensor):
        if data.dim() < 1 or len(data) == 0:
            raise ValueError(f"data must have shape [n, ...] with at least one sample, got {list(data.shape)}")
        return torch.split(data, batch_size)
    if isinstance(data, Mapping):
        return _split_columns(data, batch_size)
    if isinstance(data, Dataset):
        data = DataLoader(data, batch_size=batch_size)
    if not isinstance(data, DataLoader):
        raise TypeError(
            f"data must be a tensor, a tuple (inputs, ...), a dict of tensors, a Dataset or a DataLoader, got "
            f"{type(data).__name__}"
        )
    # a batch_sampler brings a sampler of its own, and the loader's is then not used
    for sampler in (data.sampler, getattr(data.batch_sampler, "sampler", None)):
        if isinstance(sampler, _RANDOM_SAMPLERS):
            raise ValueError(
                "data must come in a fixed order (row i is the same sample for every model), got a DataLoader with a "
                f"{type(sampler).__name__}; pass shuffle=False"
            )
    return data


def _split_columns(data: Mapping[str, Any], batch_size: int) -> list[dict[str, Any]]:
    known = (Tensor, np.ndarray)
    wrong = [f"{key!r}: {type(value).__name__}" for key, value in data.items() if not isinstance(value, known)]
    if wrong or not data:
        raise TypeError(f"data must be a dict of tensors, got {', '.join(wrong) or 'an empty one'}")
    data = {key: _checks.as_tensor(f"data[{key!r}]", value) for key, value in data.items()}
    sizes = {len(value) if value.dim() else 0 for value in data.values()}
    if len(sizes) > 1 or sizes == {0}:
        shapes = {key: list(value.shape) for key, value in data.items()}
        raise ValueError(f"data must be a dict of tensors [n, ...] with one n, at least 1, got {shapes}")
    columns = zip(*(torch.split(value, batch_size) for value in data.values()), strict=True)
    return [dict(zip(data, parts, strict=True)) for parts in columns]
