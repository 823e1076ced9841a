"""Triton kernels of the backward of ``batch_norm_act``; the README has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _library, _triton
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._gradients import chosen
from effdet_kernels.ops._tl import slope
from effdet_kernels.ops.batch_norm_act.triton_fwd import (
    inverse_deviation,
    strides,
    tile_of,
    tiling,
)


@triton.jit
def _vectors(mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, inside, eps):
    """Of channels ``c``, all [1, BLOCK_C]: mean, 1 / sqrt(variance + eps), weight, bias."""
    mean = tl.load(mean_ptr + c, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + c, mask=inside, other=0.0)
    bias = tl.load(bias_ptr + c, mask=inside, other=0.0)
    rate = inverse_deviation(variance_ptr, c, inside, eps)
    return mean[None, :], rate[None, :], weight[None, :], bias[None, :]


@triton.jit
def _normalised(x, grad, mean, rate, weight, bias, ACT: tl.constexpr):
    """x-hat, and the gradient of x-hat * weight + bias, of x and grad [BLOCK_M, BLOCK_C]."""
    normal = (x - mean) * rate
    if ACT != "none":
        grad *= slope(normal * weight + bias, ACT)
    return normal, grad


@triton.jit
def batch_norm_act_bwd_sums_kernel(
    x_ptr, grad_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sums_ptr,
    eps, pixels, channel_units, tiles, blocks, rows,
    stride_xb, stride_xp_units, stride_gb, stride_gp_units,
    UNIT: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Sums of delta * x-hat and of delta over ``rows`` pixels. Counts in units: ``_gpu.alignment``."""
    channels, stride_xp, stride_gp = (
        channel_units * UNIT,
        stride_xp_units * UNIT,
        stride_gp_units * UNIT,
    )
    tile, image, first, rows, c, c_inside = tile_of(
        tl.program_id(0), pixels, channels, tiles, blocks, rows, BLOCK_C
    )
    mean, rate, weight, bias = _vectors(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, c_inside, eps
    )
    x_ptr += image * stride_xb + first * stride_xp
    grad_ptr += image * stride_gb + first * stride_gp
    along = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    total = tl.zeros((BLOCK_M, BLOCK_C), ACC)
    for start in range(0, rows, BLOCK_M):
        row = (start + tl.arange(0, BLOCK_M))[:, None]
        inside = (row < rows) & c_inside[None, :]
        x = tl.load(x_ptr + row * stride_xp + c[None, :], mask=inside, other=0.0).to(ACC)
        grad = tl.load(grad_ptr + row * stride_gp + c[None, :], mask=inside, other=0.0).to(ACC)
        normal, delta = _normalised(x, grad, mean, rate, weight, bias, ACT)
        along += delta * normal
        total += delta
    sums_ptr += tile * 2 * channels + c
    tl.store(sums_ptr, tl.sum(along, 0), mask=c_inside)
    tl.store(sums_ptr + channels, tl.sum(total, 0), mask=c_inside)


@triton.jit
def batch_norm_act_bwd_dx_kernel(
    x_ptr, grad_ptr, mean_ptr, variance_ptr, weight_ptr, bias_ptr, sums_ptr, dx_ptr,
    eps, count, pixels, channel_units, tiles, blocks, rows,
    stride_xb, stride_xp_units, stride_gb, stride_gp_units,
    UNIT: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dx of a tile. From the last to the first: the last that the sums read may still be in the cache."""
    channels, stride_xp, stride_gp = (
        channel_units * UNIT,
        stride_xp_units * UNIT,
        stride_gp_units * UNIT,
    )
    _, image, first, rows, c, c_inside = tile_of(
        tl.num_programs(0) - 1 - tl.program_id(0), pixels, channels, tiles, blocks, rows, BLOCK_C
    )
    mean, rate, weight, bias = _vectors(
        mean_ptr, variance_ptr, weight_ptr, bias_ptr, c, c_inside, eps
    )
    row = tl.arange(0, BLOCK_M)[:, None]
    inside = (row < rows) & c_inside[None, :]
    x_ptr += image * stride_xb + first * stride_xp
    x = tl.load(x_ptr + row * stride_xp + c[None, :], mask=inside, other=0.0).to(ACC)
    grad_ptr += image * stride_gb + first * stride_gp
    grad = tl.load(grad_ptr + row * stride_gp + c[None, :], mask=inside, other=0.0).to(ACC)
    normal, delta = _normalised(x, grad, mean, rate, weight, bias, ACT)
    along = tl.load(sums_ptr + c, mask=c_inside, other=0.0) / count
    total = tl.load(sums_ptr + channels + c, mask=c_inside, other=0.0) / count
    dx = (delta - total[None, :] - normal * along[None, :]) * (rate * weight)
    dx_ptr += (image * pixels + first) * channels
    at = row * channels + c[None, :]
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def sums(grad: Tensor, x: Tensor, vectors: Sequence[Tensor], eps: float, act: str) -> Tensor:
    """[2, C]: the sums of delta * x-hat and of delta over all pixels.

    Maps as ``_gpu.pixels_inner`` gives them; ``vectors``: mean, variance, weight and bias, dense.
    """
    channels = x.shape[1]
    options, programs, counts = tiling("bwd_sums", x, grad, looped=True)
    unit, tiles = options["UNIT"], programs // counts[3]
    parts = torch.empty(tiles, 2, channels, dtype=accumulation_dtype(x.dtype), device=x.device)
    _triton.launch(
        batch_norm_act_bwd_sums_kernel,
        programs,
        x, grad, *vectors, parts, _gpu.bits(eps), *counts, *strides(x, unit), *strides(grad, unit),
        ACT=act, **options, trips=(counts[4] // options["BLOCK_M"],),
    )  # fmt: skip
    return _gpu.total(parts)


def input_gradient(
    grad: Tensor,
    x: Tensor,
    vectors: Sequence[Tensor],
    eps: float,
    act: str,
    sums: Tensor,
    count: int,
) -> Tensor:
    """The gradient of x from ``sums`` over ``count`` values; the rest as ``sums`` takes it."""
    (dx,) = _gpu.allocate([_library.nchw(x.shape, x)])
    options, programs, counts = tiling("bwd_dx", x, grad, looped=False)
    unit = options["UNIT"]
    _triton.launch(
        batch_norm_act_bwd_dx_kernel,
        programs,
        x, grad, *vectors, sums, dx, _gpu.bits(eps), count, *counts,
        *strides(x, unit), *strides(grad, unit), ACT=act, **options,
    )  # fmt: skip
    return dx


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of x [B, C, H, W], weight [C] and bias [C]."""
    x, weight, bias, eps, act, *given, saved, needs = rest
    x, grad = _gpu.pixels_inner(x), _gpu.pixels_inner(grads[0])
    vectors = [v.contiguous() for v in (*(saved or given), weight, bias)]
    found = sums(grad, x, vectors, eps, act)
    dx = None
    if needs[0]:
        count = x.numel() // x.shape[1]
        dx = input_gradient(grad, x, vectors, eps, act, found, count)
    return chosen((dx, found[0], found[1]), needs)


def half(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    act: str,
    averages: Tensor | None,
) -> Tensor:
    """``batch_norm_grad``."""
    x, grad = _gpu.pixels_inner(x), _gpu.pixels_inner(grad)
    vectors = [v.contiguous() for v in (mean, variance, weight, bias)]
    if averages is None:
        return sums(grad, x, vectors, eps, act)
    return input_gradient(grad, x, vectors, eps, act, averages.contiguous(), 1)
