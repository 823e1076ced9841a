"""The backward of ``separable_conv`` in Triton; the README has the formulas and the data flow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._gradients import chosen, wanted
from effdet_kernels.ops._tl import revealed
from effdet_kernels.ops.depthwise_conv.triton_bwd import gradients as depthwise_gradients
from effdet_kernels.ops.depthwise_conv.triton_fwd import taps
from effdet_kernels.ops.pointwise_conv.triton_bwd import input_gradient
from effdet_kernels.ops.separable_conv import op
from effdet_kernels.ops.separable_conv.triton_fwd import LARGEST, launch
from effdet_kernels.ops.separable_conv.triton_tile import (
    depthwise,
    of_output,
    patches,
    pixels_of,
    tiling,
)
from effdet_kernels.ops.weighted_fusion.triton_bwd import gradients as fusion_gradients
from effdet_kernels.ops.weighted_fusion.triton_fwd import run as fuse
from effdet_kernels.ops.weighted_fusion.triton_load import sources

_PARTS = 528  # programs that fill a large GPU


@triton.jit
def separable_conv_bwd_dpw_kernel(
    dw_ptr, out_ptr, x, delta, geometry, places, firsts,
    batch, in_units, out_units, segment, row_blocks, column_blocks,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    KERNEL: tl.constexpr, RESAMPLE: tl.constexpr, PRE_ACT: tl.constexpr,
    PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The sum over a segment of the tiles of one level of delta[., n] * depthwise(pre_act(x))[., k], made again."""
    program = tl.program_id(0)
    part = program // (row_blocks * column_blocks)
    n = program // column_blocks % row_blocks * BLOCK_N + tl.arange(0, BLOCK_N)
    c = program % column_blocks * BLOCK_K + tl.arange(0, BLOCK_K)
    x_ptr, source = of_output(x, firsts, part), of_output(geometry, firsts, part)
    delta_ptr = of_output(delta, firsts, part)
    height, width = of_output(places, firsts, part)
    height, width = revealed(height), revealed(width)

    ROWS: tl.constexpr = LANES * PATCH_H * PATCH_W
    rows, columns = out_units * OUT_UNIT, in_units * IN_UNIT
    weights = taps(dw_ptr, c, c < columns, KERNEL, ACC)
    tiles = tl.cdiv(tl.cdiv(height, PATCH_H) * tl.cdiv(width, PATCH_W), LANES)
    first = (part - revealed(of_output(firsts, firsts, part))) * segment
    lane, m = tl.arange(0, LANES), tl.arange(0, ROWS)
    z = tl.zeros((BLOCK_N, BLOCK_K), ACC)
    for tile in tl.range(first, tl.minimum(first + segment, batch * tiles), num_stages=1):
        image = (tile // tiles).to(tl.int64)
        top, left = patches(tile % tiles, lane, height, width, 1, PATCH_H, PATCH_W, LANES)
        middle = depthwise(
            (x_ptr,), (source,), (1.0,), weights, image, top, left, c, columns, height, width, 0, 0,
            IN_UNIT, RESAMPLE, ACC, KERNEL, PATCH_H, PATCH_W, PRE_ACT,
        )  # [ROWS, BLOCK_K] # fmt: skip
        pixel = pixels_of(tile % tiles, m, height, width, 1, PATCH_H, PATCH_W, LANES)
        delta_part = tl.load(
            delta_ptr + image * height * width * rows + pixel[:, None] * rows + n[None, :],
            mask=(pixel < height * width)[:, None] & (n < rows)[None, :],
            other=0.0,
        )  # [ROWS, BLOCK_N]
        z = tl.dot(tl.trans(delta_part), middle, acc=z, input_precision=PRECISION, out_dtype=ACC)
    at = (part.to(tl.int64) * rows + n[:, None]) * columns + c[None, :]
    tl.store(out_ptr + at, z, mask=(n < rows)[:, None] & (c < columns)[None, :])


def pointwise_weight(
    delta: Sequence[Tensor], x: Sequence[Tensor], dw_weight: Tensor, pre_act: str
) -> Tensor:
    """The gradient [O, C, 1, 1] of a net's pointwise weight, given those of its levels' raw results, dense."""
    maps, geometry, _, unit = sources(x, ",".join(["identity"] * len(x)), ())
    batch, channels = maps[0].shape[:2]
    out_channels = delta[0].shape[1]
    wide = accumulation_dtype(maps[0].dtype)
    if batch == 0:
        return torch.zeros(out_channels, channels, 1, 1, dtype=wide, device=maps[0].device)
    kernel = dw_weight.shape[2]
    row = "bwd_dpw" if kernel <= 3 else "bwd_dpw_wide"
    options, tiles = tiling(row, maps[0], out_channels, [d.shape[2:] for d in delta])
    del options["STEPS"]
    row_blocks = triton.cdiv(out_channels, options["BLOCK_N"])
    column_blocks = triton.cdiv(channels, options["BLOCK_K"])
    segment = triton.cdiv(batch * sum(tiles) * row_blocks * column_blocks, _PARTS)
    parts = [triton.cdiv(batch * t, segment) for t in tiles]
    shape = sum(parts), out_channels, channels
    out = torch.empty(shape, dtype=wide, device=maps[0].device)
    out_unit = _gpu.alignment(out_channels)
    pixels = batch * sum(d.shape[2] * d.shape[3] for d in delta)
    _triton.launch(
        separable_conv_bwd_dpw_kernel,
        sum(parts) * row_blocks * column_blocks,
        dw_weight.contiguous(), out, maps, tuple(delta), geometry,
        tuple(_gpu.opaque(*d.shape[2:]) for d in delta),
        _gpu.opaque(*itertools.accumulate(parts[:-1], initial=0)),
        batch, channels // unit, out_channels // out_unit, segment, row_blocks, column_blocks,
        IN_UNIT=unit, OUT_UNIT=out_unit, ACC=_gpu.accumulator(maps[0].dtype),
        PRECISION=_gpu.matrix_precision(maps[0].dtype), KERNEL=kernel,
        RESAMPLE=("identity",), PRE_ACT=pre_act,
        trips=(segment,), flops=2 * pixels * channels * out_channels, **options,
    )  # fmt: skip
    return _gpu.total(out)[:, :, None, None]


def output_gradients(
    grads: Sequence[Tensor], maps: Sequence[Tensor], weights, scale, shift, pre_act: str, act: str
) -> tuple[Sequence[Tensor], list[Tensor], list[Tensor]]:
    """The gradients of the raw results, of scale and of shift; ``grads``, dense, themselves where they are those."""
    if not scale and act == "none":
        wide = accumulation_dtype(grads[0].dtype)
        return grads, [], [grad.sum((0, 2, 3), dtype=wide) for grad in grads] if shift else []
    delta = _gpu.allocate([_library.nchw(grad.shape, grad) for grad in grads])
    sums = launch(delta, grads, None, maps, *weights, scale, shift, pre_act, act)
    return delta, [s[0] for s in sums[: len(scale)]], [s[1] for s in sums[: len(shift)]]


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of every tensor, in the order of the arguments."""
    *args, needs = rest
    x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, *how, statistics = (
        args
    )
    if max(weight.shape[2] for weight in dw_weight) > LARGEST:
        return op._separable_conv.backwards["reference"](grads, *rest)
    variables = x, dw_weight, pw_weight, scale, shift, fusion_weight
    of_x, of_dw, of_pw, of_scale, of_shift, of_fusion = wanted(variables, needs)
    maps = x if method == "none" else [fuse(x, fusion_weight, method, *how, "none")]
    of_maps = of_x if method == "none" else [any(of_x) or of_fusion]
    # Mean and variance of each map have no gradient.
    maps_only = grads[: len(grads) // 3] if statistics else grads
    grads = [grad.contiguous(memory_format=torch.channels_last) for grad in maps_only]
    delta, d_scale, d_shift = output_gradients(
        grads, maps, (dw_weight, pw_weight), scale, shift, pre_act, act
    )
    levels = len(grads) // len(dw_weight)
    d_maps: list[Tensor | None] = [None] * len(maps)
    d_dw: list[Tensor | None] = [None] * len(dw_weight)
    d_pw: list[Tensor | None] = [None] * len(pw_weight)
    for n, (dw, pw) in enumerate(zip(dw_weight, pw_weight, strict=True)):
        these = range(n * levels, (n + 1) * levels)
        sources_of_net = [maps[i % len(maps)] for i in these]
        if of_pw[n]:
            d_pw[n] = pointwise_weight([delta[i] for i in these], sources_of_net, dw, pre_act)
        for i in these:
            m = i % len(maps)
            if not (of_dw[n] or of_maps[m]):
                continue
            d_middle, _ = input_gradient(delta[i], pw, None, maps[m], False)
            padding = [dw.shape[2] // 2] * 4
            of_map, of_taps = depthwise_gradients(
                d_middle, maps[m], dw, 1, padding, of_maps[m], of_dw[n], pre_act
            )
            d_maps[m], d_dw[n] = _sum(d_maps[m], of_map), _sum(d_dw[n], of_taps)
    d_weight = None
    if method != "none":
        fused, d_maps = d_maps[0], [None] * len(x)
        if fused is not None:
            names, _, pool_padding = how
            d_maps, d_weight = fusion_gradients(
                fused, x, fusion_weight, method, names, pool_padding, of_x, of_fusion
            )
    return [
        *chosen(d_maps, of_x),
        *chosen(d_dw, of_dw),
        *chosen(d_pw, of_pw),
        *chosen(d_scale, of_scale),
        *chosen(d_shift, of_shift),
        *chosen([d_weight], [of_fusion]),
    ]


def _sum(total: Tensor | None, part: Tensor | None) -> Tensor | None:
    return part if total is None or part is None else total.add_(part)
