"""A GPU that is not there: tensors that say "cuda:0", hold their numbers on the CPU, and refuse what CUDA refuses.

Inside ``pretended_cuda()`` every way to a GPU leads to a :class:`PretendedTensor`, and each operator raises where
tensors of the two devices meet that CUDA would not let meet, where a generator is of the other device, or where CUDA
has no kernel. lfm_torch's own operators go through the same checks and run on its CPU kernels. What this cannot show:
whether the CUDA kernels are right, what happens on several streams, and autocast.

To torch's C++ a pretended tensor is on the device "meta": a torch that is built for the CPU can differentiate there,
and has nothing of its own to run. Python is told "cuda:0", and what it says of "cuda" is translated on the way in.
"""

from __future__ import annotations

import contextlib
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import lfm_torch
from lfm_torch.ops import OPERATORS, _registry

DEVICE = torch.device("cuda:0")
_INSIDE = torch.device("meta")
aten = torch.ops.aten

# what takes a tensor of the CPU without dimensions as it takes a number; besides these all that goes entry by entry
_TAKES_NUMBERS = {aten.masked_fill, aten.masked_fill_, aten.index_fill, aten.index_fill_, aten.where, aten.fill_}
# CUDA has products of floating-point numbers only
_PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot, aten.vdot}
_BY_INDEX = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._index_put_impl_}
_BETWEEN_DEVICES = {aten._to_copy, aten.copy_, aten.copy, aten.set_}
# the CPU waits for the GPU here
_WAITS = {aten._local_scalar_dense, aten.equal, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim}


class DeviceError(RuntimeError):
    """What CUDA would not do."""


class PretendedTensor(Tensor):
    """A tensor on the pretended GPU; ``inner`` is where its numbers are."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> PretendedTensor:
        options: dict[str, Any] = {"strides": inner.stride(), "storage_offset": inner.storage_offset()}
        options |= {"dtype": inner.dtype, "device": _INSIDE}
        tensor: PretendedTensor = Tensor._make_wrapper_subclass(cls, inner.shape, **options)  # type: ignore[attr-defined]
        tensor.inner = inner
        return tensor

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: DEVICE)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]
    is_meta = property(lambda self: False)  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        # with a mode on, it has unwrapped the tensors; without one a thread escaped it, or the GPU was taken away
        raise DeviceError(f"{func}: a pretended tensor outside of pretended_cuda()")

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Pretended({self.inner!r})"

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        if args and (args[0] == DEVICE or _is_cuda(args[0])) and len(args) == 1 and not kwargs:
            return self  # C++ would see another device, and copy
        return super().to(*args, **kwargs)

    def numpy(self, *, force: bool = False) -> Any:
        if force:
            return self.detach().cpu().numpy()
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy it to the host")

    def new_tensor(self, data: Any, **options: Any) -> Tensor:
        return torch.tensor(data, **{"dtype": self.dtype, "device": DEVICE, **options})

    def __getitem__(self, index: Any) -> Tensor:
        return super().__getitem__(_without_lists(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(_without_lists(index), value)

    def record_stream(self, stream: Any) -> None:
        assert isinstance(stream, _Stream), stream

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copied = PretendedTensor(self.inner.clone()).requires_grad_(self.requires_grad)
            copied._is_param = getattr(self, "_is_param", False)  # type: ignore[attr-defined]
            memo[id(self)] = copied
        return memo[id(self)]

    def data_ptr(self) -> int:
        return self.inner.data_ptr()


class PretendedGenerator(torch.Generator):
    """A generator of random numbers on the GPU: the CPU's of the same seed, so that results can be compared."""

    device = property(lambda self: DEVICE)  # type: ignore[assignment]


class _AnyGenerator(type):
    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, _Generator)


_Generator = torch.Generator


class _GeneratorOf(metaclass=_AnyGenerator):
    """Stands in for ``torch.Generator``."""

    def __new__(cls, device: Any = "cpu") -> Any:
        return PretendedGenerator() if _is_cuda(device) else _Generator(device)


