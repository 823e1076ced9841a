"""Says whether Triton kernels can run here, and why not; launches them; knows their configurations.

With TRITON_INTERPRET=1 in the environment before the first import, Triton's own interpreter runs kernels on CPU
tensors: slow, for tests. Only this module, ``ops/_tl.py`` and the ``triton_*.py`` files of the ops import triton, the
latter when their first kernel is called (``deferred``).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import json
import os
import subprocess
import types
import unittest.mock
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
OLDEST = (3, 6)  # release of triton that kernels are tested with
COMPILED = {"enable_fp_fusion": True}  # a * b + c in one instruction, whatever triton's default is
_OPS = Path(__file__).with_name("ops")
_MAX_PROGRAMS = 2**31 - 1  # of a grid's first axis
_COMPILER = (
    "it takes gcc or clang (or what CC names) and the headers of Python: on Debian and Ubuntu"
    " apt-get install gcc python3-dev"
)


def _find_reason() -> str | None:
    if (
        not INTERPRET and not torch.cuda.is_available()
    ):  # before triton is imported, which takes its time
        return "no CUDA device is visible to torch"
    try:
        import triton
    except ImportError:
        return 'triton is not installed: pip install "effdet-kernels" on Linux x86-64 brings it'
    release = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if release < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        return f"triton {triton.__version__} is too old: pip install 'triton>={oldest}'"
    return None


REASON = _find_reason()


def deferred(module: str, function: str = "run") -> Callable[..., Any]:
    """A function of a module that imports triton: imported at its first call."""

    @functools.cache
    def loaded() -> Callable[..., Any]:
        return getattr(importlib.import_module(module), function)

    def call(*args: Any) -> Any:
        return loaded()(*args)

    return call


# Launches ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Launch:
    """A call of a kernel: what a compiler needs to know of it."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]  # constants of the kernel, num_warps, num_stages
    trips: Sequence[int]
    flops: float


@dataclasses.dataclass
class Recording:
    """Launches that were noted instead of made, for a GPU with ``shared_kb`` of shared memory a block."""

    shared_kb: int
    launches: list[Launch] = dataclasses.field(default_factory=list)


_recording: ContextVar[Recording | None] = ContextVar("effdet_kernels_launches", default=None)


@contextlib.contextmanager
def recorded(shared_kb: int = 227) -> Iterator[list[Launch]]:
    """Inside, kernels do not run: their launches go to the list. Tensors may be on "meta"."""
    recording = Recording(shared_kb)
    token = _recording.set(recording)
    try:
        yield recording.launches
    finally:
        _recording.reset(token)


def launch(
    kernel: Any,
    programs: int,
    *arguments: Any,
    trips: Sequence[int] = (),
    flops: float = 0,
    **options: Any,
) -> None:
    """Runs ``programs`` programs of ``kernel`` on the device, and the current stream, of the first tensor.

    ``trips`` and ``flops`` are for predictions (``python -m bench aot``): how often each of the kernel's loops runs in
    a program, in their order, and what matrix units compute in all.

    Raises:
        RuntimeError: Triton, which compiles a launcher in C at its first call, finds no compiler or no Python headers.
    """
    if programs > _MAX_PROGRAMS:
        name = getattr(kernel, "__name__", kernel)
        raise ValueError(f"{name}: a call takes {programs} programs, CUDA at most {_MAX_PROGRAMS}")
    recording = _recording.get()
    if recording is not None:
        recording.launches.append(Launch(kernel, programs, arguments, options, trips, flops))
        return
    if programs == 0:
        return
    first = next(a for a in arguments if isinstance(a, torch.Tensor))
    guard = torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext()
    with guard, _compiler_explained():
        kernel[(programs,)](*arguments, **{**COMPILED, **options})


@contextlib.contextmanager
def _compiler_explained() -> Iterator[None]:
    """Says what to install where Triton cannot compile its launcher."""
    try:
        yield
    except subprocess.CalledProcessError as error:  # the compiler's own message is on stderr
        raise RuntimeError(
            f"triton: {error.cmd[0]} failed to compile the launcher of kernels; {_COMPILER}"
        ) from error
    except RuntimeError as error:
        if "C compiler" not in str(error):
            raise
        raise RuntimeError(f"triton: found no C compiler; {_COMPILER}") from error


