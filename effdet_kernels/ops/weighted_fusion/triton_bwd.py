"""Triton kernels of the backward of ``weighted_fusion``; the README has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._gradients import wanted
from effdet_kernels.ops._tl import revealed, slope
from effdet_kernels.ops.weighted_fusion.triton_fwd import tile_of, tiling
from effdet_kernels.ops.weighted_fusion.triton_gather import gather
from effdet_kernels.ops.weighted_fusion.triton_load import (
    fusion_shares,
    parts_of_shares,
    resampled,
    sources,
)


@triton.jit
def _won(x_ptr, top, left, channel, inside, height, width, stride_h, stride_w, ACC: tl.constexpr):
    """Of the 3x3 pixels from (top, left) on: the maximum, or NaN, and its place, 0 to 8; the first of equal ones."""
    best = tl.full(inside.shape, -float("inf"), ACC)
    winner = tl.maximum(-top, 0) * 3 + tl.maximum(-left, 0) + tl.zeros(inside.shape, tl.int32)
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            row, column = top + i, left + j
            exists = (row >= 0) & (row < height) & (column >= 0) & (column < width)
            at = row * stride_h + column * stride_w + channel
            x = tl.load(x_ptr + at, mask=inside & exists, other=-float("inf")).to(ACC)
            better = (x > best) | (x != x)
            best = tl.where(better, x, best)
            winner = tl.where(better, i * 3 + j, winner)
    return tl.where(inside, best, 0.0), winner


@triton.jit
def weighted_fusion_bwd_kernel(
    grad_ptr, weight_ptr, delta_ptr, parts_ptr, x, dx, winners, geometry,
    height, width, channel_units, blocks, pool_left, pool_top,
    UNIT: tl.constexpr, ACC: tl.constexpr, METHOD: tl.constexpr, RESAMPLE: tl.constexpr,
    ACT: tl.constexpr, CHILDREN: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """All that one look at pixels of the result gives, for CHILDREN x CHILDREN of them at BLOCK_H x BLOCK_W places.

    The gradient delta before the activation, the places of windows' maxima, a row of sums of delta * r_i(x_i), the
    gradients of maps of the result's size and, with 2 x 2 children, of half its size. A pointer is None where its
    tensor is not needed. Counts in units: ``_gpu.alignment``.
    """
    MAPS: tl.constexpr = len(RESAMPLE)
    channels = channel_units * UNIT
    image, top, left, channel = tile_of(
        tl.program_id(0), height // CHILDREN, width // CHILDREN, blocks, BLOCK_H, BLOCK_W, BLOCK_C
    )
    shares = fusion_shares(weight_ptr, METHOD, MAPS, ACC)
    total = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), ACC)
    sums = (total,) * MAPS
    first = image * height * width * channels
    for child in tl.static_range(CHILDREN * CHILDREN):
        row, column = top * CHILDREN + child // CHILDREN, left * CHILDREN + child % CHILDREN
        inside = (row < height) & (column < width) & (channel < channels)
        at = first + (row * width + column) * channels + channel
        delta = tl.load(grad_ptr + at, mask=inside, other=0.0).to(ACC)
        values = ()
        fused = tl.zeros((BLOCK_H * BLOCK_W, BLOCK_C), ACC)
        for i in tl.static_range(MAPS):
            x_height, x_width, stride_b, stride_h, stride_w = geometry[i]
            x_height, x_width = revealed(x_height), revealed(x_width)
            x_ptr = x[i] + image * (revealed(stride_b) * UNIT)
            stride_h, stride_w = revealed(stride_h) * UNIT, revealed(stride_w) * UNIT
            value = fused
            if winners[i] is not None:
                value, winner = _won(
                    x_ptr, 2 * row - pool_top, 2 * column - pool_left, channel, inside,
                    x_height, x_width, stride_h, stride_w, ACC,
                )  # fmt: skip
                tl.store(winners[i] + at, winner.to(tl.int8), mask=inside)
            elif ACT != "none" or parts_ptr is not None:
                value = resampled(
                    x_ptr, row, column, channel, inside, height, width, pool_left, pool_top,
                    x_height, x_width, stride_h, stride_w, tl.constexpr(RESAMPLE[i]), ACC,
                )  # fmt: skip
            values += (value,)
            fused += value * shares[i]
        if ACT != "none":
            delta *= slope(fused, ACT)
        if delta_ptr is not None:
            tl.store(delta_ptr + at, delta, mask=inside)
        total += delta
        added = ()
        for i in tl.static_range(MAPS):
            added += (sums[i] + delta * values[i],)
            if RESAMPLE[i] == "identity" and dx[i] is not None:
                tl.store(dx[i] + at, (delta * shares[i]).to(dx[i].dtype.element_ty), mask=inside)
        sums = added
    for i in tl.static_range(MAPS):
        if RESAMPLE[i] == "half" and dx[i] is not None:
            inside = (top < height // 2) & (left < width // 2) & (channel < channels)
            at = (image * (height // 2) + top) * (width // 2) + left
            half = (total * shares[i]).to(dx[i].dtype.element_ty)
            tl.store(dx[i] + at * channels + channel, half, mask=inside)
        if parts_ptr is not None:
            part = parts_ptr + tl.program_id(0).to(tl.int64) * MAPS + i
            tl.store(part, tl.sum(tl.sum(sums[i], 1), 0))


@triton.jit
def weighted_fusion_bwd_weight_kernel(
    of_shares_ptr, weight_ptr, of_weight_ptr,
    METHOD: tl.constexpr, MAPS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradient of the weights from that of the shares; one program."""
    i = tl.arange(0, 4)
    of_share = tl.load(of_shares_ptr + i, mask=i < MAPS, other=0.0)
    weight = tl.load(weight_ptr + i, mask=i < MAPS, other=-float("inf")).to(ACC)
    part, total = parts_of_shares(weight, METHOD, ACC)
    share = part / total
    factor = share if METHOD == "attn" else tl.where(weight > 0, 1.0, 0.0).to(ACC) / total
    of_weight = factor * (of_share - tl.sum(of_share * share, 0))
    tl.store(of_weight_ptr + i, of_weight, mask=i < MAPS)


