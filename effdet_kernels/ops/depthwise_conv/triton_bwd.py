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
from effdet_kernels.ops.depthwise_conv.triton_fwd import (
    products,
    tap_by_tap,
    walk,
    weights_of,
    with_input,
    zeros,
)
from effdet_kernels.ops.depthwise_conv.triton_matrix import (
    joined,
    load_pairs,
    of_square,
    spoilt,
    squares,
    with_column_pairs,
    with_squares,
    within,
)


@triton.jit
def _with_row(
    found, z, row, first, column, owned, grad_ptr, stride_h, stride_w, of_sums, delta_ptr, scale_ptr, shift_ptr,
    out_height, out_width, channels, c, inside, ACC: tl.constexpr, ACT: tl.constexpr,
):  # fmt: skip
    """Writes the gradient of the raw results z of a row; ``found``, the sums for scale and shift, with that row's."""
    of_scale, of_shift = found
    row += tl.zeros_like(column)
    done = owned & ((row >= first) & (row < out_height))[:, None]
    at = (row * stride_h + column * stride_w)[:, None] + c[None, :]
    grad = tl.load(grad_ptr + at, mask=done, other=0.0).to(ACC)  # [BLOCK_W, BLOCK_C]
    if of_sums is not None:
        grad = tl.where(done, grad + of_sums[None, :], 0.0)
    z = tl.where(done, z, 0.0)
    delta, before = affine_act_gradient(grad, z, scale_ptr, shift_ptr, c, inside, ACT)
    at = (row * out_width + column)[:, None] * channels + c[None, :]
    tl.store(delta_ptr + at, delta.to(delta_ptr.dtype.element_ty), mask=done)
    return of_scale + before * z, of_shift + before


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
    MATRIX: tl.constexpr,
):  # fmt: skip
    """The gradient of the raw result, which the forward's walk makes again, and a row of each sum over pixels."""
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
    found = zeros(2, BLOCK_W, BLOCK_C, ACC)
    bad = tl.zeros((BLOCK_W, BLOCK_C // TILES), ACC)
    source = column * STRIDE - left
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    x_ptr += image * stride_xb
    pixels = x_ptr + (source * stride_xw)[:, None] + c[None, :]
    grad_ptr += image * stride_gb
    delta_ptr += image * out_height * out_width * channels
    stride_gh, stride_gw = stride_gh_units * UNIT, stride_gw_units * UNIT
    of_sums = None
    if grad_sums_ptr is not None:
        of_sums = tl.load(grad_sums_ptr + image * channels + c, mask=inside, other=0.0)
    for step in tl.range(0, ROWS + LIVE - 1, num_stages=STAGES):
        sums = with_input(
            sums, weights, x_ptr, pixels, (first + step) * STRIDE - top, height, stride_xh, stride_xw, width, source,
            first_channel, channels, inside, K, STRIDE, ACC, MATRIX, WHOLE,
        )  # fmt: skip
        z = joined(sums[(LIVE - 1) * TILES :])
        found = _with_row(
            found, z, first + step - (LIVE - 1), first, column, owned,
            grad_ptr, stride_gh, stride_gw, of_sums, delta_ptr, scale_ptr, shift_ptr,
            out_height, out_width, channels, c, inside, ACC, ACT,
        )  # fmt: skip
        if MATRIX:
            bad += spoilt(sums[(LIVE - 1) * TILES :])
        sums = zeros(TILES, BLOCK_W, BLOCK_C // TILES, ACC) + sums[: (LIVE - 1) * TILES]
    if MATRIX:  # noqa: SIM102
        if tl.sum(bad) != 0.0:  # as in the forward
            found = zeros(2, BLOCK_W, BLOCK_C, ACC)
            for row in range(first, tl.minimum(first + ROWS, out_height)):
                z = tap_by_tap(
                    weight_ptr, x_ptr, row * STRIDE - top, height, stride_xh, stride_xw, width, source, c, inside,
                    K, ACC,
                )  # fmt: skip
                found = _with_row(
                    found, z, row, first, column, owned,
                    grad_ptr, stride_gh, stride_gw, of_sums, delta_ptr, scale_ptr, shift_ptr,
                    out_height, out_width, channels, c, inside, ACC, ACT,
                )  # fmt: skip
    of_scale, of_shift = found
    at = part.to(tl.int64) * channels + c
    tl.store(of_scale_ptr + at, tl.sum(of_scale, 0), mask=inside)
    tl.store(of_shift_ptr + at, tl.sum(of_shift, 0), mask=inside)


@triton.jit
def _input_rows(
    x_ptr, row, height, width, left, u, first_channel, channels, stride_h, stride_w,
    FIRST: tl.constexpr, LAST: tl.constexpr, STRIDE: tl.constexpr, PRE_ACT: tl.constexpr, ACC: tl.constexpr,
    WIDTH: tl.constexpr, TILES: tl.constexpr, MATRIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Tiles of the rows row + FIRST to row + LAST - 1 of x, activated; of each, the columns u * STRIDE - left + p for
    each p, and of those TILES times WIDTH channels.
    """
    found = ()
    for i in tl.static_range(FIRST, LAST):
        for p in tl.static_range(STRIDE):
            for tile in tl.static_range(TILES):
                c = first_channel + tile * WIDTH + tl.arange(0, WIDTH)
                r, w = row + i + tl.zeros_like(u), u * STRIDE + (p - left)
                mask = (r >= 0) & (r < height) & (w >= 0) & (w < width)
                mask = mask[:, None] & within(c, channels, WHOLE)[None, :]
                at = (r * stride_h + w * stride_w)[:, None] + c[None, :]
                x = tl.load(x_ptr + at, mask=mask, other=0.0)
                if PRE_ACT != "none":
                    x = activate(x.to(ACC), PRE_ACT).to(x.dtype)
                if not MATRIX:
                    x = x.to(ACC)
                found = found + (x,)
    return found


@triton.jit
def _with_delta(
    dx, dweight, x, weights, delta_ptr, row, out_height, out_width, stride_h, stride_w, u, first_channel, c, inside,
    channels, K: tl.constexpr, STRIDE: tl.constexpr, ACC: tl.constexpr, MATRIX: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """``dx`` and ``dweight``, either of which may be empty, and what a row of delta adds."""
    delta_ptr += row * stride_h
    row += tl.zeros_like(u)
    exists = ((row >= 0) & (row < out_height))[:, None]
    for j in tl.static_range(K):
        column = u - j // STRIDE
        if MATRIX:
            if j // STRIDE % 2 == 0:
                delta = load_pairs(
                    delta_ptr, exists, stride_w, out_width, column, first_channel, channels, j, K, STRIDE, -1, WHOLE,
                )  # fmt: skip
                dx = with_column_pairs(dx, weights, delta, j, K, STRIDE)
                dweight = with_squares(dweight, x, delta, j, K, STRIDE)
        else:
            mask = exists & ((column >= 0) & (column < out_width))[:, None] & inside[None, :]
            at = (column * stride_w)[:, None] + c[None, :]
            delta = tl.load(delta_ptr + at, mask=mask, other=0.0).to(ACC)  # [BLOCK_W, BLOCK_C]
            added = ()
            for k in tl.static_range(len(dx)):
                if k % STRIDE == j % STRIDE and k // STRIDE < K:
                    added = added + (dx[k] + weights[(k // STRIDE) * K + j] * delta,)
                else:
                    added = added + (dx[k],)
            dx = added
            added = ()
            for k in tl.static_range(len(dweight)):
                if k % K == j:
                    added = added + (dweight[k] + x[(k // K) * STRIDE + j % STRIDE] * delta,)
                else:
                    added = added + (dweight[k],)
            dweight = added
    return dx, dweight


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
    PRE_ACT: tl.constexpr, ROWS, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr, MATRIX: tl.constexpr,
):  # fmt: skip
    """Walks down ROWS rows of delta, of every image of its group: dx of the input rows above them, a part of dW.

    Row R of delta meets the input rows R * STRIDE - top + i, i < K. ``dx`` and ``x`` hold what is not complete of them,
    row by row, then by the remainder p of the column, as STRIDE columns of x belong to one of delta, then by channels.
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
    first_channel = (program % blocks) * BLOCK_C
    c = first_channel + tl.arange(0, BLOCK_C)
    u = left // STRIDE + (part % tiles) * BLOCK_W + tl.arange(0, BLOCK_W)  # those before meet no x
    WHOLE: tl.constexpr = UNIT % BLOCK_C == 0
    inside = within(c, channels, WHOLE)
    TILES: tl.constexpr = 2 if MATRIX else 1
    WIDTH: tl.constexpr = BLOCK_C // TILES
    DONE: tl.constexpr = STRIDE * STRIDE * TILES  # of dx and x, with each row
    stride_xh, stride_xw = stride_xh_units * UNIT, stride_xw_units * UNIT
    stride_dh, stride_dw = stride_dh_units * UNIT, stride_dw_units * UNIT
    weights = ()
    if dx_ptr is not None:
        weights = weights_of(
            weight_ptr, first_channel, channels, c, inside, K, STRIDE, x_ptr.dtype.element_ty, ACC, MATRIX, WHOLE,
        )  # fmt: skip
    dweight = ()
    if dweight_ptr is not None:
        if MATRIX:
            dweight = squares(K, STRIDE, ACC)
        else:
            dweight = zeros(K * K, BLOCK_W, BLOCK_C, ACC)
    for index in range(group, images, groups):
        image = tl.zeros((), tl.int64) + index
        of_delta, of_x = delta_ptr + image * stride_db, x_ptr + image * stride_xb
        dx = ()
        if dx_ptr is not None:
            dx = zeros(LIVE * STRIDE * TILES, BLOCK_W, WIDTH, ACC)
            # Not `first`, for it to stay a loop: unrolled, it would take as much code as the one below, each time.
            for row in range(first - BEFORE, tl.minimum(first, 1 << 30)):
                dx, _ = _with_delta(
                    dx, (), (), weights, of_delta, row, out_height, out_width, stride_dh, stride_dw, u, first_channel,
                    c, inside, channels, K, STRIDE, ACC, MATRIX, WHOLE,
                )  # fmt: skip
                dx = dx[DONE:] + zeros(DONE, BLOCK_W, WIDTH, ACC)
        x = ()
        if dweight_ptr is not None:
            x = _input_rows(
                of_x, first * STRIDE - top, height, width, left, u, first_channel, channels, stride_xh, stride_xw,
                0, LIVE, STRIDE, PRE_ACT, ACC, WIDTH, TILES, MATRIX, WHOLE,
            )  # fmt: skip
        for row in range(first, first + ROWS):
            dx, dweight = _with_delta(
                dx, dweight, x, weights, of_delta, row, out_height, out_width, stride_dh, stride_dw, u, first_channel,
                c, inside, channels, K, STRIDE, ACC, MATRIX, WHOLE,
            )  # fmt: skip
            if dx_ptr is not None:
                for k in tl.static_range(STRIDE * STRIDE):
                    r = row * STRIDE - top + k // STRIDE + tl.zeros_like(u)
                    w = u * STRIDE + (k % STRIDE - left)
                    mask = ((r >= 0) & (r < height) & (w >= 0) & (w < width))[:, None] & inside[
                        None, :
                    ]
                    z = joined(dx[k * TILES : (k + 1) * TILES])
                    if PRE_ACT != "none":
                        at = (r * stride_xh + w * stride_xw)[:, None] + c[None, :]
                        z *= slope(tl.load(of_x + at, mask=mask, other=0.0).to(ACC), PRE_ACT)
                    at = (image * height * width + r * width + w)[:, None] * channels + c[None, :]
                    tl.store(dx_ptr + at, z.to(dx_ptr.dtype.element_ty), mask=mask)
                dx = dx[DONE:] + zeros(DONE, BLOCK_W, WIDTH, ACC)
            if dweight_ptr is not None:
                x = x[DONE:] + _input_rows(
                    of_x, (row + 1) * STRIDE - top, height, width, left, u, first_channel, channels,
                    stride_xh, stride_xw, LIVE - STRIDE, LIVE, STRIDE, PRE_ACT, ACC, WIDTH, TILES, MATRIX, WHOLE,
                )  # fmt: skip
    if dweight_ptr is not None:
        for tap in tl.static_range(K * K):
            for tile in tl.static_range(TILES):
                if MATRIX:
                    of_tap = of_square(dweight, tap // K, tap % K, tile, K, STRIDE)
                else:
                    of_tap = tl.sum(dweight[tap], 0)
                of_c = first_channel + tile * WIDTH + tl.arange(0, WIDTH)
                at = (part.to(tl.int64) * (K * K) + tap) * channels + of_c
                tl.store(dweight_ptr + at, of_tap, mask=within(of_c, channels, WHOLE))


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
    k = weight.shape[2]
    delta, x = _gpu.channels_inner(delta), _gpu.channels_inner(x)
    unit = _gpu.alignment(x.shape[1], *x.stride()[2:], *delta.stride()[2:])
    # On matrix units: more sums, or more addresses where nothing is aligned, than a warp has registers for.
    apart = x.element_size() == 2 and stride == 1 and k <= 5 and (k > 3 or unit < 8)
    if apart and of_x and of_weight:
        rest = delta, x, weight, stride, padding
        return gradients(*rest, True, False, pre_act)[0], gradients(*rest, False, True, pre_act)[1]
    row = ("bwd_dx" if of_x else "bwd_weight") if apart else "bwd"
    batch, channels, height, width = x.shape
    out_height, out_width = delta.shape[2:]
    left, _, top, _ = padding
    dx = _gpu.allocate([_library.nchw(x.shape, x)])[0] if of_x else None
    rows = max(out_height, triton.cdiv(height + top, stride))
    columns = triton.cdiv(width + left, stride) - left // stride
    size = max(k, 5) if unit < 8 and stride > 1 else k  # that of 5x5 with a stride: no matrix units
    options, segments, tiles, blocks = walk(row, x, batch, channels, rows, columns, size, stride)
    groups = max(1, min(batch, 2048 // (segments * tiles * blocks)))
    parts = None
    if of_weight:
        shape = groups * segments * tiles, k * k, channels
        parts = torch.empty(shape, dtype=accumulation_dtype(x.dtype), device=x.device)
    images, before = triton.cdiv(batch, groups), triton.cdiv(k, stride) - 1
    _triton.launch(
        depthwise_conv_bwd_kernel,
        groups * segments * tiles * blocks,
        delta, x, weight.contiguous(), dx, parts,
        batch, height, width, out_height, out_width, channels // unit, left, top,
        delta.stride(0), delta.stride(2) // unit, delta.stride(3) // unit,
        x.stride(0), x.stride(2) // unit, x.stride(3) // unit, groups, segments, tiles, blocks,
        UNIT=unit, ACC=_gpu.accumulator(x.dtype), K=k, STRIDE=stride, PRE_ACT=pre_act,
        trips=(images, *[images * before] * of_x, images * options["ROWS"]),
        flops=images * products(options, k, groups * segments * tiles * blocks) * (of_x + of_weight),
        **options,
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
        "bwd_delta", x, batch, channels, out_height, out_width, k, stride
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
        trips=(options["ROWS"] + triton.cdiv(k, stride) - 1,),
        flops=products(options, k, batch * segments * tiles * blocks), **options,
    )  # fmt: skip
    return delta, sums[0].sum(0), sums[1].sum(0)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of x, weight, scale and shift."""
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
