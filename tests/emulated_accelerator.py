"""An accelerator emulated in host memory, for machines without one.

    import emulated_accelerator
    emulated_accelerator.install("cuda", devices=2)     # or "mps"; lasts until the process ends

After `install`, torch reports accelerators of the given type. A tensor on one of them is an `EmulatedTensor`,
a wrapper around a tensor in host memory. Every operation unwraps its arguments, computes on the CPU and wraps
the result, so the numbers are those of the CPU, bit for bit. These properties of hardware are emulated:

- `tensor.device` is `cuda:0`. An operation that mixes devices raises RuntimeError. As in torch, copies may
  mix devices, 0-dimensional CPU tensors may join as scalars, and indices may be on the CPU.
- Each device has a random generator, whose numbers differ from the CPU's with the same seed.
- The result of a `non_blocking` copy is garbage at first: of one on a side stream until another stream waits
  for it, of one to the host until the host synchronizes.
- A tensor that was allocated on a side stream and is used on another without `record_stream` raises
  RuntimeError.
- MPS raises TypeError for float64 and has no streams.
- `ACCELERATOR.counts` and `ACCELERATOR.memory_formats` record what happened, for assertions.

Autograd and DistributedDataParallel are written in C++ and need a device of their own. They see PrivateUse1,
torch's backend for devices that are implemented in Python; `EmulatedTensor.device` hides it.

Limitations: `torch.compile` returns its argument unchanged, and graphs are not captured. Only the thread that
called `install` can move tensors to the device. Kernels run at once, so overwriting the source of a copy too
early is noticed on side streams only. Changing a shape in place raises NotImplementedError. gloo replaces
NCCL. Only kernels that the CPU has exist.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

CARRIER = "emulated"  # the name of torch's PrivateUse1 backend
TOTAL_MEMORY = 2**34

COPIES = {"aten::copy_", "aten::_to_copy"}
INDEXING = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
SYNCHRONIZING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"}
FORMAT_SENSITIVE = {
    "aten::convolution",
    "aten::convolution_backward",
    "aten::native_batch_norm",
    "aten::native_batch_norm_backward",
}
# The operations of these networks that autocast runs in the lower precision, and those it runs in float32.
LOWER_PRECISION = ("conv2d", "linear", "mm", "matmul", "addmm", "bmm", "baddbmm")
FULL_PRECISION = ("binary_cross_entropy_with_logits", "exp", "log", "pow.Tensor_Scalar", "log_softmax.int")


class Stream:
    """A queue of work. Kernels run at once; `non_blocking` copies wait until somebody waits for them."""

    def __init__(self, device: Any = None, **options: Any) -> None:
        self.copies_to_device: list[Callable[[], Any]] = []
        self.copies_to_host: list[Callable[[], Any]] = []
        ACCELERATOR.counts["streams"] += 1

    def wait_stream(self, other: Stream) -> None:
        """Order later work of this stream after the present work of `other`."""
        other.finish_copies_to_device()

    def record_event(self, event: Event | None = None) -> Event:
        """Return an event that marks the present work of this stream."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Wait on the host for the work of this stream."""
        self.finish_copies_to_device()
        while self.copies_to_host:
            self.copies_to_host.pop(0)()

    def finish_copies_to_device(self) -> None:
        """Carry out the copies to the device that are pending."""
        while self.copies_to_device:
            self.copies_to_device.pop(0)()

    def is_capturing(self) -> bool:
        """Whether a graph is being captured."""
        return False


class Event:
    """A mark in the work of a stream. Waiting for it also waits for the work that came after it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Mark the present work of `stream`, by default the current one."""
        self.stream = stream or ACCELERATOR.stream

    def synchronize(self) -> None:
        """Wait on the host for the marked work."""
        ACCELERATOR.counts["event.synchronize"] += 1
        if self.stream is not None:
            self.stream.synchronize()


