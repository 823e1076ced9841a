"""What the launchers of the Triton kernels share: maps in place or copied, alignment, accumulation, sums of parts."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from effdet_kernels._library import TensorSpec
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._walk import MULTIPROCESSORS

__all__ = ["MULTIPROCESSORS"]

_ACCUMULATORS = {torch.float64: tl.float64}
_MOST_INSIDE = 2**31 - 1  # offset inside an image that kernels compute in 32 bits


def accumulator(dtype: torch.dtype) -> Any:
    """The Triton dtype that kernels accumulate in."""
    return _ACCUMULATORS.get(dtype, tl.float32)


def allocate(specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Memory for outputs."""
    return [spec.empty() for spec in specs]


def channels_inner(x: Tensor) -> Tensor:
    """The map itself if its channels are next to each other and offsets in an image fit in 32 bits, else a copy."""
    _, channels, height, width = x.shape
    inside = (height - 1) * x.stride(2) + (width - 1) * x.stride(3) + channels
    if (channels == 1 or x.stride(1) == 1) and inside <= _MOST_INSIDE:
        return x
    if height * width * channels > _MOST_INSIDE:
        raise ValueError(
            f"a map of {tuple(x.shape)}: Triton kernels take images of up to 2**31 elements"
        )
    return x.contiguous(memory_format=torch.channels_last)


def pixels_inner(x: Tensor) -> Tensor:
    """``channels_inner`` whose pixels can be walked with one stride besides."""
    x = channels_inner(x)
    rows_follow = x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3)
    return x if rows_follow else x.contiguous(memory_format=torch.channels_last)


def pixel_stride(x: Tensor) -> int:
    """Elements from one pixel to the next, in row-major order, of what ``pixels_inner`` gives."""
    return x.stride(3) if x.shape[3] > 1 or x.shape[2] == 1 else x.stride(2)


def alignment(*counts: int) -> int:
    """The largest of 1, 2, 4, 8 and 16 that divides all ``counts``.

    A kernel takes counts and strides in units of it, and multiplies: so Triton knows that vector loads are aligned,
    without a variant of the kernel for each number of channels.
    """
    unit = 16
    while any(count % unit for count in counts):
        unit //= 2
    return unit


def opaque(*numbers: int) -> tuple[int, ...]:
    """Numbers in a tuple that is an argument of a kernel, which reads them with ``_tl.revealed``.

    Triton compiles a variant for an integer that is 1 and for one that 16 divides; in tuples there is no way to tell it
    not to. These are odd and at least 3.
    """
    return tuple(2 * number + 3 for number in numbers)


def dense(vector: Tensor | None) -> Tensor | None:
    """A vector whose elements are next to each other."""
    return None if vector is None else vector.contiguous()


def total(parts: Tensor) -> Tensor:
    """The sum over the first dimension, in an order that depends on the shape alone."""
    return parts[0] if parts.shape[0] == 1 else parts.sum(0)


def block(count: int, most: int) -> int:
    """A power of 2 from 16 to ``most``: the largest in which ``count`` leaves at most a quarter of its blocks empty."""
    size = most
    while size > 16 and -(-count // size) * size > 1.25 * count:
        size //= 2
    return size


def bits(number: float) -> int:
    """A number as ``_tl.number`` takes it: a kernel's float argument would be rounded to float32."""
    return struct.unpack("<q", struct.pack("<d", number))[0]


def matrix_precision(dtype: torch.dtype) -> str:
    """How matrix units take operands: float32 as it is, not as tf32."""
    return "ieee" if dtype in (torch.float32, torch.float64) else "tf32"


Parts = tuple[Tensor | None, Tensor | None]


def parts_of_moments(parts: int, channels: int, like: Tensor) -> Parts:
    """Memory for what ``_tl.store_moments`` stores, of tiles of a map like ``like``: [parts, 2, C] and [parts].

    None of both for no parts.
    """
    if parts == 0:
        return None, None
    wide = accumulation_dtype(like.dtype)
    moments = torch.empty(parts, 2, channels, dtype=wide, device=like.device)
    return moments, torch.empty(parts, dtype=wide, device=like.device)