def _without_lists(index: Any) -> Any:
    """An index with tensors of the CPU for its lists, which torch would put on the device itself, without numbers."""
    if isinstance(index, tuple):
        return tuple(map(_without_lists, index))
    return torch.tensor(index) if isinstance(index, (list, np.ndarray)) else index


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str) and not re.fullmatch(r"cuda(:\d+)?", device):
        return False
    if not isinstance(device, (str, torch.device)) or torch.device(device).type != "cuda":
        return False
    if torch.device(device).index not in (None, 0):
        raise DeviceError(f"CUDA error: invalid device ordinal, {device} of one GPU")
    return True


class _Devices(TorchFunctionMode):
    """Translates the devices in the arguments of torch's functions; keeps in mind what generator they were given.

    An operator finds a generator without what Python knows of it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.given: Any = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        if func is Tensor.cuda:
            return args[0].to(_INSIDE)
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and _is_cuda(kwargs.get("device")):
            # on "meta" the numbers would be lost
            gradient = kwargs.pop("requires_grad", False)
            return func(*args, **{**kwargs, "device": None}).to(_INSIDE).requires_grad_(gradient)
        args = [_INSIDE if isinstance(a, (str, torch.device)) and _is_cuda(a) else a for a in args]
        kwargs = {key: _INSIDE if key == "device" and _is_cuda(value) else value for key, value in kwargs.items()}
        before = self.given
        self.given = next((a for a in (*args, *kwargs.values()) if isinstance(a, _Generator)), before)
        try:
            return func(*args, **kwargs)
        finally:
            self.given = before


class _Operators(TorchDispatchMode):
    """Runs every operator on the CPU, once it is clear that a GPU would have run it."""

    def __init__(self, gpu: PretendedCuda, devices: _Devices) -> None:
        super().__init__()
        self.gpu, self.devices = gpu, devices

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # it would import the compiler, for seconds, and nothing is compiled here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        ours = [leaf for leaf in leaves if isinstance(leaf, PretendedTensor)]
        wanted = kwargs.get("device")
        here = wanted is None or wanted.type == "cpu"
        if not ours and here:
            self._check_generator(func, leaves, on_gpu=False)
            kwargs.pop("pin_memory", None)  # as it is without a GPU
            return func(*args, **kwargs)
        if func.namespace == "lfm_torch":
            return self._own(func, args, kwargs)
        if ours and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # without autograd it comes as a whole
                return func.decompose(*args, **kwargs)
        return self._torchs(func, args, kwargs, leaves, bool(ours), wanted)

    def _torchs(
        self, func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any], any_ours: bool, wanted: Any
    ) -> Any:
        packet = func.overloadpacket
        on_gpu = wanted.type != "cpu" if wanted is not None else any_ours
        if packet is aten.is_pinned:
            return False
        if packet is aten._pin_memory:
            raise DeviceError("cannot pin a CUDA tensor: only dense CPU tensors can be pinned")
        if packet not in _BETWEEN_DEVICES:
            _check_devices(func, args, kwargs, leaves)
            _check_kernels(func, args, kwargs, leaves)
        self._check_generator(func, leaves, on_gpu=on_gpu)
        if torch.Tag.inplace_view in func.tags:
            with no_dispatch():
                func(*args, **kwargs)  # the shape that is seen from outside
            func(*_inner(args), **kwargs)
            return args[0]
        if packet in _WAITS or (any_ours and not on_gpu) or (packet is aten.copy_ and type(args[0]) is Tensor):
            self.gpu.note_wait(str(func))
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        kwargs.pop("pin_memory", None)
        if any(a.name == "generator" for a in func._schema.arguments):
            kwargs["generator"] = kwargs.get("generator") or (self.gpu.generator if on_gpu else None)
        results = func(*_inner(args), **_inner(kwargs))
        if packet is aten.copy_:
            return args[0]
        return _wrapped(results, leaves) if on_gpu else results

    def _check_generator(self, func: Any, leaves: list[Any], *, on_gpu: bool) -> None:
        given = self.devices.given
        if given is None or not any(isinstance(leaf, _Generator) for leaf in leaves):
            return
        if isinstance(given, PretendedGenerator) != on_gpu:
            wanted, got = ("cuda", "cpu") if on_gpu else ("cpu", "cuda")
            raise DeviceError(f"{func}: expected a '{wanted}' device type for generator but found '{got}'")

    def _own(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """An operator of lfm_torch: offsets and coefficients are on the CPU by contract, all else is on the GPU."""
        operator = OPERATORS[func._schema.name.partition("::")[2]]
        for i, argument in enumerate(func._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            by_contract = argument.name.endswith(("offsets", "coefficients"))
            if isinstance(value, Tensor) and isinstance(value, PretendedTensor) == by_contract:
                raise DeviceError(
                    f"{func}: {argument.name} must be on the {'CPU' if by_contract else 'GPU'}, got {value.device}"
                )
        if operator.twin_on_gpu or self.gpu.twins:
            with self:
                return operator.reference(*args, **kwargs)
        return _wrapped(func(*_inner(args), **_inner(kwargs)), [])


def _inner(values: Any) -> Any:
    return tree_map(lambda value: value.inner if isinstance(value, PretendedTensor) else value, values)


def _wrapped(results: Any, arguments: list[Any]) -> Any:
    """Results as tensors of the GPU; what an operator changed in place is the argument itself."""
    known = {id(argument.inner): argument for argument in arguments if isinstance(argument, PretendedTensor)}

    def wrapped(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return known[id(value)] if id(value) in known else PretendedTensor(value)

    return tree_map(wrapped, results)


def _check_devices(func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> None:
    """Tensors of both devices meet where one of the CPU stands for a number, and as indices."""
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [tensor for tensor in tensors if not isinstance(tensor, PretendedTensor)]
    if not others or len(others) == len(tensors):
        return
    packet = func.overloadpacket
    if packet in _BY_INDEX:
        if isinstance(args[0], PretendedTensor):
            values = args[2] if len(args) > 2 else None
            if values is None or isinstance(values, PretendedTensor) or values.dim() == 0:
                return
        raise DeviceError(f"{func}: indices must be on the CPU or with what they index, got {_places(tensors)}")
    numbers = torch.Tag.pointwise in func.tags or packet in _TAKES_NUMBERS
    written = [
        value
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
    ]
    if not numbers or any(other.dim() > 0 or any(other is value for value in written) for other in others):
        raise DeviceError(f"{func}: expected all tensors to be on the same device, got {_places(tensors)}")


def _places(tensors: list[Tensor]) -> str:
    return ", ".join(f"{list(tensor.shape)} on {tensor.device}" for tensor in tensors)


def _check_kernels(func: Any, args: Any, kwargs: dict[str, Any], leaves: list[Any]) -> None:
    packet = func.overloadpacket
    if func.name() in _cpu_alone():
        raise DeviceError(f"{func} has no CUDA kernel")
    floating = all(leaf.is_floating_point() for leaf in leaves if isinstance(leaf, PretendedTensor))
    if packet in _PRODUCTS and not floating:
        raise DeviceError(f"{func} is not implemented for integers on CUDA")
    if packet is aten.linalg_lstsq and kwargs.get("driver", "gels") not in (None, "gels"):
        raise DeviceError("torch.linalg.lstsq: `driver` other than `gels` is not supported on CUDA")


_found: set[str] = set()


def _cpu_alone() -> set[str]:
    """Names of the operators that torch's own list gives a kernel for the CPU and none for CUDA."""
    if not _found:
        import torchgen

        path = Path(torchgen.__file__).parent / "packaged/ATen/native/native_functions.yaml"
        for block in re.split(r"^- func: ", path.read_text(), flags=re.MULTILINE)[1:]:
            dispatch = re.search(r"^  dispatch:\n((?:    .*\n)+)", block, re.MULTILINE)
            keys = dispatch[1] if dispatch and "structured_delegate" not in block else ""
            if re.search(r"\bCPU\b", keys) and "CUDA" not in keys and "Composite" not in keys:
                _found.add("aten::" + block.partition("(")[0])
    return _found