# Configurations ----------------------------------------------------------------------------------


Place = tuple[str, str, int]  # an op, a kernel, and the number of a row of its launch.json
_configured: ContextVar[Mapping[Place, dict[str, Any]]] = ContextVar(
    "effdet_kernels_configurations", default=types.MappingProxyType({})
)
_noted_rows: ContextVar[set[Place] | None] = ContextVar("effdet_kernels_rows", default=None)


def config(op: str, kernel: str, like: torch.Tensor, size: int = 0) -> dict[str, Any]:
    """Block sizes, ``num_warps`` and ``num_stages`` of a call of a kernel on tensors like ``like``.

    The first row of the op's launch.json that fits: of this kernel, of at most the device's shared memory, of the width
    of the dtype, and for at least ``size`` (channels, or what the kernel's launcher says).
    """
    available = _shared_kb(like.device)
    for number, row in enumerate(_rows(op)[kernel]):
        if (
            row["shared_kb"] <= available
            and like.element_size() in row["itemsize"]
            and size <= row.get("up_to", size)
        ):
            place, noted = (op, kernel, number), _noted_rows.get()
            if noted is not None:
                noted.add(place)
            return dict(_configured.get().get(place, row["config"]))
    raise RuntimeError(f"{op}/launch.json has no row for {kernel}, {like.dtype}, size {size}")


@contextlib.contextmanager
def configured(op: str, kernel: str, row: int, config: Mapping[str, Any]) -> Iterator[None]:
    """Inside, calls that take this row of the op's launch.json, the kernel's ``row``-th, have another configuration.

    Of this context only: other threads, as autograd's on a GPU, keep the table's.

    Raises:
        ValueError: there is no such row, or ``config`` does not have the names that it has.
    """
    rows = _rows(op).get(kernel, ())
    if not 0 <= row < len(rows):
        raise ValueError(f"configured: {op}/launch.json has no row {row} of {kernel!r}")
    if config.keys() != rows[row]["config"].keys():
        raise ValueError(
            f"configured: {op} {kernel}: got {', '.join(config)}, takes"
            f" {', '.join(rows[row]['config'])}"
        )
    token = _configured.set({**_configured.get(), (op, kernel, row): dict(config)})
    try:
        yield
    finally:
        _configured.reset(token)


@contextlib.contextmanager
def noted_rows() -> Iterator[set[Place]]:
    """Inside, the rows of launch.json that calls take go to the set."""
    noted: set[Place] = set()
    token = _noted_rows.set(noted)
    try:
        yield noted
    finally:
        _noted_rows.reset(token)


@functools.cache
def _rows(op: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((_OPS / op / "launch.json").read_text())


def _shared_kb(device: torch.device) -> int:
    recording = _recording.get()
    if recording is not None:
        return recording.shared_kb
    return _device_shared_kb(device.index or 0) if device.type == "cuda" else 227


@functools.cache
def _device_shared_kb(index: int) -> int:
    properties: Any = torch.cuda.get_device_properties(index)
    return properties.shared_memory_per_block_optin // 1024


# The interpreter ---------------------------------------------------------------------------------


@contextlib.contextmanager
def shuffled(seed: int) -> Iterator[None]:
    """Inside, the interpreter runs the programs of a grid in an order drawn with ``seed``."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def shuffle(*grid: int) -> None:
        set_dim(*grid)
        generator = torch.Generator().manual_seed(seed)
        order[:] = torch.randperm(grid[0] * grid[1] * grid[2], generator=generator).tolist()

    def place(x: int, y: int, z: int) -> None:
        _, rows, depth = builder.grid_dim
        program = order[(x * rows + y) * depth + z]
        set_idx(program // (rows * depth), program // depth % rows, program % depth)

    with (
        unittest.mock.patch.object(builder, "set_grid_dim", shuffle),
        unittest.mock.patch.object(builder, "set_grid_idx", place),
    ):
        yield
