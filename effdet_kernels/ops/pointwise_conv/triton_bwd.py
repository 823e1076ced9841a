"""Triton kernels of the backward of ``pointwise_conv``; the README has the formulas."""

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
from effdet_kernels.ops.pointwise_conv.triton_fwd import slices, tile_product, tiling


@triton.jit(
    do_not_specialize=[
        "pixels", "in_units", "out_units", "tiles", "blocks", "stride_xp_units", "stride_gp_units",
    ]
)  # fmt: skip
def pointwise_conv_bwd_delta_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, gate_ptr, grad_ptr, delta_ptr, of_scale_ptr, of_shift_ptr,
    pixels, in_units, out_units, tiles, blocks,
    stride_xb, stride_xp_units, stride_gb, stride_gp_units, stride_out, stride_in,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    ACT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SINGLE: tl.constexpr,
):  # fmt: skip
    """The gradient of z, and a row of each sum over pixels per tile; z is computed again, not loaded."""
    program = tl.program_id(0)
    tile = program // blocks
    image = (tile // tiles).to(tl.int64)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixel = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    out = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    if gate_ptr is not None:
        gate_ptr += image * channels
    z = tile_product(
        x_ptr + image * stride_xb, weight_ptr, gate_ptr, pixel, pixels, channels, out, out_channels,
        stride_xp_units * IN_UNIT, stride_out, stride_in, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, SINGLE,
    )  # fmt: skip
    inside = (pixel < pixels)[:, None] & (out < out_channels)[None, :]
    at = pixel[:, None] * (stride_gp_units * OUT_UNIT) + out[None, :]
    grad = tl.load(grad_ptr + image * stride_gb + at, mask=inside, other=0.0).to(ACC)
    delta, before = affine_act_gradient(grad, z, scale_ptr, shift_ptr, out, out < out_channels, ACT)
    at = pixel[:, None] * out_channels + out[None, :]
    delta_ptr += image * pixels * out_channels
    tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=inside)
    row = tile.to(tl.int64) * out_channels + out
    tl.store(of_scale_ptr + row, tl.sum(before * z, 0), mask=out < out_channels)
    tl.store(of_shift_ptr + row, tl.sum(before, 0), mask=out < out_channels)


