"""From a model and a probe set to representations: what chosen layers answer to the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lfm_torch import _checks
from lfm_torch.representations.batches import as_batches
from lfm_torch.representations.gathering import Store, open_store
from lfm_torch.representations.layers import Layers, named_layers, resolve_layers, unwrapped
from lfm_torch.representations.pooling import POOLINGS, Pooling, pooled
from lfm_torch.representations.probe import untouched


def extract(
    model: nn.Module,
    data: Any,
    *,
    layers: Layers,
    pooling: Pooling = "mean",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    store: torch.device | str | Path | None = None,
) -> dict[str, Tensor]:
    """Collect the outputs of layers on a probe set, in eval mode and without gradients.

    The model is left as it was: the train/eval flag and the buffers of every submodule, its device, its hooks and the
    random number generators, also when the forward pass raises. Wrapped models are taken as the network inside them:
    ``torch.compile`` (the pass runs uncompiled), DistributedDataParallel (the pass is of this rank alone) and FSDP (all
    ranks must call).

    Args:
        model: Any module. It is called as ``model(inputs)``, or ``model(**inputs)`` where a batch is a dict.
        data: Inputs ``[n, ...]``, a tuple whose first entry they are (``(inputs, labels)``), a dict of tensors, a
            Dataset, or a DataLoader that does not shuffle; batches may be tuples or dicts as well. Floating-point
            inputs are cast to the dtype of the weights.
        layers: Names as in ``model.named_modules()``, globs, or module types (``nn.Linear``). In a glob ``*`` stands
            for one part of a dotted name ("layers.*" for the blocks, not what is inside them), ``**`` for any number
            of parts. The order of the model is kept.
        pooling: Features of a sample: "mean" over space (``[n, c, h, w] -> [n, c]``) or tokens
            (``[n, t, c] -> [n, c]``), "cls" or "last" for the first or last token, or "flatten". Where a batch has an
            ``attention_mask [n, t]`` of the output's length, padding is no token. Outputs ``[n, d]`` stay as they are.
            Three dimensions are always read as tokens: take "flatten" for a Conv1d, whose output is ``[n, c, t]``.
        batch_size: Samples per forward pass, for data that is not a DataLoader.
        device: Where to run; None for the device of the model.
        dtype: Of the result; None keeps float64 and makes float32 of everything else.
        store: Where to keep the result, batch by batch: a device ("cpu" beside a model on a GPU), a Path for a folder
            of ``<layer>.npy`` files that the tensors are then mapped from (larger than memory), None for the device of
            the run.

    Returns:
        ``{layer: [n, d]}``. Of a tuple, list, dict or ModelOutput that a layer returns its first tensor is taken.

    Raises:
        TypeError: a model, data or dtype of the wrong kind.
        ValueError: a layer that is missing (near matches are listed), never called or called twice, an output that is
            no ``[n, ...]`` tensor or does not fit the pooling, an activation that is not finite (the layer and the row
            are named), shuffled or empty data.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(1, 3, 3), torch.nn.ReLU(), torch.nn.Flatten())
        >>> found = extract(model, torch.randn(10, 1, 8, 8), layers=["0", torch.nn.Flatten])
        >>> {name: list(x.shape) for name, x in found.items()}
        {'0': [10, 3], '2': [10, 108]}
    """
    if dtype is not None and dtype not in _checks.FLOATING:
        raise TypeError(f"dtype must be None, float16, bfloat16, float32 or float64, got {dtype}")
    found = activations(
        model, data, layers=layers, pooling=pooling, batch_size=batch_size, device=device, dtype=dtype, store=store
    )
    for name, x in found.items():
        _checks.check_finite(f"the output of layer {name!r}", x)
    return found


def activations(
    model: nn.Module,
    data: Any,
    *,
    layers: Layers,
    pooling: Pooling = "mean",
    batch_size: int = 256,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    store: torch.device | str | Path | None = None,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Do the work of :func:`extract` without looking at the values, for callers that judge layer by layer.

    ``weights`` stand in for the model's own during the pass, by the names of its state dict.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    _checks.check_choice("pooling", pooling, POOLINGS)
    model = unwrapped(model)
    names = resolve_layers(model, layers)
    found = named_layers(model)
    chosen = {name: found[name] for name in names}
    call = model if weights is None else lambda *a, **k: torch.func.functional_call(model, dict(weights), a, k)
    with ExitStack() as stack:
        kept: Store = stack.enter_context(open_store(store, dtype))
        stack.enter_context(untouched(model))
        place = stack.enter_context(_placed(model, device))
        for batch in as_batches(data, batch_size):
            inputs = batch[0] if isinstance(batch, (tuple, list)) else batch
            kept.append(_forward(call, _moved(inputs, place, model), chosen, pooling))
        tensors = kept.tensors()
    if not tensors:
        raise ValueError("data must hold at least one sample, got none")
    return tensors


@contextmanager
def _placed(model: nn.Module, device: torch.device | str | None) -> Iterator[torch.device]:
    devices = _devices(model)
    home = devices[0] if devices else torch.device("cpu")
    if device is None:
        yield home
        return
    if len(devices) > 1:
        raise ValueError(f"device must be None for a model spread over {', '.join(map(str, devices))}, got {device}")
    try:
        yield move_model(model, device)
    finally:
        model.to(home)


def move_model(model: nn.Module, device: torch.device | str) -> torch.device:
    """Move a model and return the device it is on (``cuda`` becomes ``cuda:0``).

    Raises:
        ValueError: no such device here.
    """
    try:
        model.to(device)
    # torch answers with an AssertionError where it is built without CUDA
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"device must be one of this machine, got '{device}': {reason}") from error
    return next(iter(_devices(model)), torch.device(device))


def _devices(model: nn.Module) -> list[torch.device]:
    return list(dict.fromkeys(tensor.device for tensor in (*model.parameters(), *model.buffers())))


def _moved(inputs: Any, device: torch.device, model: nn.Module) -> Any:
    if isinstance(inputs, Mapping):
        return {key: _moved(value, device, model) for key, value in inputs.items()}
    if not isinstance(inputs, Tensor):
        return inputs
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), None)
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def _forward(
    call: Callable[..., Any], inputs: Any, layers: Mapping[str, nn.Module], pooling: Pooling
) -> dict[str, Tensor]:
    """Run one batch and return what each layer gave, pooled to ``[batch, d]``."""
    n = _batch_length(inputs)
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    outputs: dict[str, list[Tensor]] = {name: [] for name in layers}

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        # pooled (and so copied) at once: a later in-place activation would write into the output
        return lambda _module, _inputs, output: outputs[name].append(
            pooled(name, _single(name, output, n), pooling, mask)
        )

    handles = []
    try:
        for name, module in layers.items():
            handles.append(module.register_forward_hook(keep(name)))
        if isinstance(inputs, Mapping):
            call(**inputs)
        else:
            call(inputs)
    finally:
        for handle in handles:
            handle.remove()
    for name, calls in outputs.items():
        if not calls:
            raise ValueError(
                f"layers must be called by the model's forward pass, got {name!r}, which was not; for a container "
                f"take its parts, {name + '.*'!r}"
            )
        if len(calls) > 1:
            raise ValueError(
                f"layers must be called once per forward pass, got {name!r}, which was called {len(calls)} times; "
                "take the layers around it"
            )
    return {name: calls[0] for name, calls in outputs.items()}


def _batch_length(inputs: Any) -> int:
    if isinstance(inputs, Mapping):
        inputs = next((value for value in inputs.values() if isinstance(value, Tensor) and value.dim()), inputs)
    if not isinstance(inputs, Sized) or isinstance(inputs, (str, Mapping)):
        raise TypeError(f"data must give batches of tensors, or dicts that hold one, got {type(inputs).__name__}")
    return len(inputs)


def _single(name: str, output: Any, n: int) -> Tensor:
    x = _first_tensor(output)
    if x is None:
        raise ValueError(f"the output of layer {name!r} must be a tensor or hold one, got {type(output).__name__}")
    if x.dim() == 0 or len(x) != n:
        raise ValueError(f"the output of layer {name!r} must have one row per sample, [{n}, ...], got {list(x.shape)}")
    return x


def _first_tensor(output: Any) -> Tensor | None:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, (tuple, list)):
        return next((x for x in map(_first_tensor, output) if x is not None), None)
    return None
