"""Triton kernel of ``pointwise_conv``: a matrix product per tile of pixels of one image."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import affine_act, store_moments
from effdet_kernels.ops.batch_norm_act.triton_fwd import statistics_of


@triton.jit
def tile_product(
    x_ptr, weight_ptr, gate_ptr, pixel, pixels, channels, out, out_channels,
    stride_pixel, stride_out, stride_in,
    ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_M, BLOCK_N]: weight (gate * x) of the pixels [BLOCK_M] of the image at x_ptr.

    SINGLE: all channels are one slice of BLOCK_K, without a loop.
    """
    z = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    x_rows = x_ptr + pixel[:, None] * stride_pixel
    for first in range(0, BLOCK_K if SINGLE else channels, BLOCK_K):
        c = first + tl.arange(0, BLOCK_K)
        inside = c < channels
        x = tl.load(
            x_rows + c[None, :], mask=(pixel < pixels)[:, None] & inside[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + c, mask=inside, other=0.0)
            x = (x.to(ACC) * gate.to(ACC)[None, :]).to(x.dtype)
        weight = tl.load(
            weight_ptr + c[:, None] * stride_in + out[None, :] * stride_out,
            mask=inside[:, None] & (out < out_channels)[None, :],
            other=0.0,
        )  # [BLOCK_K, BLOCK_N]
        z = tl.dot(x, weight, acc=z, input_precision=PRECISION, out_dtype=ACC)
    return z


@triton.jit(
    do_not_specialize=[
        "pixels", "in_units", "out_units", "tiles", "blocks", "stride_xp_units", "stride_rp_units",
    ]
)  # fmt: skip
def pointwise_conv_fwd_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, gate_ptr, residual_ptr, y_ptr, parts_ptr, counts_ptr,
    pixels, in_units, out_units, tiles, blocks,
    stride_xb, stride_xp_units, stride_rb, stride_rp_units, stride_out, stride_in,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_M pixels of an image, BLOCK_N output channels. Counts in units: ``_gpu.alignment``."""
    program = tl.program_id(0)
    image = (program // (tiles * blocks)).to(tl.int64)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixel = (program // blocks % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if gate_ptr is not None:
        gate_ptr += image * channels
    z = tile_product(
        x_ptr + image * stride_xb, weight_ptr, gate_ptr, pixel, pixels, channels, out, out_channels,
        stride_xp_units * IN_UNIT, stride_out, stride_in, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, SINGLE,
    )  # fmt: skip
    y = affine_act(z, scale_ptr, shift_ptr, out, out < out_channels, ACT)
    inside = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
    if residual_ptr is not None:
        at = pixel[:, None] * (stride_rp_units * OUT_UNIT) + out[None, :]
        y += tl.load(residual_ptr + image * stride_rb + at, mask=inside, other=0.0).to(ACC)
    at = pixel[:, None] * out_channels + out[None, :]
    y_ptr += image * pixels * out_channels
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
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
    gate: Tensor | None,
    residual: Tensor | None,
    act: str,
    statistics: bool = False,
) -> list[Tensor]:
    """y [B, O, H, W]; with ``statistics`` also mean and variance [O]."""
    x = _gpu.pixels_inner(x)
    residual = None if residual is None else _gpu.pixels_inner(residual)
    batch, channels, height, width = x.shape
    out_channels = weight.shape[0]
    (y,) = _gpu.allocate([_library.nchw((batch, out_channels, height, width), x)])
    residual_stride = 0 if residual is None else _gpu.pixel_stride(residual)
    in_unit = _gpu.alignment(channels, _gpu.pixel_stride(x))
    out_unit = _gpu.alignment(out_channels, residual_stride)
    options, tiles, blocks = tiling("fwd", x, out_channels, channels)
    parts = _gpu.parts_of_moments(batch * tiles if statistics else 0, out_channels, x)
    _triton.launch(
        pointwise_conv_fwd_kernel,
        batch * tiles * blocks,
        x, weight, _gpu.dense(scale), _gpu.dense(shift), _gpu.dense(gate), residual, y, *parts,
        height * width, channels // in_unit, out_channels // out_unit, tiles, blocks,
        x.stride(0), _gpu.pixel_stride(x) // in_unit,
        0 if residual is None else residual.stride(0),
        residual_stride // out_unit,
        weight.stride(0), weight.stride(1),
        IN_UNIT=in_unit, OUT_UNIT=out_unit, ACC=_gpu.accumulator(x.dtype),
        PRECISION=_gpu.matrix_precision(x.dtype), ACT=act, **options,
        trips=slices(channels, options), flops=2 * x.numel() * out_channels,
    )  # fmt: skip
    return [y, *statistics_of(parts)]


def slices(channels: int, options: dict[str, Any]) -> tuple[int, ...]:
    """How often the loop over a product's inner dimension runs, if there is one."""
    return () if options["SINGLE"] else (triton.cdiv(channels, options["BLOCK_K"]),)


def tiling(
    kernel: str, x: Tensor, out_channels: int, channels: int
) -> tuple[dict[str, Any], int, int]:
    """Options of a product of a map's pixels with a weight, tiles of an image, blocks of the output channels."""
    pixels = x.shape[2] * x.shape[3]

    def tiled(kernel: str) -> tuple[dict[str, Any], int, int]:
        options = _triton.config("pointwise_conv", kernel, x, out_channels)
        options["BLOCK_N"] = _gpu.block(out_channels, options["BLOCK_N"])
        # What a slice loads beyond the last channel is masked; another slice would wait for memory once more.
        options["BLOCK_K"] = min(options["BLOCK_K"], max(16, triton.next_power_of_2(channels)))
        options["SINGLE"] = channels <= options["BLOCK_K"]
        return (
            options,
            triton.cdiv(pixels, options["BLOCK_M"]),
            triton.cdiv(out_channels, options["BLOCK_N"]),
        )

    found = tiled(kernel)
    if kernel == "fwd" and x.shape[0] * found[1] * found[2] < _gpu.MULTIPROCESSORS:
        return tiled("fwd_few")  # smaller tiles: each is done sooner
    return found
