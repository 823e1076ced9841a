"""Triton kernel of ``separable_conv``: all levels of all nets, or a BiFPN node, in one launch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._tl import affine_act, affine_act_gradient, revealed, store_moments
from effdet_kernels.ops.batch_norm_act.triton_fwd import statistics_of
from effdet_kernels.ops.depthwise_conv.triton_fwd import taps
from effdet_kernels.ops.separable_conv import op
from effdet_kernels.ops.separable_conv.triton_tile import (
    depthwise,
    of_output,
    patches,
    pixels_of,
    tiling,
)
from effdet_kernels.ops.weighted_fusion.triton_load import fusion_shares, sources

LARGEST = 7  # kernel that is unrolled
# With fewer programs a large GPU has room for some that make the depthwise result again.
_PROGRAMS = 4 * _gpu.MULTIPROCESSORS


@triton.jit
def separable_conv_fwd_kernel(
    dw_0_ptr, pw_0_ptr, dw_1_ptr, pw_1_ptr, fusion_weight_ptr, x, scale, shift, grad, y, sums, parts, counts,
    geometry, places, firsts, net_firsts,
    in_units, steps, span, pool_left, pool_top,
    IN_UNIT: tl.constexpr, OUT_UNIT: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    METHOD: tl.constexpr, RESAMPLE: tl.constexpr, KERNEL: tl.constexpr,
    PRE_ACT: tl.constexpr, ACT: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr,
    LANES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SINGLE: tl.constexpr,
):  # fmt: skip
    """A program: in an image of an output LANES strips, ``steps`` patches of PATCH_H x PATCH_W pixels one below
    another, of BLOCK_N channels. SINGLE: all input channels are one slice of BLOCK_K, whose weights stay in registers.

    Without ``grad`` it makes y, with ``parts`` also a part of its statistics per tile. With it, the outputs' gradients,
    y becomes that of the raw result, and ``sums`` per tile those of scale and shift.
    """
    program = tl.program_id(0)
    dw_ptr = of_output((dw_0_ptr, dw_1_ptr), net_firsts, program)
    pw_ptr = of_output((pw_0_ptr, pw_1_ptr), net_firsts, program)
    scale_ptr = None if scale is None else of_output(scale, firsts, program)
    shift_ptr = None if shift is None else of_output(shift, firsts, program)
    grad_ptr = None if grad is None else of_output(grad, firsts, program)
    sums_ptr = None if sums is None else of_output(sums, firsts, program)
    parts_ptr = None if parts is None else of_output(parts, firsts, program)
    counts_ptr = None if counts is None else of_output(counts, firsts, program)
    y_ptr = of_output(y, firsts, program)
    if METHOD == "none":
        x, geometry = (of_output(x, firsts, program),), (of_output(geometry, firsts, program),)
    height, width, out_units = of_output(places, firsts, program)
    height, width, out_channels = revealed(height), revealed(width), revealed(out_units) * OUT_UNIT
    shares = fusion_shares(fusion_weight_ptr, METHOD, len(RESAMPLE), ACC)

    ROWS: tl.constexpr = LANES * PATCH_H * PATCH_W
    channels = in_units * IN_UNIT
    program -= revealed(of_output(firsts, firsts, program))
    spans = tl.cdiv(out_channels, span)
    strips = tl.cdiv(height, steps * PATCH_H) * tl.cdiv(width, PATCH_W)
    tiles = tl.cdiv(strips, LANES)
    tile = program // spans
    image = (tile // tiles).to(tl.int64)
    begin = program % spans * span
    end = tl.minimum(begin + span, out_channels)
    lane, m = tl.arange(0, LANES), tl.arange(0, ROWS)
    top, left = patches(tile % tiles, lane, height, width, steps, PATCH_H, PATCH_W, LANES)
    pixel = pixels_of(tile % tiles, m, height, width, steps, PATCH_H, PATCH_W, LANES)
    y_ptr += image * height * width * out_channels
    if grad_ptr is not None:
        grad_ptr += image * height * width * out_channels
    if SINGLE:
        c = tl.arange(0, BLOCK_K)
        weights = taps(dw_ptr, c, c < channels, KERNEL, ACC)
    for step in tl.range(0, steps, num_stages=1):
        if SINGLE:
            middle = depthwise(
                x, geometry, shares, weights, image, top, left, c, channels, height, width, pool_left, pool_top,
                IN_UNIT, RESAMPLE, ACC, KERNEL, PATCH_H, PATCH_W, PRE_ACT,
            )  # [ROWS, BLOCK_K] # fmt: skip
        for n in tl.range(begin, end, BLOCK_N, num_stages=1):
            out = n + tl.arange(0, BLOCK_N)
            owned = out < out_channels
            z = tl.zeros((ROWS, BLOCK_N), ACC)
            if SINGLE:
                weight = _slice(pw_ptr, c, out, channels, owned)
                z = tl.dot(middle, weight, acc=z, input_precision=PRECISION, out_dtype=ACC)
            else:
                for k in tl.range(0, channels, BLOCK_K, num_stages=1):
                    c = k + tl.arange(0, BLOCK_K)
                    weights = taps(dw_ptr, c, c < channels, KERNEL, ACC)
                    middle = depthwise(
                        x, geometry, shares, weights, image, top, left, c, channels, height, width, pool_left, pool_top,
                        IN_UNIT, RESAMPLE, ACC, KERNEL, PATCH_H, PATCH_W, PRE_ACT,
                    )  # [ROWS, BLOCK_K] # fmt: skip
                    weight = _slice(pw_ptr, c, out, channels, owned)
                    z = tl.dot(middle, weight, acc=z, input_precision=PRECISION, out_dtype=ACC)
            at = pixel[:, None] * out_channels + out[None, :]
            inside = (pixel < height * width)[:, None] & owned[None, :]
            if grad_ptr is None:
                result = affine_act(z, scale_ptr, shift_ptr, out, owned, ACT)
                if parts_ptr is not None:
                    store_moments(
                        parts_ptr, counts_ptr, tile * steps + step, result, pixel < height * width,
                        out, owned, out_channels, n == 0,
                    )  # fmt: skip
            else:
                upper = tl.load(grad_ptr + at, mask=inside, other=0.0).to(ACC)
                result, before = affine_act_gradient(
                    upper, z, scale_ptr, shift_ptr, out, owned, ACT
                )
                part = (tile * steps + step).to(tl.int64) * 2 * out_channels
                tl.store(sums_ptr + part + out, tl.sum(before * z, 0), mask=owned)
                tl.store(sums_ptr + part + out_channels + out, tl.sum(before, 0), mask=owned)
            tl.store(y_ptr + at, result.to(y_ptr.dtype.element_ty), mask=inside)
        top += PATCH_H
        pixel += PATCH_H * width


@triton.jit
def _slice(pw_ptr, c, out, channels, owned):
    """Pointwise weights [BLOCK_K, BLOCK_N], transposed."""
    at = c[:, None] + out[None, :] * channels
    return tl.load(pw_ptr + at, mask=(c < channels)[:, None] & owned[None, :], other=0.0)


def launch(
    y: Sequence[Tensor],
    grads: Sequence[Tensor] | None,
    statistics: list[Tensor] | None,
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_act: str,
    act: str,
    method: str = "none",
    fusion_weight: Tensor | None = None,
    resample: str = "",
    size: Sequence[int] = (),
    pool_padding: Sequence[int] = (),
) -> list[Tensor]:
    """Makes y; ``statistics`` gets the means, then the variances.

    With ``grads``, dense, y is the gradients of the raw results, and per output the gradients [2, O] of scale and shift
    are returned.
    """
    names = resample if method != "none" else ",".join(["identity"] * len(x))
    maps, geometry, kinds, unit = sources(x, names, size)
    pool_left, _, pool_top, _ = pool_padding or (0, 0, 0, 0)
    if method == "none":
        kinds = ("identity",)
    batch, channels = maps[0].shape[:2]
    levels = len(y) // len(dw_weight)
    out_unit = _gpu.alignment(*(len(pw) for pw in pw_weight))
    kernels = {weight.shape[2] for weight in dw_weight}
    count = len(y) if len(kernels) == 1 else levels  # outputs of a launch
    found, moments = [], []
    for begin in range(0, len(y), count):
        these = slice(begin, begin + count)
        weights = [
            (dw.contiguous(), pw.contiguous()) for dw, pw in zip(dw_weight, pw_weight, strict=True)
        ][begin // levels : (begin + count) // levels]
        kernel = weights[0][0].shape[2]
        one_each = method == "none" and len(maps) == len(y)
        sizes = [tuple(out.shape[2:]) for out in y[these]]
        widths = [out.shape[1] for out in y[these]]
        options, tiles = tiling(_row(kernel, kinds, pre_act, grads), maps[0], max(widths), sizes)
        steps, block_n, block_k = (options[n] for n in ("STEPS", "BLOCK_N", "BLOCK_K"))
        del options["STEPS"]
        slices = triton.cdiv(channels, block_k)
        # Several slices of the input channels would be convolved again for each block of the output's.
        blocks = triton.cdiv(max(widths), block_n)
        spans = max(1, min(blocks, _PROGRAMS // (batch * sum(tiles) or 1)))
        span = block_n * (1 if slices > 1 else triton.cdiv(blocks, spans))
        programs = [
            batch * t * triton.cdiv(width, span) for t, width in zip(tiles, widths, strict=True)
        ]
        firsts = _gpu.opaque(*itertools.accumulate(programs[:-1], initial=0))
        sums = parts = counts = None
        if grads is not None:
            wide = accumulation_dtype(maps[0].dtype)
            sums = tuple(
                torch.empty(batch * t * steps, 2, width, dtype=wide, device=maps[0].device)
                for t, width in zip(tiles, widths, strict=True)
            )
            found += sums
        if statistics is not None:
            of_tiles = [
                _gpu.parts_of_moments(batch * t * steps, width, maps[0])
                for t, width in zip(tiles, widths, strict=True)
            ]
            moments += of_tiles
            parts, counts = zip(*of_tiles, strict=True)
        _triton.launch(
            separable_conv_fwd_kernel,
            sum(programs),
            *weights[0], *(weights[1] if len(weights) > 1 else (None, None)),
            _gpu.dense(fusion_weight), maps[these] if one_each else maps,
            tuple(vector.contiguous() for vector in scale[these]) or None,
            tuple(vector.contiguous() for vector in shift[these]) or None,
            None if grads is None else tuple(grads[these]),
            tuple(y[these]), sums, parts, counts, geometry[these] if one_each else geometry,
            tuple(
                _gpu.opaque(*size, width // out_unit)
                for size, width in zip(sizes, widths, strict=True)
            ),
            firsts, firsts[::levels],
            channels // unit, steps, span, pool_left, pool_top,
            IN_UNIT=unit, OUT_UNIT=out_unit, ACC=_gpu.accumulator(maps[0].dtype),
            PRECISION=_gpu.matrix_precision(maps[0].dtype), METHOD=method,
            RESAMPLE=kinds, KERNEL=kernel, PRE_ACT=pre_act, ACT=act, SINGLE=slices == 1,
            trips=(steps,) * (steps > 1)
            + (steps * triton.cdiv(span, block_n),)
            + (steps * slices,) * (slices > 1),
            flops=sum(
                2 * batch * height * w * channels * width
                for (height, w), width in zip(sizes, widths, strict=True)
            ),
            **options,
        )  # fmt: skip
    if statistics is not None:
        statistics += itertools.chain(*zip(*map(statistics_of, moments), strict=True))
    return [_gpu.total(sums) for sums in found]


def _row(kernel: int, kinds: Sequence[str], pre_act: str, grads: Sequence[Tensor] | None) -> str:
    """The name of the configurations in launch.json."""
    if kernel > 3:
        return "wide"
    if grads is not None:
        return "bwd_delta"
    if "max" in kinds:
        return "max"
    return "fwd" if len(kinds) == 1 and pre_act == "none" else "fused"


def run(*args) -> list[Tensor]:
    """Maps [B, O, H, W], net-major; with ``statistics`` then their means, then their variances, [O] each."""
    if max(weight.shape[2] for weight in args[1]) > LARGEST:
        return op._reference(*args)
    *rest, wanted = args
    y = _gpu.allocate(op._out_spec(*rest, False))
    statistics: list[Tensor] = []
    launch(y, None, statistics if wanted else None, *rest)
    return [*y, *statistics]
