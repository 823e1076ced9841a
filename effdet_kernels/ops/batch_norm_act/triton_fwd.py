"""Triton kernels of ``batch_norm_act``: statistics of tiles of pixels, their merging, and the normalisation."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import activate, merged_moments, number, store_merged_moments

_ENOUGH = 512  # programs that fill a large GPU


@triton.jit
def tile_of(program, pixels, channels, tiles, blocks, rows, BLOCK_C: tl.constexpr):
    """A program's part of the maps, up to ``rows`` pixels of BLOCK_C channels.

    Its number, image, first pixel, number of pixels, channels [BLOCK_C], and which of these exist.
    """
    tile = program // blocks
    first = (tile % tiles) * rows
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    image, rows = (tile // tiles).to(tl.int64), tl.minimum(pixels - first, rows)
    return tile.to(tl.int64), image, first.to(tl.int64), rows, c, c < channels


@triton.jit
def batch_norm_act_fwd_statistics_kernel(
    x_ptr, parts_ptr, counts_ptr,
    pixels, channel_units, tiles, blocks, rows, stride_xb, stride_xp_units,
    UNIT: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A part for ``merge_statistics``: ``rows`` pixels, less the map's first. Counts in units: ``_gpu.alignment``."""
    channels, stride_xp = channel_units * UNIT, stride_xp_units * UNIT
    tile, image, first, rows, c, c_inside = tile_of(
        tl.program_id(0), pixels, channels, tiles, blocks, rows, BLOCK_C
    )
    row = tl.arange(0, BLOCK_M)
    pivot = tl.load(x_ptr + c, mask=c_inside, other=0.0).to(ACC)[None, :]
    x_ptr += image * stride_xb + first * stride_xp
    # Of each row of the block its own statistics (Welford): nothing is exchanged inside the loop.
    means = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    spreads = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, rows, BLOCK_M):
        exists = (row < rows - start)[:, None]
        at = (start + row)[:, None] * stride_xp + c[None, :]
        x = tl.load(x_ptr + at, mask=exists & c_inside[None, :], other=0.0).to(ACC)
        x -= pivot
        delta = tl.where(exists, x - means, 0.0)
        means += delta * (1.0 / tl.full((), start // BLOCK_M + 1, ACC))
        spreads += delta * (x - means)
    counts = tl.maximum(tl.cdiv(rows - row, BLOCK_M), 0).to(ACC)
    mean, spread, count = merged_moments(means, spreads, counts)
    store_merged_moments(
        parts_ptr, counts_ptr, tile, mean, spread, count,
        c, c_inside, channels, tl.program_id(0) % blocks == 0,
    )  # fmt: skip


@triton.jit
def batch_norm_act_fwd_merge_kernel(
    parts_ptr, counts_ptr, pivot_ptr, mean_ptr, spread_ptr, merged_counts_ptr,
    parts, channels, blocks, stride_group,
    BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """BLOCK_T parts become one; without ``merged_counts_ptr`` they are all, and spread is the variance."""
    group = tl.program_id(0) // blocks
    part = group * BLOCK_T + tl.arange(0, BLOCK_T)
    c = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = (part < parts)[:, None] & (c < channels)[None, :]
    at = part.to(tl.int64)[:, None] * 2 * channels + c[None, :]
    means = tl.load(parts_ptr + at, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_C]
    spreads = tl.load(parts_ptr + channels + at, mask=inside, other=0.0)  # [BLOCK_T, BLOCK_C]
    counts = tl.load(counts_ptr + part, mask=part < parts, other=0.0)
    mean, spread, count = merged_moments(means, spreads, counts)
    if merged_counts_ptr is None:
        spread = spread / count
        if pivot_ptr is not None:
            mean += tl.load(pivot_ptr + c, mask=c < channels, other=0.0).to(mean.dtype)
    else:
        tl.store(merged_counts_ptr + group, count)
    at = group.to(tl.int64) * stride_group + c
    tl.store(mean_ptr + at, mean, mask=c < channels)
    tl.store(spread_ptr + at, spread, mask=c < channels)


@triton.jit
def inverse_deviation(variance_ptr, c, inside, eps):
    """1 / sqrt(variance + eps) of the channels ``c`` [BLOCK_C]; eps as ``_gpu.bits`` gives it."""
    variance = tl.load(variance_ptr + c, mask=inside, other=1.0)
    return tl.rsqrt(variance + number(eps, variance.dtype))


@triton.jit
def batch_norm_act_fwd_kernel(
    x_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, y_ptr,
    eps, pixels, channel_units, tiles, blocks, rows, stride_xb, stride_xp_units,
    UNIT: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Normalises a tile. From the last to the first: the last that the statistics read may still be in the cache."""
    channels, stride_xp = channel_units * UNIT, stride_xp_units * UNIT
    _, image, first, rows, c, c_inside = tile_of(
        tl.num_programs(0) - 1 - tl.program_id(0), pixels, channels, tiles, blocks, rows, BLOCK_C
    )
    row = tl.arange(0, BLOCK_M)[:, None]
    inside = (row < rows) & c_inside[None, :]
    x_ptr += image * stride_xb + first * stride_xp
    x = tl.load(x_ptr + row * stride_xp + c[None, :], mask=inside, other=0.0).to(ACC)
    mean = tl.load(mean_ptr + c, mask=c_inside, other=0.0)
    scale = tl.load(weight_ptr + c, mask=c_inside, other=0.0)
    scale *= inverse_deviation(variance_ptr, c, c_inside, eps)
    shift = tl.load(bias_ptr + c, mask=c_inside, other=0.0) - mean * scale
    y = activate(x * scale[None, :] + shift[None, :], ACT)  # [BLOCK_M, BLOCK_C]
    y_ptr += (image * pixels + first) * channels
    at = row * channels + c[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


def tiling(kernel: str, *maps: Tensor, looped: bool) -> tuple[dict[str, Any], int, tuple[int, ...]]:
    """Options of a kernel, its programs, and its arguments (pixels, channel units, tiles, blocks, rows of a tile).

    Maps as ``_gpu.pixels_inner`` gives them; their images are taken as one where they follow each other in memory. A
    ``looped`` kernel has some blocks of pixels in a tile.
    """
    images, channels, height, width = maps[0].shape
    pixels = height * width
    if all(m.stride(0) == pixels * _gpu.pixel_stride(m) for m in maps):
        images, pixels = 1, images * pixels
    options = _triton.config("batch_norm_act", kernel, maps[0])
    widest = options["BLOCK_C"]
    options["BLOCK_C"] = _gpu.block(channels, widest)
    options["BLOCK_M"] *= widest // options["BLOCK_C"]
    options["UNIT"] = _gpu.alignment(channels, *map(_gpu.pixel_stride, maps))
    options["ACC"] = _gpu.accumulator(maps[0].dtype)
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    steps = triton.cdiv(pixels, options["BLOCK_M"])
    # As many tiles as fill a large GPU, of at most 16 blocks.
    taken = min(16, max(1, images * steps * blocks // _ENOUGH)) if looped else 1
    tiles = triton.cdiv(steps, taken)
    counts = pixels, channels // options["UNIT"], tiles, blocks, taken * options["BLOCK_M"]
    return options, images * tiles * blocks, counts


def strides(x: Tensor, unit: int) -> tuple[int, int]:
    """From an image to the next, and from a pixel to the next in units."""
    return x.stride(0), _gpu.pixel_stride(x) // unit


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """Parts and counts of a map as ``_gpu.pixels_inner`` gives it; their pivot is the map's first pixel."""
    options, programs, counts = tiling("fwd_statistics", x, looped=True)
    channels, wide = x.shape[1], accumulation_dtype(x.dtype)
    found = programs // counts[3]
    parts = torch.empty(found, 2, channels, dtype=wide, device=x.device)
    sizes = torch.empty(found, dtype=wide, device=x.device)
    _triton.launch(
        batch_norm_act_fwd_statistics_kernel,
        programs,
        x, parts, sizes, *counts, *strides(x, options["UNIT"]), **options,
        trips=(counts[4] // options["BLOCK_M"],),
    )  # fmt: skip
    return parts, sizes


def merge_statistics(
    parts: Tensor, counts: Tensor, pivot: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance [C] from those of parts of the values.

    Chan's formula for any number of parts, in an order that depends on their number alone.

    Args:
        parts: [parts, 2, C] in the accumulation dtype: the mean of the values of a part, and the sum of squares about
            that mean; a kernel that makes a map writes a part per tile from its epilogue.
        counts: [parts] in the same dtype, how many values of each channel a part has, 0 or more.
        pivot: what was subtracted from the values, C numbers next to each other; None: nothing. One close to the mean
            keeps the digits that a large mean takes from the differences between parts.
    """
    channels = parts.shape[2]
    options = _triton.config("batch_norm_act", "fwd_merge", parts)
    options["BLOCK_C"] = _gpu.block(channels, options["BLOCK_C"])
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    while parts.shape[0] > options["BLOCK_T"]:
        groups = triton.cdiv(parts.shape[0], options["BLOCK_T"])
        merged, merged_counts = parts.new_empty(groups, 2, channels), counts.new_empty(groups)
        _triton.launch(
            batch_norm_act_fwd_merge_kernel,
            groups * blocks,
            parts, counts, None, merged, merged[0, 1], merged_counts,
            parts.shape[0], channels, blocks, merged.stride(0), **options,
        )  # fmt: skip
        parts, counts = merged, merged_counts
    mean, variance = _gpu.allocate([TensorSpec((channels,), parts.dtype, parts.device)] * 2)
    _triton.launch(
        batch_norm_act_fwd_merge_kernel,
        blocks,
        parts, counts, pivot, mean, variance, None, parts.shape[0], channels, blocks, 0, **options,
    )  # fmt: skip
    return mean, variance


def statistics_of(parts: _gpu.Parts) -> list[Tensor]:
    """``merge_statistics`` of what a kernel has written into ``_gpu.parts_of_moments``; nothing of none."""
    moments, counts = parts
    return [] if moments is None or counts is None else [*merge_statistics(moments, counts)]


def run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: str,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> list[Tensor]:
    """y like x; without ``mean`` also the batch's mean and variance [C]."""
    x = _gpu.pixels_inner(x)
    moments = []
    if mean is None:
        mean, variance = moments = merge_statistics(*statistics(x), pivot=x[0, :, 0, 0])
    (y,) = _gpu.allocate([_library.nchw(x.shape, x)])
    options, programs, counts = tiling("fwd", x, looped=False)
    _triton.launch(
        batch_norm_act_fwd_kernel,
        programs,
        x, *map(_gpu.dense, (mean, variance, weight, bias)), y,
        _gpu.bits(eps), *counts, *strides(x, options["UNIT"]), ACT=act, **options,
    )  # fmt: skip
    return [y, *moments]
