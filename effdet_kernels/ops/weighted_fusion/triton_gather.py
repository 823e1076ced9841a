"""Triton kernels of the gradient of a map of which several pixels of a fusion's result see a pixel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops.weighted_fusion.triton_fwd import tile_of, tiling
from effdet_kernels.ops.weighted_fusion.triton_load import between, fusion_shares, nearest


@triton.jit
def weighted_fusion_bwd_max_kernel(
    delta_ptr, weight_ptr, winners_ptr, dx_ptr,
    height, width, x_height, x_width, channel_units, blocks, pool_left, pool_top,
    UNIT: tl.constexpr, ACC: tl.constexpr, METHOD: tl.constexpr, MAPS: tl.constexpr,
    INDEX: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of 2 x 2 pixels at each place: the shares of delta of the up to 4 windows in which they won."""
    channels = channel_units * UNIT
    image, row, column, channel = tile_of(
        tl.program_id(0), tl.cdiv(x_height + pool_top, 2), tl.cdiv(x_width + pool_left, 2), blocks,
        BLOCK_H, BLOCK_W, BLOCK_C,
    )  # fmt: skip
    share = fusion_shares(weight_ptr, METHOD, MAPS, ACC)[INDEX]
    deltas = ()
    winners = ()
    for window in tl.static_range(4):  # (row, column), and those before it in both directions
        r, c = row - window // 2, column - window % 2
        exists = (r >= 0) & (r < height) & (c >= 0) & (c < width) & (channel < channels)
        at = ((image * height + r) * width + c) * channels + channel
        delta = tl.load(delta_ptr + at, mask=exists, other=0.0).to(ACC)
        deltas += (delta * share,)
        winners += (tl.load(winners_ptr + at, mask=exists, other=-1).to(tl.int32),)
    for i in tl.static_range(2):
        for j in tl.static_range(2):
            total = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), ACC)
            for up in tl.static_range(2 - i):
                for back in tl.static_range(2 - j):
                    won = winners[2 * up + back] == 3 * (i + 2 * up) + j + 2 * back
                    total += tl.where(won, deltas[2 * up + back], 0.0)
            r, c = 2 * row + i - pool_top, 2 * column + j - pool_left
            inside = (r >= 0) & (r < x_height) & (c >= 0) & (c < x_width) & (channel < channels)
            at = ((image * x_height + r) * x_width + c) * channels + channel
            tl.store(dx_ptr + at, total.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight_of(place, source, size, of, HOW: tl.constexpr, ACC: tl.constexpr):
    """What pixel ``source`` of ``size`` is multiplied by in pixel ``place`` of ``of``."""
    exists = (place >= 0) & (place < of)
    if HOW == "nearest":
        return tl.where(exists & (nearest(place, size, of) == source), 1.0, 0.0).to(ACC)
    first, second, weight = between(place, size, of, ACC)
    found = tl.where(first == source, 1.0 - weight, 0.0) + tl.where(second == source, weight, 0.0)
    return tl.where(exists, found, 0.0)


@triton.jit
def weighted_fusion_bwd_interpolated_kernel(
    delta_ptr, weight_ptr, dx_ptr,
    height, width, x_height, x_width, channel_units, blocks, reach_h, reach_w,
    UNIT: tl.constexpr, ACC: tl.constexpr, METHOD: tl.constexpr, MAPS: tl.constexpr,
    INDEX: tl.constexpr, HOW: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a map read by "nearest" or "bilinear" at any ratio: a look at the reach_h x reach_w results around."""
    channels = channel_units * UNIT
    image, row, column, channel = tile_of(
        tl.program_id(0), x_height, x_width, blocks, BLOCK_H, BLOCK_W, BLOCK_C
    )
    share = fusion_shares(weight_ptr, METHOD, MAPS, ACC)[INDEX]
    inside = (row < x_height) & (column < x_width) & (channel < channels)
    delta_ptr += image * height * width * channels
    total = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), ACC)
    for i in range(reach_h):
        r = (2 * row - 1) * height // (2 * x_height) - 1 + i
        by_row = _weight_of(r, row, x_height, height, HOW, ACC)
        for j in range(reach_w):
            c = (2 * column - 1) * width // (2 * x_width) - 1 + j
            factor = by_row * _weight_of(c, column, x_width, width, HOW, ACC)
            at = (r * width + c) * channels + channel
            delta = tl.load(delta_ptr + at, mask=inside & (factor > 0), other=0.0).to(ACC)
            total += delta * factor
    at = ((image * x_height + row) * x_width + column) * channels + channel
    tl.store(dx_ptr + at, (total * share).to(dx_ptr.dtype.element_ty), mask=inside)


def gather(
    delta: Tensor,
    weight: Tensor | None,
    dx: Tensor,
    winners: Tensor | None,
    shape: tuple[int, ...],
    index: int,
    names: Sequence[str],
    pool_padding: Sequence[int],
    common: dict[str, Any],
) -> None:
    """Fills the gradient dx of a map that several pixels of the result look at."""
    height, width, x_height, x_width = shape
    constants = {**common, "MAPS": len(names), "INDEX": index}
    units = dx.shape[1] // common["UNIT"]
    if winners is not None:
        left, top = pool_padding[0], pool_padding[2]
        rows, columns = triton.cdiv(x_height + top, 2), triton.cdiv(x_width + left, 2)
        options, programs, blocks = tiling("bwd_max", dx, rows, columns)
        _triton.launch(
            weighted_fusion_bwd_max_kernel,
            programs,
            delta, weight, winners, dx, *shape, units, blocks, left, top, **constants, **options,
        )  # fmt: skip
        return
    options, programs, blocks = tiling("bwd_interpolated", dx, x_height, x_width)
    reach = 2 * height // x_height + 4, 2 * width // x_width + 4
    _triton.launch(
        weighted_fusion_bwd_interpolated_kernel,
        programs,
        delta, weight, dx, *shape, units, blocks, *reach,
        HOW=names[index], **constants, **options, trips=reach,
    )  # fmt: skip
