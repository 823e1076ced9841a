"""Kernels for what torch does between ours in a training step, to the bit: sums of maps, running statistics.

With them a training plan is few lists of kernel calls (`training_plan`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _native

_aten = torch.ops.aten
_ADDED, _SCALED, _BETWEEN = range(3)  # csrc/cpu/elementwise.h


def as_kernel(
    function: Any, args: Sequence[Any], kwargs: dict[str, Any], outs: Sequence[Tensor]
) -> _native.Launch | None:
    """The kernel call that does what ``function(*args, **kwargs)`` does, or None where there is none.

    ``outs``: memory for the results; empty where the function changes its first argument.
    """
    translate = _KERNELS.get(function)
    return translate(*args, outs=outs, **kwargs) if translate else None


def _added(a: Any, b: Any, *, outs: Sequence[Tensor], alpha: float = 1) -> _native.Launch | None:
    out = outs[0] if outs else a
    if (
        isinstance(a, Tensor)
        and a.dtype == torch.int64
        and not outs
        and type(b) is int
        and not a.dim()
    ):
        return "count", {"value": a, "by": b * alpha}
    if not isinstance(b, Tensor) or not isinstance(a, Tensor):
        return None
    if outs and not _alike(a, out) and alpha == 1:
        a, b = b, a
    return _elementwise(_ADDED, a, b, out, alpha)


def _scaled(a: Any, factor: Any, *, outs: Sequence[Tensor]) -> _native.Launch | None:
    if isinstance(factor, Tensor) or not outs:
        return None
    return _elementwise(_SCALED, a, None, outs[0], factor)


def _between(
    a: Tensor, b: Tensor, factor: float, *, outs: Sequence[Tensor]
) -> _native.Launch | None:
    return _elementwise(_BETWEEN, a, b, outs[0] if outs else a, factor)


def _elementwise(
    kind: int, a: Tensor, b: Tensor | None, out: Tensor, factor: float
) -> _native.Launch | None:
    if a.dtype not in _native.DTYPE_CODES or not _alike(a, out) or not a.numel():
        return None
    outer, middle, inner = 1, 1, a.numel()
    outer_stride = middle_stride = inner
    if b is not None and not _alike(b, out):
        per_channel = _per_channel(a, b)
        if per_channel is None:
            return None
        outer, middle, inner = a.shape[0], a.shape[2] * a.shape[3], a.shape[1]
        outer_stride, middle_stride = per_channel, 0
    return "elementwise", {
        "dtype": _native.DTYPE_CODES[a.dtype],
        "kind": kind,
        "outer": outer,
        "middle": middle,
        "inner": inner,
        "factor": float(factor),
        "a": a,
        "b": b,
        "b_outer_stride": outer_stride,
        "b_middle_stride": middle_stride,
        "out": out,
    }


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether a and b are dense, of one dtype, and have their elements in the same order."""
    return a.dtype == b.dtype and a.shape == b.shape and a.stride() == b.stride() and _dense(a)


def _dense(a: Tensor) -> bool:
    return sum((n - 1) * s for n, s in zip(a.shape, a.stride(), strict=True)) + 1 == a.numel()


def _per_channel(a: Tensor, b: Tensor) -> int | None:
    """The stride of images of b [B, C, 1, 1], or b spread over H and W, beside channels_last a; None if it is other."""
    if a.dim() != 4 or b.dim() != 4 or a.dtype != b.dtype or a.shape[:2] != b.shape[:2]:
        return None
    if not a.is_contiguous(memory_format=torch.channels_last):
        return None
    spread = all(n == 1 or s == 0 for n, s in zip(b.shape[2:], b.stride()[2:], strict=True))
    return b.stride(0) if spread and (b.stride(1) == 1 or b.shape[1] == 1) else None


def _copied(
    x: Tensor, *, outs: Sequence[Tensor], memory_format: torch.memory_format | None = None
) -> _native.Launch | None:
    """A matrix in the other order; sides of size 1 do not matter."""
    out = outs[0]
    sides = [i for i, n in enumerate(x.shape) if n > 1]
    if x.dtype not in _native.DTYPE_CODES or len(sides) != 2:
        return None
    rows, columns = (x.shape[i] for i in sides)
    if [x.stride(i) for i in sides] != [1, rows] or [out.stride(i) for i in sides] != [columns, 1]:
        return None
    return "transpose", {
        "dtype": _native.DTYPE_CODES[x.dtype],
        "rows": columns,
        "columns": rows,
        "x": x,
        "out": out,
    }


_KERNELS: dict[Any, Callable[..., _native.Launch | None]] = {
    _aten.add.Tensor: _added,
    _aten.add_.Tensor: _added,
    _aten.mul.Tensor: _scaled,
    _aten.lerp_.Scalar: _between,
    _aten.clone.default: _copied,
}
