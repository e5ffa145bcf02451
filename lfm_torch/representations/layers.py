"""The layers of a model: the network inside its wrappers, and the submodules that names, globs and types stand for."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sequence

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lfm_torch import _checks

Layers = str | type[nn.Module] | Sequence[str | type[nn.Module]]
_CONTAINERS = (nn.ModuleList, nn.ModuleDict)
# modules that stand around another one under the name of which users know it
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def resolve_layers(model: nn.Module, layers: Layers) -> list[str]:
    """Return the names of submodules that ``layers`` stands for, in the order of the model.

    Raises:
        TypeError: something that is no name, glob or module type.
        ValueError: a name, glob or type that matches nothing; near matches are listed.
    """
    patterns = [layers] if isinstance(layers, (str, type)) else list(layers)
    modules = named_layers(unwrapped(model))
    if not patterns:
        raise ValueError(f"layers must name at least one layer, got none; the model has {_some(modules)}")
    chosen: set[str] = set()
    for pattern in patterns:
        if isinstance(pattern, str) and pattern in modules:
            chosen.add(pattern)
            continue
        matching = {name for name, module in modules.items() if _stands_for(pattern, name, module)}
        if not matching:
            wanted = repr(pattern) if isinstance(pattern, str) else pattern.__name__
            hint = _checks.did_you_mean(pattern, modules) if isinstance(pattern, str) else ""
            hint = hint or f"; the model has {_some(modules)}"
            raise ValueError(f"layers must name submodules of the model, got {wanted}{hint}")
        chosen |= matching
    return [name for name in modules if name in chosen]


def _stands_for(pattern: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    # a container is never called, so a glob or type that meets one means its parts
    if isinstance(module, _CONTAINERS):
        return False
    if isinstance(pattern, str):
        return _matches(name.split("."), pattern.split("."))
    if not (isinstance(pattern, type) and issubclass(pattern, nn.Module)):
        raise TypeError(f"layers must be names, globs or subclasses of torch.nn.Module, got {pattern!r}")
    return isinstance(module, pattern)


def _some(names: Iterable[str], limit: int = 12) -> str:
    listed = list(names)
    if not listed:
        return "no submodules"
    return ", ".join(repr(name) for name in listed[:limit]) + (
        f" and {len(listed) - limit} more" if len(listed) > limit else ""
    )


def _matches(parts: list[str], pattern: list[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[i:], pattern[1:]) for i in range(len(parts) + 1))
    return bool(parts) and fnmatch.fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the network inside ``torch.compile``, DataParallel and DistributedDataParallel.

    A forward pass of DistributedDataParallel may broadcast buffers, which a rank cannot do alone. FSDP modules stay as
    they are: only they can gather their weights.
    """
    while True:
        if isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        elif isinstance(model._modules.get("_orig_mod"), nn.Module):
            model = model.get_submodule("_orig_mod")
        else:
            return model


def named_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Submodules by name without the parts that wrappers add ("_orig_mod", ...): the innermost module of each name."""
    found = {}
    for name, module in model.named_modules():
        plain = ".".join(part for part in name.split(".") if part not in _WRAPPERS)
        if plain:
            found[plain] = module
    return found
