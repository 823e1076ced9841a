"""The weighted sum of resampled maps as a load: what ``weighted_fusion`` stores and ``separable_conv`` convolves."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import revealed
from effdet_kernels.ops.weighted_fusion.reference import FASTATTN_EPS

_EPS = tl.constexpr(FASTATTN_EPS)


@triton.jit
def fused_pixels(
    x, geometry, shares, image, row, column, channel, inside, height, width, pool_left, pool_top,
    UNIT: tl.constexpr, RESAMPLE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """sum_i shares[i] * r_i(x[i]) at pixels of the result, in ACC; 0 where not ``inside``.

    row, column and channel, broadcast together, have the shape of ``inside``. x, geometry and RESAMPLE are what
    ``sources`` gives; shares a scalar per map; image an int64, height and width those of the result.
    """
    total = None
    for i in tl.static_range(len(RESAMPLE)):
        x_height, x_width, stride_b, stride_h, stride_w = geometry[i]
        value = resampled(
            x[i] + image * (revealed(stride_b) * UNIT), row, column, channel, inside, height, width,
            pool_left, pool_top, revealed(x_height), revealed(x_width),
            revealed(stride_h) * UNIT, revealed(stride_w) * UNIT, tl.constexpr(RESAMPLE[i]), ACC,
        )  # fmt: skip
        value *= shares[i]
        total = value if i == 0 else total + value
    return total


@triton.jit
def resampled(
    x_ptr, row, column, channel, inside, height, width, pool_left, pool_top,
    x_height, x_width, stride_h, stride_w, HOW: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One map, resampled by ``HOW``, at pixels of the result, in ACC."""
    if HOW == "max":
        return _pooled(
            x_ptr, 2 * row - pool_top, 2 * column - pool_left, channel, inside,
            x_height, x_width, stride_h, stride_w, ACC,
        )  # fmt: skip
    if HOW == "bilinear":
        above, below, down = between(row, x_height, height, ACC)
        before, behind, right = between(column, x_width, width, ACC)
        above_ptr, below_ptr = x_ptr + above * stride_h, x_ptr + below * stride_h
        before, behind = before * stride_w + channel, behind * stride_w + channel
        upper = _mix(above_ptr, before, behind, right, inside)
        lower = _mix(below_ptr, before, behind, right, inside)
        return upper * (1.0 - down) + lower * down
    if HOW == "nearest":
        row, column = nearest(row, x_height, height), nearest(column, x_width, width)
    elif HOW == "half":
        row, column = row // 2, column // 2
    at = row * stride_h + column * stride_w + channel
    return tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)


@triton.jit
def _pooled(
    x_ptr, top, left, channel, inside, height, width, stride_h, stride_w, ACC: tl.constexpr
):
    """The maximum, or NaN, of the 3x3 pixels from (top, left) on that the map has.

    A place outside of the map stands for the nearest one inside, which every window has too: no tap needs a mask.
    """
    for i in tl.static_range(3):
        row = tl.minimum(tl.maximum(top + i, 0), height - 1)
        for j in tl.static_range(3):
            column = tl.minimum(tl.maximum(left + j, 0), width - 1)
            at = row * stride_h + column * stride_w + channel
            x = tl.load(x_ptr + at, mask=inside, other=0.0).to(ACC)
            if i + j == 0:
                best = x
            else:
                best = tl.maximum(best, x, propagate_nan=tl.PropagateNan.ALL)
    return best


@triton.jit
def nearest(place, size, of):
    """The pixel that torch's interpolate takes: in float32, floor(place * (size / of))."""
    ratio = tl.div_rn(tl.full((), size, tl.float32), tl.full((), of, tl.float32))
    return tl.minimum((place.to(tl.float32) * ratio).to(tl.int32), size - 1)


@triton.jit
def between(place, size, of, ACC: tl.constexpr):
    """The two pixels around the centre of pixel ``place``, and the weight of the second, in ACC."""
    at = tl.maximum((2 * place + 1) * size - of, 0)  # in units of 1 / (2 * of)
    first = at // (2 * of)
    weight = (at - first * (2 * of)).to(ACC) / tl.full((), 2 * of, ACC)
    return first, tl.minimum(first + 1, size - 1), weight


@triton.jit
def _mix(row_ptr, before, behind, weight, inside):
    """Of two pixels of a row: before * (1 - weight) + behind * weight, in the dtype of weight."""
    first = tl.load(row_ptr + before, mask=inside, other=0.0).to(weight.dtype)
    second = tl.load(row_ptr + behind, mask=inside, other=0.0).to(weight.dtype)
    return first * (1.0 - weight) + second * weight


@triton.jit
def fusion_shares(weight_ptr, METHOD: tl.constexpr, COUNT: tl.constexpr, ACC: tl.constexpr):
    """The normalised weights of up to 3 maps, scalars in ACC; 1 without weights."""
    if weight_ptr is None:
        return 1.0, 1.0, 1.0
    else:
        at = tl.arange(0, 4)
        weight = tl.load(weight_ptr + at, mask=at < COUNT, other=-float("inf")).to(ACC)  # [4]
        part, total = parts_of_shares(weight, METHOD, ACC)
        share = part / total
        return _element(share, at, 0), _element(share, at, 1), _element(share, at, 2)


@triton.jit
def parts_of_shares(weight, METHOD: tl.constexpr, ACC: tl.constexpr):
    """Of weights, -inf where there is none: what their shares are in proportion to, and what that is divided by."""
    if METHOD == "attn":
        part = tl.exp(weight - tl.max(weight, 0))
        total = tl.sum(part, 0)
    else:
        part = tl.where(weight < 0, 0.0, weight)
        total = tl.sum(part, 0) + tl.full((), _EPS, ACC)
    return part, total


@triton.jit
def _element(vector, at, PLACE: tl.constexpr):
    return tl.sum(tl.where(at == PLACE, vector, 0.0), 0)


def sources(
    x: Sequence[Tensor], resample: str, size: Sequence[int]
) -> tuple[tuple[Tensor, ...], tuple[tuple[int, ...], ...], tuple[str, ...], int]:
    """The maps in place or copied; sizes and strides in units (batch, row, column) of each, opaque; how each is
    resampled; and the unit.
    """
    maps = tuple(_gpu.channels_inner(level) for level in x)
    strides = [
        (level.stride(0) if level.shape[0] > 1 else 0, *level.stride()[2:]) for level in maps
    ]
    unit = _gpu.alignment(maps[0].shape[1], *itertools.chain(*strides))
    geometry = tuple(
        _gpu.opaque(*level.shape[2:], *(stride // unit for stride in steps))
        for level, steps in zip(maps, strides, strict=True)
    )
    names = tuple(
        _kind(how, tuple(level.shape[2:]), tuple(size))
        for how, level in zip(resample.split(","), maps, strict=True)
    )
    return maps, geometry, names, unit


def _kind(how: str, source: tuple[int, ...], size: tuple[int, ...]) -> str:
    """``how``, or the simplest resampling that does the same: "half" halves the coordinates."""
    if how != "nearest":
        return how
    if size == source:
        return "identity"
    return "half" if size == (2 * source[0], 2 * source[1]) else how