def gradients(
    grad: Tensor,
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: str,
    pool_padding: Sequence[int],
    of_x: Sequence[bool],
    of_weight: bool = True,
    act: str = "none",
) -> tuple[list[Tensor | None], Tensor | None]:
    """Of a fusion, given that of its result: the gradients of x, where wanted, and of weight."""
    grad = grad.contiguous(memory_format=torch.channels_last)
    batch, channels, height, width = grad.shape
    maps, geometry, names, unit = sources(x, resample, (height, width))
    found = _gpu.allocate(
        [_library.nchw(m.shape, m) for m, need in zip(maps, of_x, strict=True) if need]
    )
    taken = iter(found)
    dx = [next(taken) if need else None for need in of_x]
    winners = [
        torch.empty(batch, height, width, channels, dtype=torch.int8, device=grad.device)
        if name == "max" and d is not None
        else None
        for name, d in zip(names, dx, strict=True)
    ]
    common = {"UNIT": unit, "ACC": _gpu.accumulator(grad.dtype), "METHOD": method}
    children = 2 if "half" in names else 1
    kernel = "bwd" if children == 1 else "bwd_half"
    options, programs, blocks = tiling(kernel, grad, height // children, width // children)
    direct = tuple(
        d if name in ("identity", "half") else None for d, name in zip(dx, names, strict=True)
    )
    later = [i for i, d in enumerate(dx) if d is not direct[i]]
    wide = accumulation_dtype(grad.dtype)
    delta = torch.empty_like(grad, dtype=wide) if later and act != "none" else None
    parts = None
    if weight is not None and of_weight:
        parts = torch.empty(programs, len(x), dtype=wide, device=grad.device)
    weight = _gpu.dense(weight)
    _triton.launch(
        weighted_fusion_bwd_kernel,
        programs,
        grad, weight, delta, parts, maps, direct, tuple(winners), geometry,
        height, width, channels // unit, blocks, pool_padding[0], pool_padding[2],
        RESAMPLE=names, ACT=act, CHILDREN=children, **common, **options,
    )  # fmt: skip
    before = grad if delta is None else delta
    for i in later:
        shape = height, width, *maps[i].shape[2:]
        gather(before, weight, dx[i], winners[i], shape, i, names, pool_padding, common)
    return dx, None if parts is None else _weight_gradient(_gpu.total(parts), weight, method)


def _weight_gradient(of_shares: Tensor, weight: Tensor, method: str) -> Tensor:
    of_weight = torch.empty_like(of_shares)
    _triton.launch(
        weighted_fusion_bwd_weight_kernel,
        1,
        of_shares, weight, of_weight,
        METHOD=method, MAPS=len(weight), ACC=_gpu.accumulator(of_shares.dtype), num_warps=1,
    )  # fmt: skip
    return of_weight


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of the maps and of weight."""
    x, weight, method, resample, _, pool_padding, act, needs = rest
    of_x, of_weight = wanted((x, weight), needs)
    dx, d_weight = gradients(
        grads[0], x, weight, method, resample, pool_padding, of_x, of_weight, act
    )
    return [g for g in (*dx, d_weight) if g is not None]