class Accelerator:
    """State of the emulation, and records of what happened."""

    def __init__(self) -> None:
        self.type = ""
        self.devices = 0
        self.current = 0
        self.free_memory = TOTAL_MEMORY
        self.generators: list[torch.Generator] = []
        self.streams: list[Stream] = []
        """The default stream, and those that `with torch.cuda.stream(...)` entered after it."""
        self.counts: Counter[str] = Counter()
        """Keys: streams, pinned, record_stream, event.synchronize, synchronizing (operations), to device, to
        host (copies), and both with ", non_blocking"."""
        self.memory_formats: set[tuple[str, str]] = set()
        """(operation, "contiguous" or "other") of each image argument of FORMAT_SENSITIVE operations."""

    @property
    def stream(self) -> Stream:
        """The current stream."""
        return self.streams[-1]

    def is_mine(self, device: Any) -> bool:
        """Whether `device`, None included, is an emulated device."""
        return device is not None and torch.device(device).type in (self.type, CARRIER)

    def resolve(self, device: Any) -> torch.device:
        """The device with its index, from a device, its name, its index, or None for the current one."""
        if isinstance(device, int):
            index = device
        else:
            named = torch.device(self.type if device is None else device)
            index = self.current if named.index is None or named.type == CARRIER else named.index
        if index >= self.devices:
            raise RuntimeError(f"{self.type} error: invalid device ordinal {index}, {self.devices} visible")
        return torch.device(self.type, index)

    def seed(self, seed: int) -> None:
        """Seed the generators of all devices."""
        for generator in self.generators:
            generator.manual_seed((int(seed) ^ 0x5EED) % 2**63)


ACCELERATOR = Accelerator()
LIBRARIES: list[torch.library.Library] = []  # kernels are registered as long as their library exists


class EmulatedTensor(torch.Tensor):
    """A tensor on an emulated device; `host` has its values."""

    host: Tensor
    place: torch.device
    allocated_on: Stream | None
    """The side stream that allocated the memory."""
    recorded_on: list[Stream]

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, host: Tensor, place: torch.device) -> EmulatedTensor:
        if place.type == "mps" and host.dtype in (torch.float64, torch.complex128):
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64. "
                "Please use float32 instead."
            )
        tensor: EmulatedTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            host.size(),
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=torch.device(CARRIER, 0),
        )
        tensor.host, tensor.place = host, place
        tensor.allocated_on = ACCELERATOR.stream if len(ACCELERATOR.streams) > 1 else None
        tensor.recorded_on = []
        return tensor

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation in a thread that has no `DispatchMode`."""
        return dispatch(func, args, kwargs or {})

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]
        return f"EmulatedTensor({self.host!r}, device='{self.place}')"

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        """The emulated device."""
        return self.place

    is_cuda = property(lambda self: self.place.type == "cuda")

    def to(self, *arguments: Any, copy: bool = False, **keywords: Any) -> Tensor:
        """As torch.Tensor.to; torch alone would take a tensor's own device for another one."""
        if arguments and isinstance(arguments[0], Tensor):
            arguments = (arguments[0].device, arguments[0].dtype, *arguments[1:])
        device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*arguments, **keywords)
        if device is not None and not (
            ACCELERATOR.is_mine(device) and ACCELERATOR.resolve(device) == self.place
        ):
            moved: Tensor = torch.ops.aten._to_copy.default(
                self, dtype=dtype, device=device, non_blocking=non_blocking, memory_format=memory_format
            )
            return moved
        options: dict[str, Any] = {"dtype": dtype or self.dtype, "non_blocking": non_blocking, "copy": copy}
        if memory_format is not None:
            options["memory_format"] = memory_format
        result: Tensor = super().to(**options)
        return result

    def tolist(self) -> Any:
        """As torch.Tensor.tolist."""
        return self.cpu().tolist()

    def numpy(self, **options: Any) -> Any:
        """As torch.Tensor.numpy, which needs a tensor on the host."""
        raise TypeError(f"can't convert {self.place} device type tensor to numpy. Use Tensor.cpu() first.")

    def record_stream(self, stream: Stream) -> None:  # type: ignore[override]
        """Keep the memory until the present work of `stream` is done."""
        ACCELERATOR.counts["record_stream"] += 1
        self.recorded_on.append(stream)


class DispatchMode(TorchDispatchMode):
    """Handles every operation of a thread and of its backward passes, also those on CPU tensors."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation."""
        return dispatch(func, args, kwargs or {})


