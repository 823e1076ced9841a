"""Triton kernels of ``dense_conv``: the gradient of x, given that of the convolution's result."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops.dense_conv.triton_fwd import constants, tap_product, wide_block


@triton.jit
def dense_conv_bwd_dx_cell_kernel(
    delta_ptr, weight_ptr, dx_ptr,
    height, width, out_height, out_width, out_units, tiles, rows, columns, left, top,
    stride_b, stride_h_units, stride_w_units, stride_wo, stride_wc, stride_wi, stride_wj,
    OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M cells of STRIDE x STRIDE pixels, which meet the same outputs; BLOCK_N holds what is in a cell.

    Pixel r of cell u is at u STRIDE + r - top; there tap r + n STRIDE meets output u - n.
    """
    program = tl.program_id(0)
    image = (program // tiles).to(tl.int64)
    out_channels = out_units * OUT_UNIT
    cell = (program % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    u, v = cell // columns + top // STRIDE, cell % columns + left // STRIDE
    n = tl.arange(0, BLOCK_N)
    r, s, c = n // (CHANNELS * STRIDE), n // CHANNELS % STRIDE, n % CHANNELS
    taps: tl.constexpr = (KERNEL + STRIDE - 1) // STRIDE
    delta_ptr += image * stride_b
    dx = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for step in range(taps * taps * tl.cdiv(out_channels, BLOCK_K)):
        out = step // (taps * taps) * BLOCK_K + tl.arange(0, BLOCK_K)
        h, w = u - step // taps % taps, v - step % taps
        within = (cell < rows * columns) & (h >= 0) & (h < out_height) & (w >= 0) & (w < out_width)
        at = h * (stride_h_units * OUT_UNIT) + w * (stride_w_units * OUT_UNIT)
        delta = tl.load(
            delta_ptr + at[:, None] + out[None, :],
            mask=within[:, None] & (out < out_channels)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        i, j = r + step // taps % taps * STRIDE, s + step % taps * STRIDE
        tap = (i < KERNEL) & (j < KERNEL) & (r < STRIDE)
        weight = tl.load(
            weight_ptr
            + out[:, None] * stride_wo
            + (c * stride_wc + i * stride_wi + j * stride_wj)[None, :],
            mask=(out < out_channels)[:, None] & tap[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        dx = tl.dot(delta, weight, acc=dx, input_precision=PRECISION, out_dtype=ACC)
    h = u[:, None] * STRIDE - top + r[None, :]
    w = v[:, None] * STRIDE - left + s[None, :]
    mask = (h >= 0) & (h < height) & (w >= 0) & (w < width) & (cell < rows * columns)[:, None]
    at = (h * width + w) * CHANNELS + c[None, :]
    dx_ptr += image * height * width * CHANNELS
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask & (r < STRIDE)[None, :])


@triton.jit
def dense_conv_bwd_dx_kernel(
    delta_ptr, weight_ptr, dx_ptr,
    height, width, out_height, out_width, in_units, out_units, tiles, blocks, left, top,
    stride_b, stride_h_units, stride_w_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M pixels of dx, all of one remainder of their places by the stride: the same taps meet them."""
    program = tl.program_id(0)
    tile = program // blocks
    image = (tile // (tiles * STRIDE * STRIDE)).to(tl.int64)
    remainder = tile // tiles % (STRIDE * STRIDE)
    below, right = remainder // STRIDE, remainder % STRIDE
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    place = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.cdiv(width, STRIDE)
    row, column = place // columns, place % columns
    c = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    h, w = row * STRIDE + below, column * STRIDE + right
    inside = (h < height) & (w < width)
    # Tap i + n STRIDE meets output row (h + top - i) / STRIDE - n.
    i, j = (below + top) % STRIDE, (right + left) % STRIDE
    dx = tap_product(
        delta_ptr + image * stride_b, weight_ptr + (i * KERNEL + j) * channels,
        row + (below + top) // STRIDE, column + (right + left) // STRIDE, inside,
        out_height, out_width, out_channels, c, channels,
        tl.cdiv(KERNEL - i, STRIDE), tl.cdiv(KERNEL - j, STRIDE),
        stride_h_units * OUT_UNIT, stride_w_units * OUT_UNIT,
        1, KERNEL * KERNEL * channels, STRIDE * KERNEL * channels, STRIDE * channels,
        ACC, PRECISION, -1, (KERNEL + STRIDE - 1) // STRIDE, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    at = (h * width + w)[:, None] * channels + c[None, :]
    mask = inside[:, None] & (c < channels)[None, :]
    dx_ptr += image * height * width * channels
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def input_gradient(
    x: Tensor, weight: Tensor, delta: Tensor, stride: int, padding: Sequence[int]
) -> Tensor:
    """The gradient of x; delta is that of conv(x, weight)."""
    few = stride * stride * x.shape[1] <= 64
    return (_few if few else _many)(x, weight, delta, stride, padding)


def _few(x: Tensor, weight: Tensor, delta: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    (dx,) = _gpu.allocate([_library.nchw(x.shape, x)])
    options = _triton.config("dense_conv", "bwd_dx_cell", x)
    options["BLOCK_N"] = max(16, triton.next_power_of_2(stride * stride * channels))
    options["BLOCK_K"] = wide_block(out_channels, options["BLOCK_K"])
    left, _, top, _ = padding
    rows = (height - 1 + top) // stride - top // stride + 1
    columns = (width - 1 + left) // stride - left // stride + 1
    tiles = triton.cdiv(rows * columns, options["BLOCK_M"])
    out_unit = _gpu.alignment(out_channels, delta.stride(2), delta.stride(3))
    taps = triton.cdiv(weight.shape[2], stride) ** 2
    _triton.launch(
        dense_conv_bwd_dx_cell_kernel,
        batch * tiles,
        delta, weight, dx,
        height, width, *delta.shape[2:], out_channels // out_unit, tiles, rows, columns, left, top,
        delta.stride(0), delta.stride(2) // out_unit, delta.stride(3) // out_unit, *weight.stride(),
        OUT_UNIT=out_unit, CHANNELS=channels, **constants(x, weight, stride), **options,
        trips=(taps * triton.cdiv(out_channels, options["BLOCK_K"]),),
        flops=2 * delta.numel() * weight[0].numel(),
    )  # fmt: skip
    return dx


def _many(x: Tensor, weight: Tensor, delta: Tensor, stride: int, padding: Sequence[int]) -> Tensor:
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    weight = weight.contiguous(memory_format=torch.channels_last)
    (dx,) = _gpu.allocate([_library.nchw(x.shape, x)])
    options = _triton.config("dense_conv", "bwd_dx", x, channels)
    options["BLOCK_N"] = wide_block(channels, options["BLOCK_N"])
    options["BLOCK_K"] = wide_block(out_channels, options["BLOCK_K"])
    blocks = triton.cdiv(channels, options["BLOCK_N"])
    places = triton.cdiv(height, stride) * triton.cdiv(width, stride)
    tiles = triton.cdiv(places, options["BLOCK_M"])
    in_unit = _gpu.alignment(channels)
    out_unit = _gpu.alignment(out_channels, delta.stride(2), delta.stride(3))
    left, _, top, _ = padding
    taps = triton.cdiv(weight.shape[2], stride) ** 2
    _triton.launch(
        dense_conv_bwd_dx_kernel,
        batch * stride * stride * tiles * blocks,
        delta, weight, dx,
        height, width, *delta.shape[2:], channels // in_unit, out_channels // out_unit, tiles, blocks, left, top,
        delta.stride(0), delta.stride(2) // out_unit, delta.stride(3) // out_unit,
        IN_UNIT=in_unit, OUT_UNIT=out_unit, **constants(x, weight, stride), **options,
        trips=(taps * triton.cdiv(out_channels, options["BLOCK_K"]),),
        flops=2 * delta.numel() * weight[0].numel(),
    )  # fmt: skip
    return dx
