"""The only importer of the compiled module ``_C``: its absence with the reason, how kernels are called, dtype codes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch  # before _C: the loader then resolves libgomp to torch's copy, so that there is one thread pool

try:
    from effdet_kernels import _C  # type: ignore[attr-defined]
except ImportError as error:
    _C = None  # type: ignore[assignment]
    REASON: str | None = (
        f"the compiled module effdet_kernels._C is missing ({error}); "
        "install a wheel, or build it: pip install . (CMake and a C++17 compiler are needed)"
    )
else:
    REASON = None

DTYPE_CODES = {torch.float32: 0, torch.float64: 1, torch.bfloat16: 2}
ACTIVATIONS = ("none", "swish", "relu", "relu6", "hard_swish", "leaky_relu", "mish")  # by code
ISAS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")  # by code
MAX_KERNEL = 15  # side of a convolution's kernel that ``_C`` takes
Launch = tuple[str, dict[str, Any]]


class Recorder(list[Launch]):
    """Kernels that were called inside ``recorded``, in order."""

    def __init__(self, *, packs: bool) -> None:
        super().__init__()
        self.packs = packs


_recorder: ContextVar[Recorder | None] = ContextVar("effdet_kernels_recorder", default=None)
_STATUS = {
    1: "a pointer is null or misaligned",
    2: "a size is negative or too large",
    3: "the dtype is not supported",
    4: "a parameter is out of range",
    5: "out of memory",
}


def check(status: int, op: str) -> None:
    """Turns a status returned by ``_C`` into an exception."""
    if status:
        raise RuntimeError(f"{op}: the native kernel refused the call: {_STATUS[status]}")


def module():
    """The compiled module; only called where REASON is None."""
    return _C


class NotRecordableError(RuntimeError):
    """A launcher copied a tensor, which a recording would not repeat."""


def copied(what: str) -> None:
    """Launchers call it when they copy an input; raises inside ``recorded`` without ``packs``."""
    launches = _recorder.get()
    if launches is not None and not launches.packs:
        raise NotRecordableError(what)


def launch(name: str, **fields: Any) -> None:
    """Runs kernel ``name`` of ``_C`` on torch's number of threads; ``fields`` are its parameters by name.

    Tensors among the fields (in lists, tuples and dicts too) go as addresses. Inside ``recorded`` the call is noted
    and does not run.
    """
    launches = _recorder.get()
    if launches is not None:
        launches.append((name, fields))
    else:
        _run(name, fields)


def pack(name: str, **fields: Any) -> None:
    """The same of a kernel that packs weights: inside ``recorded`` it runs, unless packs are asked for."""
    launches = _recorder.get()
    if launches is not None and launches.packs:
        launches.append((name, fields))
    else:
        _run(name, fields)


def _run(name: str, fields: dict[str, Any]) -> None:
    kernel = getattr(_C, f"{name}_cpu")
    check(kernel(fields, torch.get_num_threads()), name)


def recording() -> bool:
    """Whether this is inside ``recorded``."""
    return _recorder.get() is not None


@contextlib.contextmanager
def recorded(*, packs: bool = False) -> Iterator[list[Launch]]:
    """Inside, kernels called by this thread do not run: their names and fields go to the list.

    Weights are packed there and then, which is right as long as they do not change; with ``packs`` that is a kernel as
    all others, and launchers may copy: whoever records notes what torch does.
    """
    launches = Recorder(packs=packs)
    token = _recorder.set(launches)
    try:
        yield launches
    finally:
        _recorder.reset(token)


def resolved(value: Any, address_of: Callable[[torch.Tensor], int]) -> Any:
    """``value`` with every tensor in it replaced by its address."""
    if type(value) is int:  # most are
        return value
    if isinstance(value, torch.Tensor):
        return address_of(value)
    if isinstance(value, dict):
        return {key: resolved(item, address_of) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(resolved(item, address_of) for item in value)
    return value


@contextlib.contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Inside, the C++ kernels of this process use instruction set ``name``, one of ``ISAS``.

    Raises:
        ValueError: no such set, or this CPU or build lacks it.
    """
    if name not in ISAS or REASON is not None:
        raise ValueError(f"use_isa: got {name!r}, takes one of {', '.join(ISAS)}; {REASON or ''}")
    before = _C.isa()
    if not _C.set_isa(ISAS.index(name)):
        raise ValueError(f"use_isa: this CPU or this build lacks {name}")
    try:
        yield
    finally:
        _C.set_isa(before)