class DeviceIndexMode(TorchFunctionMode):
    """Adds the index to devices that have none, for which torch would ask a driver."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call a function of torch."""
        kwargs = kwargs or {}
        if func is torch.device:
            return func(*args, **kwargs)
        args = tuple(with_index(value) for value in args)
        kwargs = {key: with_index(value) for key, value in kwargs.items()}
        if func is torch.tensor and ACCELERATOR.is_mine(kwargs.get("device")):
            return func(*args, **{**kwargs, "device": None}).to(kwargs["device"])
        return func(*args, **kwargs)


def with_index(value: Any) -> Any:
    """An emulated device with its index; any other value as it is."""
    is_name = isinstance(value, str) and value.partition(":")[0] == ACCELERATOR.type
    if (is_name or isinstance(value, torch.device)) and ACCELERATOR.is_mine(value):
        return ACCELERATOR.resolve(value)
    return value


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run one operation where its arguments are, or on the device that it names."""
    device = kwargs.get("device")
    if kwargs.get("pin_memory"):
        ACCELERATOR.counts["pinned"] += 1
        kwargs = {**kwargs, "pin_memory": False}
    emulated = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, EmulatedTensor)]
    if not emulated and not ACCELERATOR.is_mine(device):
        return func(*args, **kwargs)
    name = func._schema.name
    if name not in COPIES and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    ):
        with DispatchMode():
            return func.decompose(*args, **kwargs)
    target: torch.device | None = None
    if device is None:
        target = emulated[0].place
    elif ACCELERATOR.is_mine(device):
        target = ACCELERATOR.resolve(device)
    if device is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if name in FORMAT_SENSITIVE:
        ACCELERATOR.memory_formats |= {(name, format_of(t)) for t in emulated if t.dim() == 4}
    with torch.inference_mode(False) if torch.is_inference_mode_enabled() else contextlib.nullcontext():
        use(emulated)
        if name in COPIES:
            out = copy(func, args, kwargs, target)
        else:
            require_one_device(name, args, kwargs)
            out = compute(func, args, kwargs, target)
    return wrap(func, out, target, args, kwargs)


def use(tensors: list[EmulatedTensor]) -> None:
    """Check that the current stream may work on `tensors`."""
    stream = ACCELERATOR.stream
    stream.finish_copies_to_device()  # they precede this operation on the stream
    for tensor in tensors:
        if tensor.allocated_on not in (None, stream) and stream not in tensor.recorded_on:
            raise RuntimeError("a tensor is used on another stream than its own without record_stream")


def require_one_device(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise RuntimeError if an operation mixes devices."""
    if name in INDEXING and isinstance(args[0], EmulatedTensor):
        args = (args[0], *args[2:])  # indices may be on the CPU
    devices = set()
    for value in (*args, *kwargs.values()):
        in_list = isinstance(value, list | tuple)
        for tensor in value if in_list else [value]:
            if isinstance(tensor, EmulatedTensor) or (
                isinstance(tensor, Tensor) and (in_list or tensor.dim())
            ):
                devices.add(str(tensor.device))
    if len(devices) > 1:
        raise RuntimeError(
            "Expected all tensors to be on the same device, but found at least two devices, "
            f"{' and '.join(sorted(devices))}! (in {name})"
        )


def compute(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device | None) -> Any:
    """Run an operation on the host tensors, with random numbers from the generator of `target`."""
    name = func._schema.name
    if name in SYNCHRONIZING:
        ACCELERATOR.counts["synchronizing"] += 1
        ACCELERATOR.stream.synchronize()
    args, kwargs = tree_map(unwrap, (args, kwargs))
    if name == "c10d::_allgather_base_":  # gloo compares shapes, NCCL only sizes
        args = tuple(arg.view(-1) if isinstance(arg, Tensor) else arg for arg in args)
    if target is None or torch.Tag.nondeterministic_seeded not in func.tags:
        return func(*args, **kwargs)
    generator, of_cpu = ACCELERATOR.generators[target.index], torch.get_rng_state()
    torch.set_rng_state(generator.get_state())
    try:
        return func(*args, **kwargs)
    finally:
        generator.set_state(torch.get_rng_state())
        torch.set_rng_state(of_cpu)