class PretendedCuda:
    """The GPU: its default generator, and where lfm_torch waited for it.

    Attributes:
        twins: Whether the operators' PyTorch twins run, as on a GPU for which no library is loaded.
        waits: How often the CPU waited for the GPU, by operator and line of lfm_torch.
    """

    def __init__(self, *, twins: bool = False) -> None:
        self.twins = twins
        self.waits: Counter[str] = Counter()
        self.generator = PretendedGenerator()

    def note_wait(self, what: str) -> None:
        frame = sys._getframe(1)
        while frame is not None and Path(lfm_torch.__file__).parent not in Path(frame.f_code.co_filename).parents:
            frame = frame.f_back  # type: ignore[assignment]
        where = "" if frame is None else f" in {Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        self.waits[what + where] += 1

    @contextlib.contextmanager
    def modes(self) -> Iterator[None]:
        """The modes of one thread."""
        devices = _Devices()
        with devices, _Operators(self, devices):
            yield


class _Stream:
    """Work is done as soon as it is asked for: there is nothing to wait for."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        if device is not None:
            assert _is_cuda(device), device
        self.device = DEVICE

    def record_event(self, event: Any = None) -> Any:
        return event or _Event()

    def _nothing(self, *args: Any, **kwargs: Any) -> None:
        pass

    wait_event = wait_stream = synchronize = record = wait = _nothing

    def query(self) -> bool:
        return True


class _Event(_Stream):
    def __init__(self, **options: Any) -> None:
        super().__init__()

    def elapsed_time(self, other: Any) -> float:
        return 0.0


def _stubs(gpu: PretendedCuda) -> dict[str, Callable[..., Any]]:
    """What torch.cuda says and does."""
    properties = SimpleNamespace(
        name="Pretended", major=9, minor=0, multi_processor_count=132, total_memory=80 * 2**30, warp_size=32
    )
    nothing = lambda *args, **kwargs: None  # noqa: E731
    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *args: True,
        "_lazy_init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_name": lambda device=None: properties.name,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_properties": lambda device=None: properties,
        "mem_get_info": lambda device=None: (64 * 2**30, 80 * 2**30),
        "memory_allocated": lambda device=None: 0,
        "max_memory_allocated": lambda device=None: 0,
        "reset_peak_memory_stats": nothing,
        "empty_cache": nothing,
        "synchronize": nothing,
        "_sleep": nothing,
        "set_sync_debug_mode": nothing,
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "stream": contextlib.nullcontext,
        "device": contextlib.nullcontext,
        "Stream": _Stream,
        "Event": _Event,
        "get_rng_state": lambda device=None: gpu.generator.get_state(),
        "set_rng_state": lambda state, device=None: gpu.generator.set_state(state),
        "manual_seed": gpu.generator.manual_seed,
        "manual_seed_all": gpu.generator.manual_seed,
    }


@contextlib.contextmanager
def pretended_cuda(*, twins: bool = False) -> Iterator[PretendedCuda]:
    """Pretend that this machine has a GPU, and that lfm_torch's kernels for it are loaded (unless ``twins``)."""
    gpu = PretendedCuda(twins=twins)
    native = set() if twins else {(name, "CUDA") for name, operator in OPERATORS.items() if not operator.twin_on_gpu}
    run = threading.Thread.run

    def run_with_modes(thread: threading.Thread) -> None:
        with gpu.modes():  # modes belong to a thread
            run(thread)

    with contextlib.ExitStack() as stack:
        for name, stub in _stubs(gpu).items():
            stack.enter_context(mock.patch.object(torch.cuda, name, stub))
        stack.enter_context(mock.patch.object(torch, "Generator", _GeneratorOf))
        stack.enter_context(mock.patch.object(threading.Thread, "run", run_with_modes))
        stack.enter_context(mock.patch.object(_registry, "_native", _registry._native | native))
        stack.enter_context(gpu.modes())
        yield gpu