@triton.jit(
    do_not_specialize=[
        "pixels", "in_units", "out_units", "tiles", "blocks", "stride_xp_units", "stride_dp_units",
    ]
)  # fmt: skip
def pointwise_conv_bwd_dx_kernel(
    delta_ptr, weight_ptr, gate_ptr, x_ptr, dx_ptr, of_gate_ptr,
    pixels, in_units, out_units, tiles, blocks,
    stride_xb, stride_xp_units, stride_db, stride_dp_units, stride_out, stride_in,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """dx = gate * h, h = weight^T delta, and a row of the sum of x * h per tile."""
    program = tl.program_id(0)
    tile = program // blocks
    image = (tile // tiles).to(tl.int64)
    channels, out_channels = in_units * IN_UNIT, out_units * OUT_UNIT
    pixel = (tile % tiles) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = (program % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    h = tile_product(
        delta_ptr + image * stride_db, weight_ptr, None, pixel, pixels, out_channels, c, channels,
        stride_dp_units * OUT_UNIT, stride_in, stride_out, ACC, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, SINGLE,
    )  # fmt: skip
    inside = (pixel < pixels)[:, None] & (c < channels)[None, :]
    if of_gate_ptr is not None:
        at = pixel[:, None] * (stride_xp_units * IN_UNIT) + c[None, :]
        x = tl.load(x_ptr + image * stride_xb + at, mask=inside, other=0.0).to(ACC)
        row = tile.to(tl.int64) * channels + c
        tl.store(of_gate_ptr + row, tl.sum(x * h, 0), mask=c < channels)
    if gate_ptr is not None:
        gate = tl.load(gate_ptr + image * channels + c, mask=c < channels, other=0.0)
        h = h * gate.to(ACC)[None, :]
    at = pixel[:, None] * channels + c[None, :]
    dx_ptr += image * pixels * channels
    tl.store(dx_ptr + at, h.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit(
    do_not_specialize=[
        "batch", "pixels", "row_units", "column_units", "segment", "row_blocks", "column_blocks",
        "stride_ap_units", "stride_bp_units",
    ]
)  # fmt: skip
def product_kernel(
    a_ptr, b_ptr, gate_ptr, out_ptr,
    batch, pixels, row_units, column_units, segment, row_blocks, column_blocks,
    stride_ab, stride_ap_units, stride_bb, stride_bp_units,
    ROW_UNIT: tl.constexpr, COLUMN_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over a segment of all pixels, whole tiles of an image each, of a[., m] * gate * b[., n]."""
    program = tl.program_id(0)
    rows, columns = row_units * ROW_UNIT, column_units * COLUMN_UNIT
    m = (program // column_blocks % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = (program % column_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = program // (column_blocks * row_blocks)
    tiles = tl.cdiv(pixels, BLOCK_K)
    z = tl.zeros((BLOCK_M, BLOCK_N), ACC)
    for tile in range(part * segment, tl.minimum((part + 1) * segment, batch * tiles)):
        image = (tile // tiles).to(tl.int64)
        pixel = (tile % tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
        a_at = pixel[None, :] * (stride_ap_units * ROW_UNIT) + m[:, None]
        mask = (pixel < pixels)[None, :] & (m < rows)[:, None]
        a = tl.load(a_ptr + image * stride_ab + a_at, mask=mask, other=0.0)  # [BLOCK_M, BLOCK_K]
        b_at = pixel[:, None] * (stride_bp_units * COLUMN_UNIT) + n[None, :]
        mask = (pixel < pixels)[:, None] & (n < columns)[None, :]
        b = tl.load(b_ptr + image * stride_bb + b_at, mask=mask, other=0.0)  # [BLOCK_K, BLOCK_N]
        if gate_ptr is not None:
            gate = tl.load(gate_ptr + image * columns + n, mask=n < columns, other=0.0)
            b = (b.to(ACC) * gate.to(ACC)[None, :]).to(b.dtype)
        z = tl.dot(a, b, acc=z, input_precision=PRECISION, out_dtype=ACC)
    at = (part.to(tl.int64) * rows + m[:, None]) * columns + n[None, :]
    tl.store(out_ptr + at, z, mask=(m < rows)[:, None] & (n < columns)[None, :])


def product(a: Tensor, b: Tensor, gate: Tensor | None = None) -> Tensor:
    """[rows, columns]: the sums over images and pixels of a[., r] * b[., c] * gate[image, c].

    a [B, rows, H, W] and b [B, columns, H, W] of one dtype; the sum in the accumulation dtype.
    """
    a, b = _gpu.pixels_inner(a), _gpu.pixels_inner(b)
    batch, rows, height, width = a.shape
    columns, pixels = b.shape[1], height * width
    wide = accumulation_dtype(a.dtype)
    if batch == 0:
        return torch.zeros(rows, columns, dtype=wide, device=a.device)
    options = _triton.config("pointwise_conv", "product", a)
    options["BLOCK_M"] = _gpu.block(rows, options["BLOCK_M"])
    options["BLOCK_N"] = _gpu.block(columns, options["BLOCK_N"])
    row_blocks = triton.cdiv(rows, options["BLOCK_M"])
    column_blocks = triton.cdiv(columns, options["BLOCK_N"])
    tiles = batch * triton.cdiv(pixels, options["BLOCK_K"])
    # Enough parts to fill a large GPU, of at least 8 tiles.
    parts = max(1, min(tiles // 8, 528 // (row_blocks * column_blocks)))
    segment = triton.cdiv(tiles, parts)
    parts = triton.cdiv(tiles, segment)
    out = torch.empty(parts, rows, columns, dtype=wide, device=a.device)
    row_unit = _gpu.alignment(rows, _gpu.pixel_stride(a))
    column_unit = _gpu.alignment(columns, _gpu.pixel_stride(b))
    _triton.launch(
        product_kernel,
        parts * row_blocks * column_blocks,
        a, b, _gpu.dense(gate), out,
        batch, pixels, rows // row_unit, columns // column_unit, segment, row_blocks, column_blocks,
        a.stride(0), _gpu.pixel_stride(a) // row_unit, b.stride(0), _gpu.pixel_stride(b) // column_unit,
        ROW_UNIT=row_unit, COLUMN_UNIT=column_unit, ACC=_gpu.accumulator(a.dtype),
        PRECISION=_gpu.matrix_precision(a.dtype), **options,
        trips=(segment,), flops=2 * a.numel() * columns,
    )  # fmt: skip
    return _gpu.total(out)


def output_gradient(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = act(z * scale + shift), z = weight (gate * x): the gradients of z, scale and shift."""
    x, grad = _gpu.pixels_inner(x), _gpu.pixels_inner(grad)
    batch, channels = x.shape[:2]
    out_channels = weight.shape[0]
    (delta,) = _gpu.allocate([_library.nchw(grad.shape, x)])
    options, tiles, blocks = tiling("bwd_delta", x, out_channels, channels)
    sums = torch.empty(
        2, batch * tiles, out_channels, dtype=accumulation_dtype(x.dtype), device=x.device
    )
    in_unit = _gpu.alignment(channels, _gpu.pixel_stride(x))
    out_unit = _gpu.alignment(out_channels, _gpu.pixel_stride(grad))
    _triton.launch(
        pointwise_conv_bwd_delta_kernel,
        batch * tiles * blocks,
        x, weight, _gpu.dense(scale), _gpu.dense(shift), _gpu.dense(gate), grad, delta, sums[0], sums[1],
        x.shape[2] * x.shape[3], channels // in_unit, out_channels // out_unit, tiles, blocks,
        x.stride(0), _gpu.pixel_stride(x) // in_unit,
        grad.stride(0), _gpu.pixel_stride(grad) // out_unit,
        weight.stride(0), weight.stride(1),
        IN_UNIT=in_unit, OUT_UNIT=out_unit, ACC=_gpu.accumulator(x.dtype),
        PRECISION=_gpu.matrix_precision(x.dtype), ACT=act, **options,
        trips=slices(channels, options), flops=2 * x.numel() * out_channels,
    )  # fmt: skip
    return delta, sums[0].sum(0), sums[1].sum(0)


def input_gradient(
    delta: Tensor, weight: Tensor, gate: Tensor | None, x: Tensor, of_gate: bool
) -> tuple[Tensor, Tensor | None]:
    """The gradients of x and, if asked for, of gate, given that of z = weight (gate * x)."""
    delta, x = _gpu.pixels_inner(delta), _gpu.pixels_inner(x)
    batch, channels = x.shape[:2]
    out_channels = weight.shape[0]
    (dx,) = _gpu.allocate([_library.nchw(x.shape, x)])
    options, tiles, blocks = tiling("bwd_dx", delta, channels, out_channels)
    sums = None
    if of_gate:
        wide = accumulation_dtype(x.dtype)
        sums = torch.empty(batch, tiles, channels, dtype=wide, device=x.device)
    in_unit = _gpu.alignment(channels, _gpu.pixel_stride(x))
    out_unit = _gpu.alignment(out_channels, _gpu.pixel_stride(delta))
    _triton.launch(
        pointwise_conv_bwd_dx_kernel,
        batch * tiles * blocks,
        delta, weight, _gpu.dense(gate), x, dx, sums,
        x.shape[2] * x.shape[3], channels // in_unit, out_channels // out_unit, tiles, blocks,
        x.stride(0), _gpu.pixel_stride(x) // in_unit,
        delta.stride(0), _gpu.pixel_stride(delta) // out_unit,
        weight.stride(0), weight.stride(1),
        IN_UNIT=in_unit, OUT_UNIT=out_unit, ACC=_gpu.accumulator(x.dtype),
        PRECISION=_gpu.matrix_precision(x.dtype), **options,
        trips=slices(out_channels, options), flops=2 * x.numel() * out_channels,
    )  # fmt: skip
    return dx, None if sums is None else sums.sum(1)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of x, weight, scale, shift, gate and residual."""
    x, weight, scale, shift, gate, residual, act, _, needs = rest
    grad = grads[0]
    of_x, of_weight, of_scale, of_shift, of_gate, of_residual = wanted(
        (x, weight, scale, shift, gate, residual), needs
    )
    d_scale = d_shift = dx = d_gate = d_weight = None
    delta, back = grad, weight
    if act != "none":
        delta, d_scale, d_shift = output_gradient(grad, x, weight, scale, shift, gate, act)
    elif scale is not None:
        back = (weight * scale[:, None, None, None]).to(weight.dtype)
    if of_x or of_gate:
        dx, d_gate = input_gradient(delta, back, gate, x, of_gate)
    if of_weight or (of_scale and d_scale is None):
        d_weight = product(delta, x, gate)[:, :, None, None]
    if act == "none":  # z need not be computed again
        if of_scale:
            d_scale = (d_weight * weight).sum((1, 2, 3))
        if of_shift:
            d_shift = grad.sum((0, 2, 3), dtype=accumulation_dtype(grad.dtype))
        if of_weight and scale is not None:
            d_weight = d_weight * scale[:, None, None, None]
    found = dx, d_weight, d_scale, d_shift, d_gate, grad
    return chosen(found, (of_x, of_weight, of_scale, of_shift, of_gate, of_residual))
