"""The CUDA kernels of ``_C``: which calls they take and why not others, how they are launched; their emulator.

For tests the same kernels run on CPU tensors, on an emulator of CUDA (csrc/common/emu) that ``load_emulator`` brings
in: the backend ``cuda_emu``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import itertools
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _native

OLDEST = (8, 0)  # compute capability that kernels are compiled for
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 2, torch.float16: 3}
MOST_INSIDE = 2**31 - 1 - 2**16  # offset in an image, in elements; csrc/cuda/bind.h has the same
_BYTES = 16  # of a vector of channels
_LARGEST_KB = 227  # of shared memory, that a block may have on any device
_emulator: Any = None
_recording: ContextVar[list[str] | None] = ContextVar("effdet_kernels_cuda_launches", default=None)
_emulated_kb = _LARGEST_KB
_EMULATOR_REASON = "the emulator of CUDA is not loaded: it is for tests (make emulate)"


class Implementation:
    """An op's forward or backward in CUDA: ``run`` and ``refusal`` of a module, imported at its first call."""

    def __init__(self, module: str) -> None:
        self._name = module

    @functools.cached_property
    def _module(self) -> Any:
        return importlib.import_module(self._name)

    def __call__(self, *args: Any) -> Any:
        return self._module.run(*args)

    def refuses(self, args: Sequence[Any]) -> str | None:
        """Why the kernels do not take this call, naming the argument; None if they do."""
        device = first_tensor(args).device
        absent = device_reason(device.index) if device.type == "cuda" else None
        return absent or self._module.refusal(*args)


def first_tensor(args: Sequence[Any]) -> Tensor:
    """Of a call's arguments; it may be in a list."""
    flat = itertools.chain.from_iterable(a if isinstance(a, (list, tuple)) else (a,) for a in args)
    return next(a for a in flat if isinstance(a, Tensor))


# Whether kernels can run -------------------------------------------------------------------------


def reason() -> str | None:
    """Why CUDA kernels cannot run in this process, or None when they can."""
    if _native.REASON is not None:
        return _native.REASON
    if not _native.module().BUILT_WITH_CUDA:
        return "this build of effdet_kernels._C has no CUDA kernels: nvcc was not found when it was built"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch"
    return _driver_reason(*_native.module().cuda_versions())


def _driver_reason(runtime: int, driver: int) -> str | None:
    """A driver serves every release of its major version and of those before."""
    if driver // 1000 >= runtime // 1000:
        return None
    return (
        f"the driver is of CUDA {driver // 1000}.{driver % 1000 // 10}, the kernels need"
        f" {runtime // 1000}.0: update the NVIDIA driver"
    )


@functools.cache
def device_reason(index: int) -> str | None:
    """Why CUDA kernels cannot run on this device, or None when they can."""
    found = torch.cuda.get_device_capability(index)
    if found >= OLDEST:
        return None
    return (
        f"device {index} ({torch.cuda.get_device_name(index)}) has compute capability"
        f" {found[0]}.{found[1]}, the kernels need {OLDEST[0]}.{OLDEST[1]}"
    )


def emulator_reason() -> str | None:
    """Why ``cuda_emu`` cannot run in this process, or None when it can."""
    return _EMULATOR_REASON if _emulator is None else None


def load_emulator(path: Path) -> None:
    """Loads the module at ``path`` (built by ``make emulator``); ``_library.emulate`` makes it a backend."""
    global _emulator
    spec = importlib.util.spec_from_file_location("_emulated", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"load_emulator: {path} is no Python module")
    _emulator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(_emulator)


@contextlib.contextmanager
def emulated_order(seed: int) -> Iterator[None]:
    """Inside, the emulator visits blocks, warps and threads in an order drawn with ``seed``; 0 up, 1 down."""
    if _emulator is None:
        yield
        return
    _emulator.set_order(seed)
    try:
        yield
    finally:
        _emulator.set_order(0)


