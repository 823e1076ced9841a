"""Triton kernels of the backward of ``dense_conv``; the README has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._gradients import chosen, wanted
from effdet_kernels.ops._tl import affine_act_gradient
from effdet_kernels.ops.dense_conv.triton_dx import input_gradient
from effdet_kernels.ops.dense_conv.triton_fwd import (
    constants,
    load_patch,
    load_patch_weight,
    patch_size,
    placed,
    tap_product,
    wide_block,
)


@triton.jit
def dense_conv_bwd_patch_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, grad_ptr, delta_ptr, sums_ptr,
    batch, height, width, out_height, out_width, out_units, segment, blocks, left, top,
    stride_b, stride_c, stride_h, stride_w, stride_wo, stride_wc, stride_wi, stride_wj,
    stride_gb, stride_gp_units,
    OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, ACT: tl.constexpr,
    CHANNELS: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of BLOCK_N output channels and a segment of tiles: the sums over pixels, and the gradient of z.

    A row of ones below the patch makes the gradient of shift one more row of the weights' product; that of scale is the
    weights' product with the weights.
    """
    program = tl.program_id(0)
    part = program // blocks
    out_channels, pixels = out_units * OUT_UNIT, out_height * out_width
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(pixels, BLOCK_M)
    size: tl.constexpr = CHANNELS * KERNEL * KERNEL
    k = tl.arange(0, BLOCK_K)[:, None]
    weight = load_patch_weight(
        weight_ptr, out, out_channels, stride_wo, stride_wc, stride_wi, stride_wj, CHANNELS, KERNEL, BLOCK_K
    )  # fmt: skip
    sums = tl.zeros((BLOCK_K, BLOCK_N), ACC)
    for tile in range(part * segment, tl.minimum((part + 1) * segment, batch * tiles)):
        image = (tile // tiles).to(tl.int64)
        pixel = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
        x = load_patch(
            x_ptr + image * stride_b, pixel // out_width * STRIDE - top, pixel % out_width * STRIDE - left,
            pixel < pixels, height, width, stride_c, stride_h, stride_w, CHANNELS, KERNEL, BLOCK_K,
        )  # fmt: skip
        z = tl.dot(tl.trans(x), weight, input_precision=PRECISION, out_dtype=ACC)
        mask = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
        at = pixel[:, None] * (stride_gp_units * OUT_UNIT) + out[None, :]
        grad = tl.load(grad_ptr + image * stride_gb + at, mask=mask, other=0.0).to(ACC)
        delta, before = affine_act_gradient(
            grad, z, scale_ptr, shift_ptr, out, out < out_channels, ACT
        )
        if delta_ptr is not None:
            at = image * pixels * out_channels + pixel[:, None] * out_channels + out[None, :]
            tl.store(delta_ptr + at, delta.to(x.dtype), mask=mask)
        x = tl.where(k == size, 1.0, x.to(ACC)).to(x.dtype)
        sums = tl.dot(x, before.to(x.dtype), acc=sums, input_precision=PRECISION, out_dtype=ACC)
    inside = out < out_channels
    sums_ptr += part.to(tl.int64) * (size + 2) * out_channels + out
    tl.store(sums_ptr + size * out_channels, tl.sum(tl.where(k == size, sums, 0.0), 0), mask=inside)
    of_scale = tl.sum(tl.where(k < size, sums * weight.to(ACC), 0.0), 0)
    tl.store(sums_ptr + (size + 1) * out_channels, of_scale, mask=inside)
    if scale_ptr is not None:
        sums *= tl.load(scale_ptr + out, mask=inside, other=0.0)[None, :]
    tl.store(sums_ptr[None, :] + k * out_channels, sums, mask=(k < size) & inside[None, :])


@triton.jit
def dense_conv_bwd_delta_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, grad_ptr, delta_ptr, of_scale_ptr, of_shift_ptr,
    height, width, out_height, out_width, in_units, out_units, tiles, blocks, left, top,
    stride_b, stride_h_units, stride_w_units, stride_gb, stride_gp_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The gradient of z, and a row of each sum over pixels per tile; z is computed again, not loaded."""
    program = tl.program_id(0)
    tile = program // blocks
    image = (tile // tiles).to(tl.int64)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixels = out_height * out_width
    pixel = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    z = tap_product(
        x_ptr + image * stride_b, weight_ptr,
        pixel // out_width * STRIDE - top, pixel % out_width * STRIDE - left, pixel < pixels,
        height, width, channels, out, out_channels, KERNEL, KERNEL,
        stride_h_units * IN_UNIT, stride_w_units * IN_UNIT,
        KERNEL * KERNEL * channels, 1, KERNEL * channels, channels,
        ACC, PRECISION, 1, KERNEL, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    mask = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
    at = pixel[:, None] * (stride_gp_units * OUT_UNIT) + out[None, :]
    grad = tl.load(grad_ptr + image * stride_gb + at, mask=mask, other=0.0).to(ACC)
    delta, before = affine_act_gradient(grad, z, scale_ptr, shift_ptr, out, out < out_channels, ACT)
    at = pixel[:, None] * out_channels + out[None, :]
    delta_ptr += image * pixels * out_channels
    tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=mask)
    row = tile.to(tl.int64) * out_channels + out
    tl.store(of_scale_ptr + row, tl.sum(before * z, 0), mask=out < out_channels)
    tl.store(of_shift_ptr + row, tl.sum(before, 0), mask=out < out_channels)


@triton.jit
def dense_conv_bwd_weight_kernel(
    x_ptr, delta_ptr, of_weight_ptr,
    batch, height, width, out_height, out_width, in_units, out_units, segment, out_blocks, in_blocks, left, top,
    stride_b, stride_h_units, stride_w_units, stride_db, stride_dp_units,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of one tap and a block of its weights, the sum over a segment of tiles of BLOCK_K output pixels."""
    program = tl.program_id(0)
    tap = program // (in_blocks * out_blocks) % (KERNEL * KERNEL)
    part = program // (in_blocks * out_blocks * KERNEL * KERNEL)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixels = out_height * out_width
    out = (program // in_blocks % out_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (program % in_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    tiles = tl.cdiv(pixels, BLOCK_K)
    of_weight = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(part * segment, tl.minimum((part + 1) * segment, batch * tiles)):
        image = (tile // tiles).to(tl.int64)
        pixel = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        at = pixel[None, :] * (stride_dp_units * OUT_UNIT) + out[:, None]
        mask = (pixel < pixels)[None, :] & (out < out_channels)[:, None]
        # [BLOCK_M, BLOCK_K]
        delta = tl.load(delta_ptr + image * stride_db + at, mask=mask, other=0.0)
        h = pixel // out_width * STRIDE - top + tap // KERNEL
        w = pixel % out_width * STRIDE - left + tap % KERNEL
        within = (pixel < pixels) & (h >= 0) & (h < height) & (w >= 0) & (w < width)
        at = (h * (stride_h_units * IN_UNIT) + w * (stride_w_units * IN_UNIT))[:, None] + c[None, :]
        mask = within[:, None] & (c < channels)[None, :]
        x = tl.load(x_ptr + image * stride_b + at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        of_weight = tl.dot(delta, x, acc=of_weight, input_precision=PRECISION, out_dtype=ACC)
    at = (part.to(tl.int64) * out_channels + out[:, None]) * (KERNEL * KERNEL) + tap
    mask = (out < out_channels)[:, None] & (c < channels)[None, :]
    tl.store(of_weight_ptr + at * channels + c[None, :], of_weight, mask=mask)


def _parts(tiles: int, blocks: int) -> tuple[int, int]:
    """Tiles of a part of a sum over pixels, and parts: enough to fill a large GPU."""
    segment = triton.cdiv(tiles, max(1, min(tiles // 2, 528 // blocks)))
    return segment, triton.cdiv(tiles, segment)


def _patch_gradients(x, weight, scale, shift, grad, stride, padding, act, of_delta):
    """The gradients of z (if asked for), weight, scale and shift."""
    batch, channels, height, width = x.shape
    out_channels, patch = len(weight), patch_size(weight)
    # Without an activation z is not made again: more pixels fit.
    row = "bwd_patch_plain" if act == "none" else "bwd_patch"
    options = _triton.config("dense_conv", row, x, out_channels)
    options["BLOCK_N"] = wide_block(out_channels, options["BLOCK_N"])
    blocks = triton.cdiv(out_channels, options["BLOCK_N"])
    tiles = batch * triton.cdiv(grad.shape[2] * grad.shape[3], options["BLOCK_M"])
    segment, parts = _parts(max(1, tiles), blocks)
    delta = _gpu.allocate([_library.nchw(grad.shape, x)])[0] if of_delta else None
    size = weight[0].numel()
    wide = accumulation_dtype(x.dtype)
    sums = torch.empty(parts, size + 2, out_channels, dtype=wide, device=x.device)
    out_unit = _gpu.alignment(out_channels, _gpu.pixel_stride(grad))
    left, _, top, _ = padding
    _triton.launch(
        dense_conv_bwd_patch_kernel,
        parts * blocks,
        x, weight, _gpu.dense(scale), _gpu.dense(shift), grad, delta, sums,
        batch, height, width, *grad.shape[2:], out_channels // out_unit, segment, blocks, left, top,
        *x.stride(), *weight.stride(), grad.stride(0), _gpu.pixel_stride(grad) // out_unit,
        OUT_UNIT=out_unit, ACT=act, CHANNELS=channels, BLOCK_K=patch,
        **constants(x, weight, stride), **options,
        trips=(segment,), flops=4 * grad.numel() * size,
    )  # fmt: skip
    found = _gpu.total(sums)
    return delta, found[:size].t().reshape(weight.shape), found[size + 1], found[size]


def _output_gradient(x, weight, scale, shift, grad, stride, padding, act):
    """The gradients of z, scale and shift."""
    batch, channels, height, width = x.shape
    out_channels = len(weight)
    (delta,) = _gpu.allocate([_library.nchw(grad.shape, x)])
    options = _triton.config("dense_conv", "bwd_delta", x, out_channels)
    options["BLOCK_N"] = wide_block(out_channels, options["BLOCK_N"])
    options["BLOCK_K"] = wide_block(channels, options["BLOCK_K"])
    blocks = triton.cdiv(out_channels, options["BLOCK_N"])
    tiles = triton.cdiv(grad.shape[2] * grad.shape[3], options["BLOCK_M"])
    wide = accumulation_dtype(x.dtype)
    sums = torch.empty(2, batch * tiles, out_channels, dtype=wide, device=x.device)
    in_unit = _gpu.alignment(channels, x.stride(2), x.stride(3))
    out_unit = _gpu.alignment(out_channels, _gpu.pixel_stride(grad))
    left, _, top, _ = padding
    _triton.launch(
        dense_conv_bwd_delta_kernel,
        batch * tiles * blocks,
        x, weight, _gpu.dense(scale), _gpu.dense(shift), grad, delta, sums[0], sums[1],
        height, width, *grad.shape[2:], channels // in_unit, out_channels // out_unit, tiles, blocks, left, top,
        x.stride(0), x.stride(2) // in_unit, x.stride(3) // in_unit,
        grad.stride(0), _gpu.pixel_stride(grad) // out_unit,
        IN_UNIT=in_unit, OUT_UNIT=out_unit, ACT=act, **constants(x, weight, stride), **options,
        trips=(weight.shape[2] ** 2 * triton.cdiv(channels, options["BLOCK_K"]),),
        flops=2 * grad.numel() * weight[0].numel(),
    )  # fmt: skip
    return delta, sums[0].sum(0), sums[1].sum(0)


def _weight_gradient(x, weight, delta, stride, padding):
    batch, channels, height, width = x.shape
    out_channels, _, kernel, _ = weight.shape
    options = _triton.config("dense_conv", "bwd_weight", x)
    options["BLOCK_M"] = wide_block(out_channels, options["BLOCK_M"])
    options["BLOCK_N"] = wide_block(channels, options["BLOCK_N"])
    out_blocks = triton.cdiv(out_channels, options["BLOCK_M"])
    in_blocks = triton.cdiv(channels, options["BLOCK_N"])
    blocks = kernel * kernel * out_blocks * in_blocks
    tiles = batch * triton.cdiv(delta.shape[2] * delta.shape[3], options["BLOCK_K"])
    segment, parts = _parts(max(1, tiles), blocks)
    wide = accumulation_dtype(x.dtype)
    products = x.new_empty(parts, out_channels, kernel, kernel, channels, dtype=wide)
    in_unit = _gpu.alignment(channels, x.stride(2), x.stride(3))
    out_unit = _gpu.alignment(out_channels, _gpu.pixel_stride(delta))
    left, _, top, _ = padding
    _triton.launch(
        dense_conv_bwd_weight_kernel,
        parts * blocks,
        x, delta, products,
        batch, height, width, *delta.shape[2:], channels // in_unit, out_channels // out_unit,
        segment, out_blocks, in_blocks, left, top,
        x.stride(0), x.stride(2) // in_unit, x.stride(3) // in_unit,
        delta.stride(0), _gpu.pixel_stride(delta) // out_unit,
        IN_UNIT=in_unit, OUT_UNIT=out_unit, **constants(x, weight, stride), **options,
        trips=(segment,), flops=2 * delta.numel() * weight[0].numel(),
    )  # fmt: skip
    return _gpu.total(products).permute(0, 3, 1, 2)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of x, weight, scale and shift."""
    x, weight, scale, shift, stride, padding, act, _, needs = rest
    of_x, of_weight, of_scale, of_shift = wanted((x, weight, scale, shift), needs)
    x, weight, patch = placed(x, weight)
    delta = grad = _gpu.pixels_inner(grads[0])
    d_weight = d_scale = d_shift = None
    plain = scale is None and act == "none"
    if patch and (of_weight or of_shift or not plain):
        found = _patch_gradients(
            x, weight, scale, shift, grad, stride, padding, act, of_x and not plain
        )
        of_z, d_weight, d_scale, d_shift = found
        delta = grad if of_z is None else of_z
    elif not patch:
        if of_shift or not plain:
            found = _output_gradient(x, weight, scale, shift, grad, stride, padding, act)
            delta, d_scale, d_shift = found
        if of_weight:
            d_weight = _weight_gradient(x, weight, delta, stride, padding)
    dx = input_gradient(x, weight, delta, stride, padding) if of_x else None
    return chosen((dx, d_weight, d_scale, d_shift), (of_x, of_weight, of_scale, of_shift))
