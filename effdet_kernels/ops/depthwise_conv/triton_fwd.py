"""Triton kernel of ``depthwise_conv``: a walk down an image with the unfinished output rows in registers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _arguments, _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import affine_act, merged_moments, store_merged_moments
from effdet_kernels.ops.batch_norm_act.triton_fwd import statistics_of


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
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    column = (part % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = c < channels
    owned = (column < out_width)[:, None] & inside[None, :]
    weights = taps(weight_ptr, c, inside, K, ACC)
    sums = zeros(LIVE, BLOCK_W, BLOCK_C, ACC)
    total = tl.zeros((BLOCK_W, BLOCK_C), ACC)
    pivot = tl.zeros((BLOCK_W, BLOCK_C), ACC)
    squares = tl.zeros((BLOCK_W, BLOCK_C), ACC)
    source = column * STRIDE - left
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    x_ptr += image * stride_xb + (source * stride_xw)[:, None] + c[None, :]
    y_ptr += image * out_height * out_width * channels
    for step in tl.range(0, ROWS + LIVE - 1, num_stages=STAGES):
        rows = load_rows(
            x_ptr, (first + step) * STRIDE - top, height, stride_xh, stride_xw, width, source, inside,
            K, STRIDE,
        )  # fmt: skip
        sums = with_rows(sums, weights, rows, K, STRIDE, ACC)
        row = first + step - (LIVE - 1) + tl.zeros_like(column)
        done = owned & ((row >= first) & (row < out_height))[:, None]
        y = affine_act(sums[LIVE - 1], scale_ptr, shift_ptr, c, inside, ACT)
        if sums_ptr is not None:
            total += tl.where(done, y, 0.0)
        if parts_ptr is not None:
            pivot = tl.where((row == first)[:, None], y, pivot)
            apart = tl.where(done, y - pivot, 0.0)
            total += apart
            squares += apart * apart
        at = (row * out_width + column)[:, None] * channels + c[None, :]
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=done)
        sums = zeros(1, BLOCK_W, BLOCK_C, ACC) + sums[: LIVE - 1]
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
    kernel: str, like: Tensor, batch: int, channels: int, rows: int, columns: int, size: int
) -> tuple[dict[str, Any], int, int, int]:
    """Options of a kernel that walks down ``rows`` of ``columns``; segments, tiles of columns, blocks of channels.

    ``size`` grows with what a thread holds in registers.
    """
    options = _triton.config("depthwise_conv", kernel, like, size)
    widest = options["BLOCK_C"]
    options["BLOCK_C"] = _gpu.block(channels, widest)
    options["BLOCK_W"] *= widest // options["BLOCK_C"]
    tiles = triton.cdiv(columns, options["BLOCK_W"])
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    resident = options.pop("RESIDENT")
    segments = _segments(rows, options["ROWS"], batch * tiles * blocks, resident)
    options["ROWS"] = triton.cdiv(rows, segments)
    return options, segments, tiles, blocks


@functools.cache
def _segments(rows: int, most: int, others: int, resident: int) -> int:
    """How many segments of at most ``most`` rows are done first: each ``others`` programs, ``resident`` of them at a
    time on a multiprocessor.

    What was measured on an H200: a program takes the time of its rows and of some six more (its weights, and the rows
    around a segment), and each other one on its multiprocessor a third more.
    """

    def time(segments: int) -> float:
        waves, last = divmod(triton.cdiv(segments * others, _gpu.MULTIPROCESSORS), resident)
        crowds = waves * (1 + (resident - 1) / 3) + (1 + (last - 1) / 3 if last else 0)
        return (triton.cdiv(rows, segments) + 6) * crowds

    return min(range(triton.cdiv(rows, most), rows + 1), key=time)


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
    x = _gpu.channels_inner(x)
    batch, channels, height, width = x.shape
    k = weight.shape[2]
    out_height, out_width = _arguments.convolved_size("depthwise_conv", x, k, stride, padding)
    (y,) = _gpu.allocate([_library.nchw((batch, channels, out_height, out_width), x)])
    options, segments, tiles, blocks = walk("fwd", x, batch, channels, out_height, out_width, k)
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
        trips=(options["ROWS"] + triton.cdiv(k, stride) - 1,), **options,
    )  # fmt: skip
    return [y, *statistics_of(parts)] if sums is None else [y, sums.sum(1)]
