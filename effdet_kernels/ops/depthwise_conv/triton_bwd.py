"""Triton kernels of the backward of ``depthwise_conv``; the README has the formulas."""

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
from effdet_kernels.ops._tl import activate, affine_act_gradient, slope
from effdet_kernels.ops.depthwise_conv.triton_fwd import load_rows, taps, walk, with_rows, zeros


@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "channel_units", "left", "top",
        "stride_xh_units", "stride_xw_units", "stride_gh_units", "stride_gw_units", "segments", "tiles", "blocks",
        "ROWS",
    ]
)  # fmt: skip
def depthwise_conv_bwd_delta_kernel(
    x_ptr, weight_ptr, scale_ptr, shift_ptr, grad_ptr, grad_sums_ptr, delta_ptr, of_scale_ptr, of_shift_ptr,
    height, width, out_height, out_width, channel_units, left, top,
    stride_xb, stride_xh_units, stride_xw_units, stride_gb, stride_gh_units, stride_gw_units,
    segments, tiles, blocks,
    UNIT: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    ACT: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """The gradient of the raw result, which the forward's walk makes again, and a row of each sum over pixels."""
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
    of_scale = tl.zeros((BLOCK_W, BLOCK_C), ACC)
    of_shift = tl.zeros((BLOCK_W, BLOCK_C), ACC)
    source = column * STRIDE - left
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    x_ptr += image * stride_xb + (source * stride_xw)[:, None] + c[None, :]
    grad_ptr += image * stride_gb
    delta_ptr += image * out_height * out_width * channels
    for step in tl.range(0, ROWS + LIVE - 1, num_stages=STAGES):
        rows = load_rows(
            x_ptr, (first + step) * STRIDE - top, height, stride_xh, stride_xw, width, source, inside,
            K, STRIDE,
        )  # fmt: skip
        sums = with_rows(sums, weights, rows, K, STRIDE, ACC)
        row = first + step - (LIVE - 1) + tl.zeros_like(column)
        done = owned & ((row >= first) & (row < out_height))[:, None]
        at = (row * (stride_gh_units * UNIT) + column * (stride_gw_units * UNIT))[:, None] + c[
            None, :
        ]
        grad = tl.load(grad_ptr + at, mask=done, other=0.0).to(ACC)  # [BLOCK_W, BLOCK_C]
        if grad_sums_ptr is not None:
            of_sums = tl.load(grad_sums_ptr + image * channels + c, mask=inside, other=0.0)
            grad = tl.where(done, grad + of_sums[None, :], 0.0)
        z = tl.where(done, sums[LIVE - 1], 0.0)
        delta, before = affine_act_gradient(grad, z, scale_ptr, shift_ptr, c, inside, ACT)
        of_scale += before * z
        of_shift += before
        at = (row * out_width + column)[:, None] * channels + c[None, :]
        tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=done)
        sums = zeros(1, BLOCK_W, BLOCK_C, ACC) + sums[: LIVE - 1]
    at = part.to(tl.int64) * channels + c
    tl.store(of_scale_ptr + at, tl.sum(of_scale, 0), mask=inside)
    tl.store(of_shift_ptr + at, tl.sum(of_shift, 0), mask=inside)


