"""Gradient checkpointing: activations inside a block are computed again in the backward, not kept.

Source of the idea: Training Deep Nets with Sublinear Memory Cost, arXiv:1604.06174.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from effdet_kernels import _native

from .native_plan import NotPlannableError

_again: ContextVar[bool] = ContextVar("computing_again", default=False)


def computing_again() -> bool:
    """Whether this forward only makes activations again: running statistics have seen its batch.

    Never in code that is compiled: what it does in place happens once, behind the graph.
    """
    return not torch.compiler.is_compiling() and _again.get()


def recomputed(function: Callable[..., Any], *args: Any) -> Any:
    """``function(*args)``, of which only the arguments and results are kept for the backward.

    Random numbers are drawn again as they were. Without gradients it is the call itself. While it is compiled the
    compiler has to put the copies into the backward (AOTAutograd does): there is no context for it to trace.
    """
    if not torch.is_grad_enabled():
        return function(*args)
    if torch.compiler.is_compiling():
        return checkpoint(function, *args, use_reentrant=False)
    if _native.recording():
        raise NotPlannableError("activations are computed again")
    return checkpoint(function, *args, use_reentrant=False, context_fn=_contexts)


def _contexts() -> tuple[Any, Any]:
    return contextlib.nullcontext(), _computing_again()


@contextlib.contextmanager
def _computing_again() -> Iterator[None]:
    token = _again.set(True)
    try:
        yield
    finally:
        _again.reset(token)