@contextlib.contextmanager
def emulated_shared_memory(kilobytes: int) -> Iterator[None]:
    """Inside, a block has at most so much shared memory, as on a smaller GPU."""
    global _emulated_kb
    _emulated_kb = kilobytes
    _emulator.set_shared_limit(kilobytes * 1024)
    try:
        yield
    finally:
        _emulated_kb = _LARGEST_KB
        _emulator.set_shared_limit(_LARGEST_KB * 1024)


def shared_kb(x: Tensor) -> int:
    """KB of shared memory that a block may have on the device of ``x``."""
    return _device_shared_kb(x.device.index) if x.is_cuda else _emulated_kb


@functools.cache
def _device_shared_kb(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin // 1024


# Calls -------------------------------------------------------------------------------------------


def launch(name: str, like: Tensor, **fields: Any) -> None:
    """Runs kernel ``name`` on the device of ``like`` and its current stream; ``fields`` are its parameters by name.

    Raises:
        RuntimeError: the launch failed; CUDA's error is in the message, and does not stay.
    """
    noted = _recording.get()
    if noted is not None:
        noted.append(name)
    elif not like.is_cuda:
        check(getattr(_emulator, f"{name}_cuda")(fields, 0), name)
    else:
        with torch.cuda.device(like.device):
            stream = torch.cuda.current_stream().cuda_stream
            check(getattr(_native.module(), f"{name}_cuda")(fields, stream), name)


@contextlib.contextmanager
def recorded() -> Iterator[list[str]]:
    """Inside, kernels do not run: their names go to the list. Tensors may be on "meta"."""
    noted: list[str] = []
    token = _recording.set(noted)
    try:
        yield noted
    finally:
        _recording.reset(token)


def check(status: int, op: str) -> None:
    """Turns what a launch returned into an exception; a negative status is a CUDA error's."""
    if status < 0:
        raise RuntimeError(f"{op}: CUDA: {_native.module().cuda_error(-status)}")
    _native.check(status, op)


def map_fields(x: Tensor) -> tuple[Tensor, int, int, int, int, int]:
    """A map as kernels take it; x [B, C, H, W] that ``refused_map`` has nothing against."""
    return x, x.shape[2], x.shape[3], x.stride(0), x.stride(2), x.stride(3)


def refused_map(name: str, x: Tensor) -> str | None:
    """Why kernels do not take a map: its dtype, its layout, its channels, its address."""
    if x.dtype not in DTYPE_CODES:
        return f"{name}: is {dtype_name(x.dtype)}, takes float32, bfloat16 or float16"
    unit = _BYTES // x.element_size()
    if x.shape[1] % unit:
        kind = dtype_name(x.dtype)
        return f"{name}: has {x.shape[1]} channels, takes a multiple of {unit} in {kind}"
    if x.stride(1) != 1:
        return f"{name}: has strides {tuple(x.stride())}, takes channels_last"
    if x.stride(0) % unit or x.stride(2) % unit or x.stride(3) % unit:
        return f"{name}: has strides {tuple(x.stride())}, takes multiples of {unit}"
    span = (x.shape[2] - 1) * x.stride(2) + (x.shape[3] - 1) * x.stride(3)
    if span > MOST_INSIDE:
        return f"{name}: an image spans {span} elements, takes at most {MOST_INSIDE}"
    return misaligned(name, x)


def misaligned(name: str, x: Tensor) -> str | None:
    """Why kernels do not take the address of a tensor that they read in vectors."""
    if x.data_ptr() % _BYTES:
        return f"{name}: its address is not a multiple of {_BYTES} bytes"
    return None


def aligned(x: Tensor) -> Tensor:
    """``x`` dense, at an address that kernels can read in vectors: itself, or a copy."""
    x = x.contiguous()
    return x if misaligned("", x) is None else x.clone()


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector whose elements are next to each other."""
    return None if vector is None else vector.contiguous()


def dtype_name(dtype: torch.dtype) -> str:
    """Without "torch."."""
    return str(dtype).removeprefix("torch.")
