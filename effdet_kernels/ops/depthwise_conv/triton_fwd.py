"""Triton kernel of ``depthwise_conv``: a walk down an image with the unfinished output rows in registers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _arguments, _gpu, _walk
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import affine_act, merged_moments, store_merged_moments
from effdet_kernels.ops.batch_norm_act.triton_fwd import statistics_of
from effdet_kernels.ops.depthwise_conv.triton_matrix import (
    joined,
    load_row_pairs,
    pairs,
    spoilt,
    with_row_pairs,
    within,
)


@triton.jit
def taps(weight_ptr, c, inside, K: tl.constexpr, ACC: tl.constexpr):
    """The K * K weights of the channels ``c``, each [1, BLOCK_C]."""
    found = ()
    for tap in tl.static_range(K * K):
        weight = tl.load(weight_ptr + c * (K * K) + tap, mask=inside, other=0.0)
        found = found + (weight.to(ACC)[None, :],)
    return found


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ACC: tl.constexpr):
    """COUNT tiles of zeros."""
    found = ()
    for _ in tl.static_range(COUNT):
        found = found + (tl.zeros((ROWS, COLUMNS), ACC),)
    return found


@triton.jit
def load_rows(
    x_ptr, row, height, stride_h, stride_w, width, first, inside, K: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """STRIDE input rows from ``row`` on, each as K tiles [BLOCK_W, BLOCK_C], one for each column of the kernel.

    ``x_ptr`` [BLOCK_W, BLOCK_C] points to the pixels of row 0 under the kernel's first column, which are in the columns
    ``first``.
    """
    found = ()
    for q in tl.static_range(STRIDE):
        source_row = row + q + tl.zeros_like(first)
        exists = (source_row >= 0) & (source_row < height)
        row_ptr = x_ptr + (row + q) * stride_h
        for j in tl.static_range(K):
            mask = (exists & (first + j >= 0) & (first + j < width))[:, None] & inside[None, :]
            found = found + (tl.load(row_ptr + j * stride_w, mask=mask, other=0.0),)
    return found


@triton.jit
def with_rows(sums, weights, rows, K: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr):
    """``sums`` and what ``rows`` add; sums[d] is of the output row d before the newest.

    Each pixel is loaded once for each of the K columns, and used for all the rows of the kernel.
    """
    for q in tl.static_range(STRIDE):
        for j in tl.static_range(K):
            x = rows[q * K + j].to(ACC)
            added = ()
            for d in tl.static_range(len(sums)):
                if d * STRIDE + q < K:
                    added = added + (sums[d] + weights[(d * STRIDE + q) * K + j] * x,)
                else:
                    added = added + (sums[d],)
            sums = added
    return sums


@triton.jit
def weights_of(
    weight_ptr, first_channel, channels, c, inside, K: tl.constexpr, STEP: tl.constexpr, DTYPE: tl.constexpr,
    ACC: tl.constexpr, MATRIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """The weights of channels c, as matrix units take them or as they are."""
    if MATRIX:
        weights = pairs(weight_ptr, first_channel, channels, K, STEP, DTYPE, WHOLE)
    else:
        weights = taps(weight_ptr, c, inside, K, ACC)
    return weights


@triton.jit
def with_input(
    sums, weights, x_ptr, pixels, row, height, stride_h, stride_w, width, column, first_channel, channels, inside,
    K: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, MATRIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``sums`` and what STRIDE input rows from ``row`` on add; ``pixels``: as ``x_ptr`` in ``load_rows``."""
    if MATRIX:
        rows = load_row_pairs(
            x_ptr, row, height, stride_h, stride_w, width, column, first_channel, channels, K, STRIDE, WHOLE,
        )  # fmt: skip
        sums = with_row_pairs(sums, weights, rows, K, STRIDE)
    else:
        rows = load_rows(pixels, row, height, stride_h, stride_w, width, column, inside, K, STRIDE)
        sums = with_rows(sums, weights, rows, K, STRIDE, ACC)
    return sums


