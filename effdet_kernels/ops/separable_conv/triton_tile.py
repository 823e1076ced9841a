"""What the Triton kernels of ``separable_conv`` share: who works where, and a tile of the depthwise convolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import activate, revealed
from effdet_kernels.ops.depthwise_conv.triton_fwd import zeros
from effdet_kernels.ops.weighted_fusion.triton_load import fused_pixels


@triton.jit
def of_output(values, firsts, program):
    """The one of ``values`` for the output that ``program`` is in; outputs begin at the programs ``firsts``."""
    found = values[0]
    for i in tl.static_range(1, len(firsts)):
        if program >= revealed(firsts[i]):
            found = values[i % len(values)]
    return found


@triton.jit
def patches(
    tile, lane, height, width, steps,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Top rows and left columns of the first patches of lanes of a tile; ``steps`` of each lie one below another."""
    across = tl.cdiv(width, PATCH_W)
    strip = tile * LANES + lane
    return strip // across * (steps * PATCH_H), strip % across * PATCH_W


@triton.jit
def pixels_of(
    tile, m, height, width, steps,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """The pixels of rows m of a tile's product, in row-major order of an image; height * width or more: of none."""
    lane = m // (PATCH_H * PATCH_W)
    top, left = patches(tile, lane, height, width, steps, PATCH_H, PATCH_W, LANES)
    row, column = top + m // PATCH_W % PATCH_H, left + m % PATCH_W
    return tl.where(column < width, row * width + column, height * width)


@triton.jit
def _within(place, size):
    """Whether 0 <= place < size."""
    return place.to(tl.uint32) < size.to(tl.uint32)


@triton.jit
def _stacked(parts):
    """1, 2, 4, 8 or 16 tensors [LANES, BLOCK] as [LANES * len(parts), BLOCK], the parts of a lane in their order."""
    COUNT: tl.constexpr = len(parts)
    LANES: tl.constexpr = parts[0].shape[0]
    BLOCK: tl.constexpr = parts[0].shape[1]
    for _ in tl.static_range(4):
        if len(parts) > 1:
            joined = ()
            for i in tl.static_range(len(parts) // 2):
                joined += (tl.join(parts[i], parts[i + len(parts) // 2]),)
            parts = joined
    z = tl.reshape(parts[0], (LANES, BLOCK, COUNT))
    return tl.reshape(tl.permute(z, (0, 2, 1)), (LANES * COUNT, BLOCK))


@triton.jit
def _with_row(
    sums, x, geometry, shares, weights, image, row, left, c, channels, height, width, pool_left, pool_top,
    PLACE: tl.constexpr, UNIT: tl.constexpr, RESAMPLE: tl.constexpr, ACC: tl.constexpr,
    KERNEL: tl.constexpr, PATCH_W: tl.constexpr, PRE_ACT: tl.constexpr,
):  # fmt: skip
    """``sums`` and what ``row``, the row PLACE of patches and their border, adds to each pixel of a patch."""
    pixels = ()
    for j in tl.static_range(PATCH_W + KERNEL - 1):
        column = left + (j - KERNEL // 2)
        exists = _within(row, height) & _within(column, width)
        value = fused_pixels(
            x, geometry, shares, image, row[:, None], column[:, None], c[None, :],
            exists[:, None] & (c < channels)[None, :], height, width, pool_left, pool_top,
            UNIT, RESAMPLE, ACC,
        )  # [LANES, BLOCK_K] # fmt: skip
        pixels += (activate(value, PRE_ACT),)
    added = ()
    for place in tl.static_range(len(sums)):
        result = sums[place]
        for t in tl.static_range(KERNEL * KERNEL):
            if place // PATCH_W + t // KERNEL == PLACE:
                result += pixels[place % PATCH_W + t % KERNEL] * weights[t]
        added += (result,)
    return added


@triton.jit
def depthwise(
    x, geometry, shares, weights, image, top, left, c, channels, height, width, pool_left, pool_top,
    UNIT: tl.constexpr, RESAMPLE: tl.constexpr, ACC: tl.constexpr, KERNEL: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, PRE_ACT: tl.constexpr,
):  # fmt: skip
    """[LANES * PATCH_H * PATCH_W, BLOCK_K] in the dtype of x: patches at (top, left) [LANES], channels c [BLOCK_K].

    What is convolved, the activated fusion of x, is computed once per pixel of a patch and of its border.
    """
    sums = zeros(PATCH_H * PATCH_W, top.shape[0], c.shape[0], ACC)
    # A row that costs much is a block of its own, skipped below the map: the compiler keeps all rows in registers else.
    PLAIN: tl.constexpr = len(RESAMPLE) == 1 and PRE_ACT == "none"
    highest = tl.min(top, 0)
    for i in tl.static_range(PATCH_H + KERNEL - 1):
        if PLAIN or highest + (i - KERNEL // 2) < height:
            sums = _with_row(
                sums, x, geometry, shares, weights, image, top + (i - KERNEL // 2), left, c, channels,
                height, width, pool_left, pool_top, i, UNIT, RESAMPLE, ACC, KERNEL, PATCH_W, PRE_ACT,
            )  # fmt: skip
    results = ()
    for place in tl.static_range(PATCH_H * PATCH_W):
        results += (sums[place].to(x[0].dtype.element_ty),)
    return _stacked(results)


def tiling(
    kernel: str, like: Tensor, out_channels: int, sizes: Sequence[tuple[int, int]]
) -> tuple[dict[str, Any], list[int]]:
    """Options of a kernel on maps like ``like``, and how many tiles an image of each of ``sizes`` has."""
    batch, channels = like.shape[:2]
    options = _triton.config("separable_conv", kernel, like, channels)
    # What is padded costs less than making the depthwise result again for another block.
    for name, count in (("BLOCK_N", out_channels), ("BLOCK_K", channels)):
        options[name] = min(options[name], max(16, triton.next_power_of_2(count)))
    tiles = _tiles(options, sizes)
    # Few programs: each with less to do, in rows of the product, of which matrix units take 16 at least.
    for name, least, few in (
        ("STEPS", 1, 4 * _gpu.MULTIPROCESSORS),
        ("PATCH_H", 1, _gpu.MULTIPROCESSORS),
        ("PATCH_W", 2, _gpu.MULTIPROCESSORS),
        ("LANES", 8, _gpu.MULTIPROCESSORS),
    ):
        while options[name] > least and batch * sum(tiles) < few:
            if name != "STEPS" and options["LANES"] * options["PATCH_H"] * options["PATCH_W"] <= 16:
                break
            options[name] //= 2
            tiles = _tiles(options, sizes)
    return options, tiles


def _tiles(options: dict[str, Any], sizes: Sequence[tuple[int, int]]) -> list[int]:
    rows, columns = options["STEPS"] * options["PATCH_H"], options["PATCH_W"]
    return [
        triton.cdiv(triton.cdiv(height, rows) * triton.cdiv(width, columns), options["LANES"])
        for height, width in sizes
    ]
