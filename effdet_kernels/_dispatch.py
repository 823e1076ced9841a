"""Chooses the implementation of an op: the first backend of the device's order that has one, is available and takes
the call. On a GPU the order is that of the first row of dispatch.json that fits: by op, architecture, dtype and size.

A backend may be asked for by name, for a block of code (``use_backend``) or for the process
(``EFFDET_KERNELS_BACKEND``); then there is no falling back: an absent one is an error that says why.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch

from effdet_kernels import _cuda, _native, _triton

BACKENDS = ("reference", "cpu", "triton", "cuda", "cuda_emu")
ENVIRONMENT_VARIABLE = "EFFDET_KERNELS_BACKEND"
_DEVICES = {
    "reference": ("cpu", "cuda"),
    "cpu": ("cpu",),
    "triton": ("cpu", "cuda") if _triton.INTERPRET else ("cuda",),
    "cuda": ("cuda",),
    "cuda_emu": ("cpu",),
}
_ORDER = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}
_TABLE = Path(__file__).with_name("dispatch.json")
_requested: ContextVar[str | None] = ContextVar("effdet_kernels_backend", default=None)


_strict = False  # not of a context: torch runs backwards in threads of its own


class BackendError(RuntimeError):
    """A backend was asked for by name that cannot serve the call."""


def unavailable_reason(backend: str) -> str | None:
    """Why ``backend`` cannot be used in this process, or None when it can."""
    if backend == "cpu":
        return _native.REASON
    if backend == "cuda":
        return _cuda.reason()
    if backend == "cuda_emu":
        return _cuda.emulator_reason()
    if backend == "triton":
        return _triton.REASON
    return None


def serves(backend: str, device: str) -> bool:
    """Whether ``backend`` takes tensors on ``device`` ("cpu" or "cuda")."""
    if backend == "cuda_emu" and _cuda.emulator_reason() is not None:
        return False
    return device in _DEVICES[backend]


def requested() -> str | None:
    """The backend asked for by name, or None: the innermost ``use_backend``, else the environment variable."""
    name = _requested.get() or os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in BACKENDS:
        raise BackendError(f"backend: got {name!r}, takes one of {', '.join(BACKENDS)}")
    return name


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Runs every op inside the block on backend ``name`` ("reference", "cpu", "triton", "cuda"); None: by device.

    A kernel that does not take a call refuses it by name: ``BackendError`` says which argument it is, what it is and
    what the kernel takes. By device, the next backend then serves the call.

    Raises:
        BackendError: unknown name, or the backend is not available here (the message says why).
    """
    if name is not None:
        if name not in BACKENDS:
            raise BackendError(f"use_backend: got {name!r}, takes one of {', '.join(BACKENDS)}")
        reason = unavailable_reason(name)
        if reason:
            raise BackendError(f"use_backend({name!r}): {reason}")
    token = _requested.set(name)
    try:
        yield
    finally:
        _requested.reset(token)


@contextlib.contextmanager
def strictly() -> Iterator[None]:
    """For checks and benchmarks: inside, in all threads, a backward that the backend asked for refuses is an error."""
    global _strict
    before, _strict = _strict, True
    try:
        yield
    finally:
        _strict = before


def _order(op: str, device: str, args: Sequence[Any] | None) -> Sequence[str]:
    """The backends to look at, in order, for a call of ``op`` ("soft_nms", "soft_nms_backward")."""
    if device == "cpu" or args is None:
        return _ORDER[device]
    first = _cuda.first_tensor(args)
    row = table_row(op, first.dtype, first.numel(), _architecture(first.device.index or 0))
    return _ORDER[device] if row is None else (*row["order"], "reference")


def table_row(op: str, dtype: torch.dtype, size: int, architecture: int) -> dict[str, Any] | None:
    """The row of dispatch.json for a call: of this op, by dtype, ``size`` (elements of the first tensor) and
    ``architecture`` (90 for compute capability 9.0); a row without a key is for all."""
    name = _cuda.dtype_name(dtype)
    for row in _rows().get(op, ()):
        if (
            architecture in row.get("architectures", (architecture,))
            and name in row.get("dtypes", (name,))
            and size <= row.get("up_to", size)
        ):
            return row
    return None


@functools.cache
def _rows() -> dict[str, list[dict[str, Any]]]:
    return json.loads(_TABLE.read_text())


@functools.cache
def _architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def refusal(implementation: Callable[..., Any], args: Sequence[Any] | None) -> str | None:
    """Why ``implementation`` does not take a call with ``args``, or None; None for unknown arguments."""
    refuses = getattr(implementation, "refuses", None)
    return refuses(args) if refuses is not None and args is not None else None


def choose(
    op: str,
    impls: Mapping[str, Callable[..., Any]],
    device: str,
    args: Sequence[Any] | None = None,
    *,
    or_next: bool = False,
) -> str:
    """The backend among ``impls`` that serves ``op``, called with ``args``, on ``device`` ("cpu" or "cuda").

    With ``or_next``, where the backend asked for by name has no implementation, or one that does not take ``args``, the
    device's order decides: a forward in CUDA may have its backward in Triton.
    """
    name = requested()
    refused = None if name is None or name not in impls else refusal(impls[name], args)
    if name is not None and or_next and (name not in impls or (refused and not _strict)):
        name = None
    if name is None:
        for candidate in _order(op, device, args):
            if (
                candidate in impls
                and unavailable_reason(candidate) is None
                and not refusal(impls[candidate], args)
            ):
                return candidate
        raise BackendError(f"{op}: no implementation for tensors on {device}")
    reason = unavailable_reason(name)
    if reason:
        raise BackendError(f"{op}: backend {name!r} was asked for, but {reason}")
    if name not in impls:
        raise BackendError(f"{op}: has no {name!r} implementation; it has {', '.join(impls)}")
    if not serves(name, device):
        raise BackendError(
            f"{op}: backend {name!r} runs on {' and '.join(_DEVICES[name])}, tensors are on {device}"
        )
    if refused:
        raise BackendError(f"{op}: backend {name!r} was asked for, but {refused}")
    return name