@triton.jit
def tap_by_tap(
    weight_ptr, x_ptr, row, height, stride_h, stride_w, width, column, c, inside, K: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The sums of the output row whose kernel begins in the input row ``row``; arguments as in ``with_input``."""
    z = tl.zeros((column.shape[0], c.shape[0]), ACC)
    for tap in range(K * K):
        i, j = tap // K, tap % K
        at, source_row = column + j, row + i + tl.zeros_like(column)
        mask = (source_row >= 0) & (source_row < height) & (at >= 0) & (at < width)
        mask = mask[:, None] & inside[None, :]
        at = (source_row * stride_h + at * stride_w)[:, None] + c[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0)
        weight = tl.load(weight_ptr + c * (K * K) + tap, mask=inside, other=0.0)
        z += x.to(ACC) * weight.to(ACC)[None, :]
    return z


@triton.jit
def _with_row(
    found, z, row, first, column, owned, y_ptr, scale_ptr, shift_ptr, sums_ptr, parts_ptr,
    out_height, out_width, channels, c, inside, ACT: tl.constexpr,
):  # fmt: skip
    """Writes the output row of the sums z; ``found``, what is known of the rows before, and of this one."""
    total, pivot, squares = found
    row += tl.zeros_like(column)
    done = owned & ((row >= first) & (row < out_height))[:, None]
    y = affine_act(z, scale_ptr, shift_ptr, c, inside, ACT)
    if sums_ptr is not None:
        total += tl.where(done, y, 0.0)
    if parts_ptr is not None:
        pivot = tl.where((row == first)[:, None], y, pivot)
        apart = tl.where(done, y - pivot, 0.0)
        total += apart
        squares += apart * apart
    at = (row * out_width + column)[:, None] * channels + c[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=done)
    return total, pivot, squares


@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "channel_units", "left", "top",
        "stride_xh_units", "stride_xw_units", "segments", "tiles", "blocks", "ROWS",
    ]
)  # fmt: skip
def depthwise_conv_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, y_ptr, sums_ptr, parts_ptr, counts_ptr,
    height, width, out_height, out_width, channel_units, left, top,
    stride_xb, stride_xh_units, stride_xw_units, segments, tiles, blocks,
    UNIT: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    ACT: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    MATRIX: tl.constexpr,
):  # fmt: skip
    """A program: ROWS output rows by BLOCK_W columns of an image, BLOCK_C channels. Counts in units.

    Statistics are taken of a column's values less the first of them: as that is one of them, what squaring and
    subtracting loses is at most as many roundings as there are rows.
    """
    LIVE: tl.constexpr = (K + STRIDE - 1) // STRIDE
    program = tl.program_id(0)
    part = program // blocks
    image = (part // (tiles * segments)).to(tl.int64)
    first = (part // tiles % segments) * ROWS
    channels = channel_units * UNIT
    first_channel = (program % blocks) * BLOCK_C
    c = first_channel + tl.arange(0, BLOCK_C)
    column = (part % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    WHOLE: tl.constexpr = UNIT % BLOCK_C == 0
    inside = within(c, channels, WHOLE)
    owned = (column < out_width)[:, None] & inside[None, :]
    weights = weights_of(
        weight_ptr, first_channel, channels, c, inside, K, 1, x_ptr.dtype.element_ty, ACC, MATRIX, WHOLE,
    )  # fmt: skip
    TILES: tl.constexpr = 2 if MATRIX else 1  # of an output row
    sums = zeros(LIVE * TILES, BLOCK_W, BLOCK_C // TILES, ACC)
    found = zeros(3, BLOCK_W, BLOCK_C, ACC)
    bad = tl.zeros((BLOCK_W, BLOCK_C // TILES), ACC)
    source = column * STRIDE - left
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    x_ptr += image * stride_xb
    pixels = x_ptr + (source * stride_xw)[:, None] + c[None, :]
    y_ptr += image * out_height * out_width * channels
    for step in tl.range(0, ROWS + LIVE - 1, num_stages=STAGES):
        sums = with_input(
            sums, weights, x_ptr, pixels, (first + step) * STRIDE - top, height, stride_xh, stride_xw, width, source,
            first_channel, channels, inside, K, STRIDE, ACC, MATRIX, WHOLE,
        )  # fmt: skip
        z = joined(sums[(LIVE - 1) * TILES :])
        row = first + step - (LIVE - 1)
        found = _with_row(
            found, z, row, first, column, owned, y_ptr, scale_ptr, shift_ptr, sums_ptr, parts_ptr,
            out_height, out_width, channels, c, inside, ACT,
        )  # fmt: skip
        if MATRIX:
            bad += spoilt(sums[(LIVE - 1) * TILES :])
        sums = zeros(TILES, BLOCK_W, BLOCK_C // TILES, ACC) + sums[: (LIVE - 1) * TILES]
    if MATRIX:  # noqa: SIM102, what is known when compiled apart
        # Matrix units multiply a NaN or an infinity by the zeros of the other channels: all once more, without them.
        if tl.sum(bad) != 0.0:
            found = zeros(3, BLOCK_W, BLOCK_C, ACC)
            for row in range(first, tl.minimum(first + ROWS, out_height)):
                z = tap_by_tap(
                    weight_ptr, x_ptr, row * STRIDE - top, height, stride_xh, stride_xw, width, source, c, inside,
                    K, ACC,
                )  # fmt: skip
                found = _with_row(
                    found, z, row, first, column, owned, y_ptr, scale_ptr, shift_ptr, sums_ptr, parts_ptr,
                    out_height, out_width, channels, c, inside, ACT,
                )  # fmt: skip
    total, pivot, squares = found
    if sums_ptr is not None:
        at = part.to(tl.int64) * channels + c
        tl.store(sums_ptr + at, tl.sum(total, 0), mask=inside)
    if parts_ptr is not None:
        done_rows = tl.minimum(tl.maximum(out_height - first, 0), ROWS)
        counts = tl.where(column < out_width, done_rows, 0).to(ACC)
        above = total / tl.maximum(counts, 1.0)[:, None]
        mean, spread, count = merged_moments(pivot + above, squares - total * above, counts)
        store_merged_moments(
            parts_ptr, counts_ptr, part, mean, spread, count,
            c, inside, channels, program % blocks == 0,
        )  # fmt: skip


def walk(
    kernel: str,
    like: Tensor,
    batch: int,
    channels: int,
    rows: int,
    columns: int,
    k: int,
    stride: int,
) -> tuple[dict[str, Any], int, int, int]:
    """Options of a kernel that walks down ``rows`` of ``columns``; segments, tiles of columns, blocks of channels.

    Rows of launch.json are chosen by k, or k + 1 with a stride: what a thread holds in registers grows with it.
    """
    options = _triton.config("depthwise_conv", kernel, like, k + (stride > 1))
    resident = options.pop("RESIDENT")
    if options["MATRIX"]:  # of narrow maps, less of which there is nothing
        while options["BLOCK_W"] >= 32 and options["BLOCK_W"] >= 2 * columns:
            options["BLOCK_W"] //= 2
            options["num_warps"] = max(1, options["num_warps"] // 2)
    else:
        widest = options["BLOCK_C"]
        options["BLOCK_C"] = _gpu.block(channels, widest)
        options["BLOCK_W"] *= widest // options["BLOCK_C"]
    tiles = triton.cdiv(columns, options["BLOCK_W"])
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    others = batch * tiles * blocks
    segments = _walk.segments(rows, options["ROWS"], others, resident, options["num_warps"])
    options["ROWS"] = triton.cdiv(rows, segments)
    return options, segments, tiles, blocks


def products(options: dict[str, Any], k: int, programs: int) -> int:
    """The FLOPs of matrix units for ``programs``: one of the two factors is half zeros, and so is a pair's last tap."""
    if not options["MATRIX"]:
        return 0
    each = options["ROWS"] * options["BLOCK_W"] * options["BLOCK_C"]
    return programs * each * 2 * 16 * k * triton.cdiv(k, 2)


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
    statistics: bool = False,
) -> list[Tensor]:
    """y [B, C, H', W']; with ``squeeze`` also its sums [B, C], or with ``statistics`` mean and variance [C]."""
    x = _gpu.channels_inner(x)
    batch, channels, height, width = x.shape
    k = weight.shape[2]
    out_height, out_width = _arguments.convolved_size("depthwise_conv", x, k, stride, padding)
    (y,) = _gpu.allocate([_library.nchw((batch, channels, out_height, out_width), x)])
    options, segments, tiles, blocks = walk(
        "fwd", x, batch, channels, out_height, out_width, k, stride
    )
    sums = None
    if squeeze:
        wide = accumulation_dtype(x.dtype)
        sums = torch.empty(batch, segments * tiles, channels, dtype=wide, device=x.device)
    found = batch * segments * tiles
    parts = _gpu.parts_of_moments(found if statistics else 0, channels, x)
    unit = _gpu.alignment(channels, x.stride(2), x.stride(3))
    _triton.launch(
        depthwise_conv_fwd_kernel,
        found * blocks,
        x, weight.contiguous(), _gpu.dense(scale), _gpu.dense(shift), y, sums, *parts,
        height, width, out_height, out_width, channels // unit, padding[0], padding[2],
        x.stride(0), x.stride(2) // unit, x.stride(3) // unit, segments, tiles, blocks,
        UNIT=unit, ACC=_gpu.accumulator(x.dtype), K=k, STRIDE=stride, ACT=act,
        trips=(options["ROWS"] + triton.cdiv(k, stride) - 1,),
        flops=products(options, k, found * blocks), **options,
    )  # fmt: skip
    return [y, *statistics_of(parts)] if sums is None else [y, sums.sum(1)]
