"""Triton kernel of ``weighted_fusion``: the fusion of a tile of pixels, stored."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import activate
from effdet_kernels.ops.weighted_fusion.triton_load import fused_pixels, fusion_shares, sources


@triton.jit
def tile_of(
    program, height, width, blocks,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program's tile: its image, rows and columns [BLOCK_H * BLOCK_W, 1], channels [1, BLOCK_C]."""
    across = tl.cdiv(width, BLOCK_W)
    tiles = tl.cdiv(height, BLOCK_H) * across
    tile = program // blocks
    pixel = tl.arange(0, BLOCK_H * BLOCK_W)
    row = tile % tiles // across * BLOCK_H + pixel // BLOCK_W
    column = tile % tiles % across * BLOCK_W + pixel % BLOCK_W
    channel = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tile // tiles).to(tl.int64), row[:, None], column[:, None], channel[None, :]


@triton.jit
def weighted_fusion_fwd_kernel(
    y_ptr, weight_ptr, x, geometry, height, width, channel_units, blocks, pool_left, pool_top,
    UNIT: tl.constexpr, ACC: tl.constexpr, METHOD: tl.constexpr, RESAMPLE: tl.constexpr,
    ACT: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_H x BLOCK_W pixels of an image, BLOCK_C channels. Counts in units: ``_gpu.alignment``."""
    channels = channel_units * UNIT
    image, row, column, channel = tile_of(
        tl.program_id(0), height, width, blocks, BLOCK_H, BLOCK_W, BLOCK_C
    )
    inside = (row < height) & (column < width) & (channel < channels)
    shares = fusion_shares(weight_ptr, METHOD, len(RESAMPLE), ACC)
    y = fused_pixels(
        x, geometry, shares, image, row, column, channel, inside, height, width, pool_left, pool_top,
        UNIT, RESAMPLE, ACC,
    )  # [BLOCK_H * BLOCK_W, BLOCK_C] # fmt: skip
    at = (row * width + column) * channels + channel
    y_ptr += image * height * width * channels
    tl.store(y_ptr + at, activate(y, ACT).to(y_ptr.dtype.element_ty), mask=inside)


def tiling(kernel: str, like: Tensor, height: int, width: int) -> tuple[dict[str, Any], int, int]:
    """Options of a kernel on height x width places per image of ``like``; its programs and blocks of channels."""
    batch, channels = like.shape[:2]
    options = _triton.config("weighted_fusion", kernel, like)
    pixels, widest = options.pop("BLOCK_P"), options["BLOCK_C"]
    options["BLOCK_C"] = _gpu.block(channels, widest)
    pixels *= widest // options["BLOCK_C"]
    # Nearly square: a window of a max-pool reaches into the tiles around.
    square = 1 << pixels.bit_length() // 2
    options["BLOCK_W"] = min(square, triton.next_power_of_2(width))
    options["BLOCK_H"] = pixels // options["BLOCK_W"]
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    rows, columns = triton.cdiv(height, options["BLOCK_H"]), triton.cdiv(width, options["BLOCK_W"])
    return options, batch * rows * columns * blocks, blocks


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
    maps, geometry, names, unit = sources(x, resample, size)
    batch, channels = maps[0].shape[:2]
    height, width = size
    (y,) = _gpu.allocate([_library.nchw((batch, channels, height, width), maps[0])])
    kernel = "fwd_max" if "max" in names else "fwd"
    options, programs, blocks = tiling(kernel, y, height, width)
    _triton.launch(
        weighted_fusion_fwd_kernel,
        programs,
        y, _gpu.dense(weight), maps, geometry, height, width, channels // unit, blocks,
        pool_padding[0], pool_padding[2],
        UNIT=unit, ACC=_gpu.accumulator(y.dtype), METHOD=method, RESAMPLE=names, ACT=act, **options,
    )  # fmt: skip
    return y
