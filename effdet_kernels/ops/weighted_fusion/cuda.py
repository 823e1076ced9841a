"""Launcher of the CUDA kernels of ``weighted_fusion``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native
from effdet_kernels.ops._walk import MULTIPROCESSORS
from effdet_kernels.ops.weighted_fusion import op

_WEIGHT_DTYPES = {**_cuda.DTYPE_CODES, torch.float64: 1}
_FILLING = 1024 * MULTIPROCESSORS  # threads that keep a GPU busy
_MOST_ROWS = 8
_MOST_INTERPOLATED = 2**30  # extent of a map times that of the result


def refusal(
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    size: Sequence[int],
    pool_padding: Sequence[int],
    act: str,
) -> str | None:
    """Why the kernels do not take a call, or None."""
    for i, (level, how) in enumerate(zip(x, resample.split(","), strict=True)):
        refused = _cuda.refused_map(f"x[{i}]", level)
        if refused:
            return refused
        extents = zip(level.shape[2:], size, strict=True)
        if how == "bilinear" and any(a * b > _MOST_INTERPOLATED for a, b in extents):
            return f"x[{i}]: is {tuple(level.shape[2:])}, too large for bilinear to {tuple(size)}"
    if weight is not None and weight.dtype not in _WEIGHT_DTYPES:
        return f"weight: is {weight.dtype}, takes float64, float32, bfloat16 or float16"
    return None


def fields(
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    size: Sequence[int],
    pool_padding: Sequence[int],
) -> dict[str, Any]:
    """A fusion as csrc/cuda/bind_fusion.h reads it."""
    return {
        "x": [_cuda.map_fields(level) for level in x],
        "resample": [op.RESAMPLE.index(how) for how in resample.split(",")],
        "height": size[0],
        "width": size[1],
        "pool_left": pool_padding[0],
        "pool_top": pool_padding[2],
        "method": op.METHODS.index(method),
        "weight": _cuda.dense(weight),
        "weight_dtype": 0 if weight is None else _WEIGHT_DTYPES[weight.dtype],
    }


def kinds(x: Sequence[Tensor], resample: str, size: Sequence[int]) -> list[str]:
    """How each map is read, as csrc/cuda/bind_fusion.h has it: "halved" is nearest of a map of half the size."""

    def kind(level: Tensor, how: str) -> str:
        if how != "nearest":
            return how
        if tuple(level.shape[2:]) == tuple(size):
            return "identity"
        return "halved" if tuple(2 * n for n in level.shape[2:]) == tuple(size) else how

    return [kind(level, how) for level, how in zip(x, resample.split(","), strict=True)]


def rows(threads: int, most: int) -> int:
    """Rows, at most ``most``, that each walks of ``threads`` if it were one: as few as keep a GPU busy."""
    return max(1, min(most, threads // _FILLING))


def run(
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    size: Sequence[int],
    pool_padding: Sequence[int],
    act: str,
) -> Tensor:
    """y [B, C, *size]."""
    batch, channels = x[0].shape[:2]
    y = _library.nchw((batch, channels, *size), x[0]).empty()
    if batch == 0:
        return y
    threads = y.numel() * y.element_size() // 16
    if kinds(x, resample, size) == ["identity", "halved"]:
        threads //= 4
    _cuda.launch(
        "weighted_fusion",
        y,
        dtype=_cuda.DTYPE_CODES[y.dtype],
        batch=batch,
        channels=channels,
        act=_native.ACTIVATIONS.index(act),
        rows=rows(threads, _MOST_ROWS),
        y=y,
        **fields(x, weight, method, resample, size, pool_padding),
    )
    return y
