"""What the launchers of the C++ kernels share: maps, packed weights, BN vectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy
import torch
from torch import Tensor

from effdet_kernels import _library, _native
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops._activations import accumulation_dtype

MapFields = tuple[Tensor, int, int, int, int, int]


def widened(values: Sequence[Any]) -> list[Any]:
    """``values`` with float16 tensors in float32, the only way in which kernels take them."""
    if not any(t.dtype == torch.float16 for t in _library._tensors(values)):
        return list(values)
    _native.copied("float16 maps")
    return [
        [v.float() if v.dtype == torch.float16 else v for v in value]
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], Tensor)
        else value.float()
        if isinstance(value, Tensor) and value.dtype == torch.float16
        else value
        for value in values
    ]


def code(dtype: torch.dtype) -> int:
    return _native.DTYPE_CODES[dtype]


def act_code(name: str) -> int:
    return _native.ACTIVATIONS.index(name)


def allocate(specs: Sequence[TensorSpec], dtype: torch.dtype) -> list[Tensor]:
    """Memory for outputs; a map that the op rounds to float16 afterwards is of ``dtype`` here."""
    return [
        torch.empty(
            spec.shape,
            dtype=dtype if spec.dtype == torch.float16 else spec.dtype,
            memory_format=spec.memory_format,
        )
        for spec in specs
    ]


def channels_inner(x: Tensor) -> Tensor:
    """The map itself if its channels are next to each other, else a channels_last copy."""
    if x.shape[1] == 1 or x.stride(1) == 1:
        return x
    return _channels_last(x)


def _channels_last(x: Tensor) -> Tensor:
    _native.copied(f"a map of strides {x.stride()}")
    return x.contiguous(memory_format=torch.channels_last)


def map_fields(x: Tensor) -> MapFields:
    """A map as kernels take it; x [B, C, H, W] as ``channels_inner`` gives it."""
    return x, x.shape[2], x.shape[3], x.stride(0), x.stride(2), x.stride(3)


def pixels_inner(x: Tensor) -> Tensor:
    """The map itself if its pixels can be walked with one stride, else a channels_last copy."""
    x = channels_inner(x)
    rows_follow = x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)
    return x if rows_follow else _channels_last(x)


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next, in row-major order."""
    return x.stride(3) if x.shape[3] > 1 or x.shape[2] == 1 else x.stride(2)


def vectors(x: Tensor, dtype: torch.dtype) -> Tensor:
    """``x`` dense and in the accumulation dtype of maps of ``dtype``: itself where it is so already."""
    dense = x.to(accumulation_dtype(dtype)).contiguous()
    if dense is not x:
        _native.copied("channel vectors of another dtype or layout")
    return dense


def pack_dense(weight: Tensor) -> Tensor:
    """A weight [O, C, k_h, k_w] in the order of csrc/cpu/gemm.h."""
    out, channels, rows, columns = weight.shape
    dtype = code(weight.dtype)
    size = _native.module().packed_dense_bytes(dtype, out, rows, columns * channels)
    packed = torch.empty(size, dtype=torch.uint8)
    _native.pack("pack_dense", **_weight_fields(weight, packed))
    return packed


def pack_depthwise(weight: Tensor, *, flipped: bool = False) -> Tensor:
    """A weight [C, 1, k, k] in the order of csrc/cpu/depthwise.h; ``flipped``: its rows and columns backwards."""
    channels, _, rows, columns = weight.shape
    size = _native.module().packed_depthwise_bytes(code(weight.dtype), channels, rows * columns)
    packed = torch.empty(size, dtype=torch.uint8)
    _native.pack("pack_depthwise", **_weight_fields(weight, packed, flipped=flipped))
    return packed


def _weight_fields(weight: Tensor, packed: Tensor, *, flipped: bool = False) -> dict[str, Any]:
    return {
        "dtype": code(weight.dtype),
        "out": weight.shape[0],
        "in": weight.shape[1],
        "rows": weight.shape[2],
        "columns": weight.shape[3],
        "out_stride": weight.stride(0),
        "in_stride": weight.stride(1),
        "row_stride": weight.stride(2),
        "column_stride": weight.stride(3),
        "flipped": int(flipped),
        "weight": weight,
        "packed": packed,
    }


@functools.lru_cache(maxsize=256)
def _constant(value: float, count: int, dtype: torch.dtype) -> Tensor:
    # By numpy, not by torch: a training plan that is made meanwhile would take it for a step.
    return torch.from_numpy(numpy.full(count, value, "f8" if dtype == torch.float64 else "f4"))


def pack_vector(vector: Tensor | None, fill: float, count: int, dtype: torch.dtype) -> Tensor:
    """``vector`` [count], or ``count`` times ``fill``, padded to whole vectors, for maps of ``dtype``; read only."""
    accumulator = accumulation_dtype(dtype)
    padded = -(-count // 16) * 16
    if vector is None:
        return _constant(fill, padded, accumulator)
    vector = vector.to(accumulator)
    packed = torch.empty(padded, dtype=accumulator)
    _native.pack(
        "pack_vector",
        dtype=code(dtype),
        count=count,
        stride=vector.stride(0),
        vector=vector,
        packed=packed,
    )
    return packed


def affine(
    scale: Tensor | None, shift: Tensor | None, count: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Packed scale and shift [count] of maps of ``dtype``; None: 1 and 0."""
    return pack_vector(scale, 1.0, count, dtype), pack_vector(shift, 0.0, count, dtype)
