"""Triton kernels of ``dense_conv``: a matrix product per tile of output pixels of one image.

Of few channels (``patch_size``) all that the kernel sees at a pixel, channel by row by column, is one block of the
product's inner dimension. Of many, each tap and block of channels is a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _arguments, _gpu
from effdet_kernels.ops._tl import affine_act, store_moments
from effdet_kernels.ops.batch_norm_act.triton_fwd import statistics_of


@triton.jit
def load_patch(
    x_ptr, row, column, inside, height, width, stride_c, stride_h, stride_w,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_M]: x under the kernel at places [BLOCK_M], in the order of a weight's (channel, i, j)."""
    k = tl.arange(0, BLOCK_K)[:, None]
    h = row[None, :] + k // KERNEL % KERNEL
    w = column[None, :] + k % KERNEL
    within = (h >= 0) & (h < height) & (w >= 0) & (w < width) & inside[None, :]
    at = k // (KERNEL * KERNEL) * stride_c + h * stride_h + w * stride_w
    return tl.load(x_ptr + at, mask=within & (k < CHANNELS * KERNEL * KERNEL), other=0.0)


@triton.jit
def load_patch_weight(
    weight_ptr, out, out_channels, stride_o, stride_c, stride_i, stride_j,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_K, BLOCK_N]: the weights of outputs ``out`` [BLOCK_N], in the order of ``load_patch``."""
    k = tl.arange(0, BLOCK_K)[:, None]
    at = k // (KERNEL * KERNEL) * stride_c + k // KERNEL % KERNEL * stride_i + k % KERNEL * stride_j
    mask = (k < CHANNELS * KERNEL * KERNEL) & (out < out_channels)[None, :]
    return tl.load(weight_ptr + at + out[None, :] * stride_o, mask=mask, other=0.0)


@triton.jit
def tap_product(
    x_ptr, weight_ptr, row, column, inside, height, width, channels, out, out_channels,
    taps_i, taps_j, stride_h, stride_w, stride_wn, stride_wk, stride_wi, stride_wj,
    ACC: tl.constexpr, PRECISION: tl.constexpr, STEP: tl.constexpr, TAPS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: the sum over taps (i, j) of x at (row + i STEP, column + j STEP) times that tap's weights.

    There are TAPS of a row or one less.
    """
    z = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    blocks = tl.cdiv(channels, BLOCK_K)
    for step in range(taps_i * taps_j * blocks):
        c = step % blocks * BLOCK_K + tl.arange(0, BLOCK_K)
        tap = step // blocks
        i = tl.where(taps_j == TAPS, tap // TAPS, tap // max(TAPS - 1, 1))
        j = tap - i * taps_j
        h, w = row + i * STEP, column + j * STEP
        within = inside & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        x = tl.load(
            x_ptr + (h * stride_h + w * stride_w)[:, None] + c[None, :],
            mask=within[:, None] & (c < channels)[None, :],
            other=0.0,
        )  # [BLOCK_M, BLOCK_K]
        weight = tl.load(
            weight_ptr
            + i * stride_wi
            + j * stride_wj
            + c[:, None] * stride_wk
            + out[None, :] * stride_wn,
            mask=(c < channels)[:, None] & (out < out_channels)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        z = tl.dot(x, weight, acc=z, input_precision=PRECISION, out_dtype=ACC)
    return z


@triton.jit
def dense_conv_fwd_patch_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, y_ptr, parts_ptr, counts_ptr,
    height, width, out_height, out_width, out_units, tiles, blocks, left, top,
    stride_b, stride_c, stride_h, stride_w, stride_wo, stride_wc, stride_wi, stride_wj,
    OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ACT: tl.constexpr,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M output pixels of an image, BLOCK_N output channels. Counts in units: ``_gpu.alignment``."""
    program = tl.program_id(0)
    image = (program // (tiles * blocks)).to(tl.int64)
    out_channels, pixels = out_units * OUT_UNIT, out_height * out_width
    pixel = (program // blocks % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    x = load_patch(
        x_ptr + image * stride_b, pixel // out_width * STRIDE - top, pixel % out_width * STRIDE - left,
        pixel < pixels, height, width, stride_c, stride_h, stride_w, CHANNELS, KERNEL, BLOCK_K,
    )  # fmt: skip
    weight = load_patch_weight(
        weight_ptr, out, out_channels, stride_wo, stride_wc, stride_wi, stride_wj, CHANNELS, KERNEL, BLOCK_K
    )  # fmt: skip
    z = tl.dot(tl.trans(x), weight, input_precision=PRECISION, out_dtype=ACC)
    y = affine_act(z, scale_ptr, shift_ptr, out, out < out_channels, ACT)
    at = pixel[:, None] * out_channels + out[None, :]
    mask = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
    tl.store(y_ptr + image * pixels * out_channels + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        store_moments(
            parts_ptr, counts_ptr, program // blocks, y, pixel < pixels,
            out, out < out_channels, out_channels, program % blocks == 0,
        )  # fmt: skip


@triton.jit
def dense_conv_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, y_ptr, parts_ptr, counts_ptr,
    height, width, out_height, out_width, in_units, out_units, tiles, blocks, left, top,
    stride_b, stride_h_units, stride_w_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same for many channels, next to each other in x and in the weight [O, k, k, C]."""
    program = tl.program_id(0)
    image = (program // (tiles * blocks)).to(tl.int64)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixels = out_height * out_width
    pixel = (program // blocks % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tap_product(
        x_ptr + image * stride_b, weight_ptr,
        pixel // out_width * STRIDE - top, pixel % out_width * STRIDE - left, pixel < pixels,
        height, width, channels, out, out_channels, KERNEL, KERNEL,
        stride_h_units * IN_UNIT, stride_w_units * IN_UNIT,
        KERNEL * KERNEL * channels, 1, KERNEL * channels, channels,
        ACC, PRECISION, 1, KERNEL, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    y = affine_act(z, scale_ptr, shift_ptr, out, out < out_channels, ACT)
    at = pixel[:, None] * out_channels + out[None, :]
    mask = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
    tl.store(y_ptr + image * pixels * out_channels + at, y.to(y_ptr.dtype.element_ty), mask=mask)
    if parts_ptr is not None:
        store_moments(
            parts_ptr, counts_ptr, program // blocks, y, pixel < pixels,
            out, out < out_channels, out_channels, program % blocks == 0,
        )  # fmt: skip


def run(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    statistics: bool = False,
) -> list[Tensor]:
    """y [B, O, H', W']; with ``statistics`` also mean and variance [O]."""
    batch, channels, _, _ = x.shape
    out_channels, kernel = weight.shape[0], weight.shape[2]
    size = _arguments.convolved_size("dense_conv", x, kernel, stride, padding)
    (y,) = _gpu.allocate([_library.nchw((batch, out_channels, *size), x)])
    x, weight, patch = placed(x, weight)
    out_unit = _gpu.alignment(out_channels)
    name = "fwd_patch" if patch else "fwd"
    options = _triton.config("dense_conv", name, x, out_channels)
    options["BLOCK_N"] = wide_block(out_channels, options["BLOCK_N"])
    tiles = triton.cdiv(size[0] * size[1], options["BLOCK_M"])
    blocks = triton.cdiv(out_channels, options["BLOCK_N"])
    vectors = _gpu.dense(scale), _gpu.dense(shift)
    parts = _gpu.parts_of_moments(batch * tiles if statistics else 0, out_channels, x)
    common = {"OUT_UNIT": out_unit, "ACT": act, **constants(x, weight, stride), **options}
    flops = 2 * y.numel() * channels * kernel * kernel
    left, _, top, _ = padding
    if patch:
        _triton.launch(
            dense_conv_fwd_patch_kernel,
            batch * tiles * blocks,
            x, weight, *vectors, y, *parts,
            *x.shape[2:], *size, out_channels // out_unit, tiles, blocks, left, top,
            *x.stride(), *weight.stride(),
            CHANNELS=channels, BLOCK_K=patch, **common, flops=flops,
        )  # fmt: skip
        return [y, *statistics_of(parts)]
    in_unit = _gpu.alignment(channels, x.stride(2), x.stride(3))
    common["BLOCK_K"] = wide_block(channels, options["BLOCK_K"])
    _triton.launch(
        dense_conv_fwd_kernel,
        batch * tiles * blocks,
        x, weight, *vectors, y, *parts,
        *x.shape[2:], *size, channels // in_unit, out_channels // out_unit, tiles, blocks, left, top,
        x.stride(0), x.stride(2) // in_unit, x.stride(3) // in_unit,
        IN_UNIT=in_unit, **common, flops=flops,
        trips=(kernel * kernel * triton.cdiv(channels, common["BLOCK_K"]),),
    )  # fmt: skip
    return [y, *statistics_of(parts)]


def constants(x: Tensor, weight: Tensor, stride: int) -> dict[str, Any]:
    """What all kernels take."""
    return {
        "ACC": _gpu.accumulator(x.dtype),
        "PRECISION": _gpu.matrix_precision(x.dtype),
        "KERNEL": weight.shape[2],
        "STRIDE": stride,
    }


def patch_size(weight: Tensor) -> int:
    """The block of the inner dimension if one holds it all, and a row that the backward adds, else 0."""
    size = max(16, triton.next_power_of_2(weight[0].numel() + 1))
    return size if size <= 64 else 0


def wide_block(count: int, most: int) -> int:
    """A power of 2 from 16 to ``most`` that holds ``count`` if it can.

    Fewer steps, and fewer readers of x, save more than what stays empty costs.
    """
    return min(most, max(16, triton.next_power_of_2(count)))


def placed(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, int]:
    """x and weight as the kernels take them, in place or copied, and ``patch_size``."""
    patch = patch_size(weight)
    if not patch:
        return _gpu.channels_inner(x), weight.contiguous(memory_format=torch.channels_last), 0
    if sum((n - 1) * step for n, step in zip(x.shape[1:], x.stride()[1:], strict=True)) >= 2**31:
        x = _gpu.channels_inner(x)
    return x, weight, patch