@triton.jit
def _input_rows(
    x_ptr, row, height, width, left, u, c, inside, stride_h, stride_w,
    FIRST: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tiles of the rows row + FIRST to row + LAST - 1 of x; of each, the columns u * STRIDE - left + p for each p."""
    found = ()
    for i in tl.static_range(FIRST, LAST):
        for p in tl.static_range(STRIDE):
            r, w = row + i + tl.zeros_like(u), u * STRIDE + (p - left)
            mask = ((r >= 0) & (r < height) & (w >= 0) & (w < width))[:, None] & inside[None, :]
            at = (r * stride_h + w * stride_w)[:, None] + c[None, :]
            found = found + (tl.load(x_ptr + at, mask=mask, other=0.0).to(ACC),)
    return found


@triton.jit(
    do_not_specialize=[
        "height", "width", "out_height", "out_width", "channel_units", "left", "top",
        "images", "groups", "stride_dh_units", "stride_dw_units", "stride_xh_units", "stride_xw_units", "segments",
        "tiles", "blocks", "ROWS",
    ]
)  # fmt: skip
def depthwise_conv_bwd_kernel(
    delta_ptr, x_ptr, weight_ptr, dx_ptr, dweight_ptr,
    images, height, width, out_height, out_width, channel_units, left, top,
    stride_db, stride_dh_units, stride_dw_units, stride_xb, stride_xh_units, stride_xw_units,
    groups, segments, tiles, blocks,
    UNIT: tl.constexpr, ACC: tl.constexpr, K: tl.constexpr, STRIDE: tl.constexpr,
    PRE_ACT: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Walks down ROWS rows of delta, of every image of its group: dx of the input rows above them, a part of dW.

    Row R of delta meets the input rows R * STRIDE - top + i, i < K. ``dx`` and ``x`` hold what is not complete of them,
    row by row and, as STRIDE columns of x belong to one of delta, by the remainder p of the column.
    """
    LIVE: tl.constexpr = K if K > STRIDE else STRIDE
    BEFORE: tl.constexpr = (
        K + STRIDE - 1
    ) // STRIDE - 1  # rows above the segment that reach into its input rows
    program = tl.program_id(0)
    part = program // blocks
    group = part // (tiles * segments)
    first = (part // tiles % segments) * ROWS
    channels = channel_units * UNIT
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    u = (part % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)
    inside = c < channels
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    if dx_ptr is not None:
        weights = taps(weight_ptr, c, inside, K, ACC)
    if dweight_ptr is not None:
        dweight = zeros(K * K, BLOCK_W, BLOCK_C, ACC)
    for index in range(group, images, groups):
        image = tl.zeros((), tl.int64) + index
        dx = zeros(LIVE * STRIDE, BLOCK_W, BLOCK_C, ACC)
        start = (first - BEFORE) * STRIDE - top
        x = _input_rows(
            x_ptr + image * stride_xb, start, height, width, left, u, c, inside, stride_xh, stride_xw,
            0, LIVE, STRIDE, ACC,
        )  # fmt: skip
        for step in range(0, ROWS + BEFORE):
            row = first - BEFORE + step + tl.zeros_like(u)
            exists = (row >= 0) & (row < out_height)
            for p in tl.static_range(STRIDE):
                for j in tl.static_range(K):
                    if (j - p) % STRIDE == 0:
                        column = u - (j - p) // STRIDE
                        mask = (exists & (column >= 0) & (column < out_width))[:, None] & inside[
                            None, :
                        ]
                        at = row * (stride_dh_units * UNIT) + column * (stride_dw_units * UNIT)
                        delta = tl.load(
                            delta_ptr + image * stride_db + at[:, None] + c[None, :],
                            mask=mask,
                            other=0.0,
                        ).to(ACC)  # [BLOCK_W, BLOCK_C]
                        if dx_ptr is not None:
                            added = ()
                            for k in tl.static_range(LIVE * STRIDE):
                                if k % STRIDE == p and k // STRIDE < K:
                                    added = added + (
                                        dx[k] + weights[(k // STRIDE) * K + j] * delta,
                                    )
                                else:
                                    added = added + (dx[k],)
                            dx = added
                        if dweight_ptr is not None:
                            delta = tl.where((row >= first)[:, None], delta, 0.0)
                            added = ()
                            for k in tl.static_range(K * K):
                                if k % K == j:
                                    active = activate(x[(k // K) * STRIDE + p], PRE_ACT)
                                    added = added + (dweight[k] + active * delta,)
                                else:
                                    added = added + (dweight[k],)
                            dweight = added
            if dx_ptr is not None:
                for k in tl.static_range(STRIDE * STRIDE):
                    r = row * STRIDE - top + k // STRIDE
                    w = u * STRIDE + (k % STRIDE - left)
                    mask = (row >= first) & (r >= 0) & (r < height) & (w >= 0) & (w < width)
                    found = dx[k]
                    if PRE_ACT != "none":
                        found = found * slope(x[k], PRE_ACT)
                    at = (image * height * width + r * width + w)[:, None] * channels + c[None, :]
                    tl.store(
                        dx_ptr + at,
                        found.to(dx_ptr.dtype.element_ty),
                        mask=mask[:, None] & inside[None, :],
                    )
                dx = dx[STRIDE * STRIDE :] + zeros(STRIDE * STRIDE, BLOCK_W, BLOCK_C, ACC)
            following = start + (step + 1) * STRIDE
            x = x[STRIDE * STRIDE :] + _input_rows(
                x_ptr + image * stride_xb, following, height, width, left, u, c, inside, stride_xh, stride_xw,
                LIVE - STRIDE, LIVE, STRIDE, ACC,
            )  # fmt: skip
    if dweight_ptr is not None:
        for k in tl.static_range(K * K):
            at = (part.to(tl.int64) * (K * K) + k) * channels + c
            tl.store(dweight_ptr + at, tl.sum(dweight[k], 0), mask=inside)


def gradients(
    delta: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: int,
    padding: Sequence[int],
    of_x: bool,
    of_weight: bool,
    pre_act: str = "none",
) -> tuple[Tensor | None, Tensor | None]:
    """Of z = conv(pre_act(x), weight), given the gradient of z: those of x and weight, where wanted."""
    delta, x = _gpu.channels_inner(delta), _gpu.channels_inner(x)
    batch, channels, height, width = x.shape
    out_height, out_width = delta.shape[2:]
    k, (left, _, top, _) = weight.shape[2], padding
    dx = _gpu.allocate([_library.nchw(x.shape, x)])[0] if of_x else None
    rows = max(out_height, triton.cdiv(height + top, stride))
    columns = max(out_width, triton.cdiv(width + left, stride))
    options, segments, tiles, blocks = walk("bwd", x, batch, channels, rows, columns, k * stride)
    groups = max(1, min(batch, 2048 // (segments * tiles * blocks)))
    parts = None
    if of_weight:
        shape = groups * segments * tiles, k * k, channels
        parts = torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    unit = _gpu.alignment(channels, *x.stride()[2:], *delta.stride()[2:])
    _triton.launch(
        depthwise_conv_bwd_kernel,
        groups * segments * tiles * blocks,
        delta, x, weight.contiguous(), dx, parts,
        batch, height, width, out_height, out_width, channels // unit, left, top,
        delta.stride(0), delta.stride(2) // unit, delta.stride(3) // unit,
        x.stride(0), x.stride(2) // unit, x.stride(3) // unit, groups, segments, tiles, blocks,
        UNIT=unit, ACC=_gpu.accumulator(x.dtype), K=k, STRIDE=stride, PRE_ACT=pre_act,
        trips=(triton.cdiv(batch, groups), triton.cdiv(batch, groups) * options["ROWS"]), **options,
    )  # fmt: skip
    if parts is None:
        return dx, None
    return dx, _gpu.total(parts).t().reshape(channels, 1, k, k)


def output_gradient(
    grad: Tensor,
    grad_sums: Tensor | None,
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of y = act(z * scale + shift), z = conv(x, weight), and the sums of y: the gradients of z, scale and shift."""
    x, grad = _gpu.channels_inner(x), _gpu.channels_inner(grad)
    batch, channels, height, width = x.shape
    k, (out_height, out_width) = weight.shape[2], grad.shape[2:]
    (delta,) = _gpu.allocate([_library.nchw(grad.shape, x)])
    options, segments, tiles, blocks = walk(
        "bwd_delta", x, batch, channels, out_height, out_width, k
    )
    wide = accumulation_dtype(x.dtype)
    sums = torch.empty(2, batch * segments * tiles, channels, dtype=wide, device=x.device)
    unit = _gpu.alignment(channels, *x.stride()[2:], *grad.stride()[2:])
    _triton.launch(
        depthwise_conv_bwd_delta_kernel,
        batch * segments * tiles * blocks,
        x, weight.contiguous(), _gpu.dense(scale), _gpu.dense(shift), grad, _gpu.dense(grad_sums),
        delta, sums[0], sums[1],
        height, width, out_height, out_width, channels // unit, padding[0], padding[2],
        x.stride(0), x.stride(2) // unit, x.stride(3) // unit,
        grad.stride(0), grad.stride(2) // unit, grad.stride(3) // unit, segments, tiles, blocks,
        UNIT=unit, ACC=_gpu.accumulator(x.dtype), K=k, STRIDE=stride, ACT=act,
        trips=(options["ROWS"] + triton.cdiv(k, stride) - 1,), **options,
    )  # fmt: skip
    return delta, sums[0].sum(0), sums[1].sum(0)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    x, weight, scale, shift, stride, padding, act, squeeze, _, needs = rest
    of_x, of_weight, of_scale, of_shift = wanted((x, weight, scale, shift), needs)
    delta, d_scale, d_shift = grads[0], None, None
    if scale is not None or act != "none" or of_shift or squeeze:
        grad_sums = grads[1] if squeeze else None
        delta, d_scale, d_shift = output_gradient(
            grads[0], grad_sums, x, weight, scale, shift, stride, padding, act
        )
    d_x = d_weight = None
    if of_x or of_weight:
        d_x, d_weight = gradients(delta, x, weight, stride, padding, of_x, of_weight)
    return chosen((d_x, d_weight, d_scale, d_shift), (of_x, of_weight, of_scale, of_shift))