def copy(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: torch.device | None) -> Tensor:
    """Run copy_ or _to_copy, within a device or between a device and the host."""
    in_place = func._schema.name == "aten::copy_"
    source = args[1] if in_place else args[0]
    to_device = isinstance(args[0], EmulatedTensor) if in_place else target is not None
    non_blocking = kwargs.get("non_blocking") or (in_place and len(args) > 2 and args[2])
    stream = ACCELERATOR.stream
    args, kwargs = tree_map(unwrap, (args, kwargs))
    out: Tensor
    if to_device and isinstance(source, EmulatedTensor):
        out = func(*args, **kwargs)
        return out
    direction = "to device" if to_device else "to host"
    ACCELERATOR.counts[direction + (", non_blocking" if non_blocking else "")] += 1
    if not non_blocking:
        stream.synchronize()
    if not non_blocking or (to_device and stream is ACCELERATOR.streams[0]):
        out = func(*args, **kwargs)
        return out
    out = args[0] if in_place else func(*args, **kwargs)
    # What is copied to the host was computed before. The source of a copy from the host may still change.
    values = unwrap(source) if to_device else unwrap(source).clone()
    out.fill_(torch.nan if out.is_floating_point() else 127)
    (stream.copies_to_device if to_device else stream.copies_to_host).append(lambda: out.copy_(values))
    return out


def wrap(
    func: Any, out: Any, target: torch.device | None, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result on `target`; arguments that an operation returns are returned as the same objects."""
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    returned = {id(unwrap(tensor)): tensor for tensor in tensors}
    is_view = any(result.alias_info is not None for result in func._schema.returns)
    # In inference mode, too, a view of a normal tensor is a normal tensor.
    normal = (
        is_view and torch.is_inference_mode_enabled() and not any(tensor.is_inference() for tensor in tensors)
    )

    def wrap_one(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        if id(tensor) in returned:
            same = returned[id(tensor)]
            if isinstance(same, EmulatedTensor) and same.shape != same.host.shape:
                raise NotImplementedError(f"{func}: changing a shape in place is not emulated")
            return same
        if target is None:
            return tensor
        with torch.inference_mode(False) if normal else contextlib.nullcontext():
            result = EmulatedTensor(tensor, target)
        if is_view and isinstance(args[0], EmulatedTensor):
            result.allocated_on, result.recorded_on = args[0].allocated_on, args[0].recorded_on
        return result

    return tree_map(wrap_one, out)


def unwrap(value: Any) -> Any:
    """The host tensor of an emulated one; any other value as it is."""
    return value.host if isinstance(value, EmulatedTensor) else value


def format_of(images: Tensor) -> str:
    """Memory format by the strides alone, which also tell the formats of one channel apart."""
    _, channels, height, width = images.shape
    contiguous = (channels * height * width, height * width, width, 1)
    return "contiguous" if images.stride() == contiguous else "other"


@contextlib.contextmanager
def use_stream(stream: Stream) -> Iterator[None]:
    """Stands for torch.cuda.stream."""
    ACCELERATOR.streams.append(stream)
    try:
        yield
    finally:
        ACCELERATOR.streams.pop()


class Backend:
    """What torch asks of the carrier: one device, whatever the number of emulated ones."""

    def is_available(self) -> bool:
        """Whether there is a device."""
        return True

    is_initialized = is_available

    def device_count(self) -> int:
        """Number of devices."""
        return 1

    def current_device(self) -> int:
        """Index of the current device."""
        return 0

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Lower precisions of autocast."""
        return [torch.float16, torch.bfloat16]

    def manual_seed_all(self, seed: int) -> None:
        """Nothing to do: torch seeds the module of the emulated type as well."""

    def _is_in_bad_fork(self) -> bool:
        return False


def install(kind: str, devices: int = 1) -> None:
    """Let torch find `devices` accelerators of type `kind` until the process ends."""
    accelerator = ACCELERATOR
    accelerator.type, accelerator.devices = kind, devices
    accelerator.generators = [torch.Generator() for _ in range(devices)]
    accelerator.seed(torch.initial_seed())
    accelerator.streams = [Stream()]
    accelerator.counts.clear()
    _setup_privateuseone_for_python_backend(CARRIER, backend_module=Backend())
    install_device_module(kind)
    install_autocast(kind)
    patched: dict[str, Any] = {
        "is_available": lambda: True,
        "current_accelerator": lambda check_available=False: torch.device(kind),
        "device_count": lambda: devices,
        "current_device_index": lambda: accelerator.current,
        "current_stream": lambda device=None: accelerator.stream,
    }
    for name, function in patched.items():
        setattr(torch.accelerator, name, function)
    torch.compile = lambda model=None, **options: model if model else lambda function: function  # type: ignore
    torch.nn.Module.compile = lambda self, *arguments, **options: None  # type: ignore[method-assign]
    # Parameters stay the same objects when a module moves to the device, as they do on hardware.
    torch.__future__.set_swap_module_params_on_conversion(True)
    dist.Backend.default_device_backend_map[kind] = "gloo"
    DispatchMode().__enter__()
    DeviceIndexMode().__enter__()


def install_device_module(kind: str) -> None:
    """Replace the functions of torch.cuda or torch.mps that need a driver."""
    accelerator = ACCELERATOR

    def generator(device: Any) -> torch.Generator:
        return accelerator.generators[accelerator.resolve(device).index]

    def set_device(device: Any) -> None:
        accelerator.current = accelerator.resolve(device).index

    functions: dict[str, Any] = {
        "device_count": lambda: accelerator.devices,
        "get_rng_state": lambda device=None: generator(device).get_state(),
        "set_rng_state": lambda state, device=None: generator(device).set_state(state),
        "manual_seed": accelerator.seed,
        "synchronize": lambda device=None: accelerator.stream.synchronize(),
    }
    if kind == "mps":
        for name, value in {"is_available": True, "is_built": True, "is_macos_or_newer": True}.items():
            setattr(torch.backends.mps, name, lambda *arguments, value=value: value)
    else:
        functions |= {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "_lazy_init": lambda: None,
            "current_device": lambda: accelerator.current,
            "set_device": set_device,
            "manual_seed_all": accelerator.seed,
            "mem_get_info": lambda device=None: (accelerator.free_memory, TOTAL_MEMORY),
            "get_device_name": lambda device=None: f"Emulated {kind.upper()}",
            "get_device_capability": lambda device=None: (9, 0),
            "get_device_properties": lambda device=None: SimpleNamespace(total_memory=TOTAL_MEMORY),
            "is_bf16_supported": lambda *arguments: True,
            "Stream": Stream,
            "Event": Event,
            "stream": use_stream,
            "current_stream": lambda device=None: accelerator.stream,
        }
    for name, function in functions.items():
        setattr(torch.get_device_module(kind), name, function)


def install_autocast(kind: str) -> None:
    """Let torch.autocast for `kind` cast the arguments of emulated operations."""
    initialize = torch.autocast.__init__

    def initialize_for_carrier(self: Any, device_type: str, *arguments: Any, **options: Any) -> None:
        initialize(self, CARRIER if device_type == kind else device_type, *arguments, **options)

    torch.autocast.__init__ = initialize_for_carrier  # type: ignore[method-assign]
    others, operations = (torch.library.Library(n, "IMPL", "AutocastPrivateUse1") for n in ("_", "aten"))
    LIBRARIES.extend([others, operations])
    others.fallback(torch.library.fallthrough_kernel)
    for name in LOWER_PRECISION:
        operations.impl(name, autocast_kernel(name, lambda: torch.get_autocast_dtype(CARRIER)))
    for name in FULL_PRECISION:
        operations.impl(name, autocast_kernel(name, lambda: torch.float32))


def autocast_kernel(name: str, dtype: Callable[[], torch.dtype]) -> Callable[..., Any]:
    """The operation `name` on arguments cast to `dtype()`."""
    packet, _, overload = name.partition(".")
    operation = getattr(getattr(torch.ops.aten, packet), overload or "default")
    key = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, "AutocastPrivateUse1"))  # noqa: B009

    def cast(value: Any) -> Any:
        is_cast = isinstance(value, EmulatedTensor) and value.is_floating_point()
        return value.to(dtype()) if is_cast and value.dtype != torch.float64 else value

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(key):
            return operation(*tree_map(cast, args), **tree_map(cast, kwargs))

    return kernel
