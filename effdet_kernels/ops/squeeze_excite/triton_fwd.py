"""Triton kernel of ``squeeze_excite``: a program per image and share of its channels, each with the whole reduction."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._tl import activate, number, sigmoid


@triton.jit
def load_weight(weight_ptr, row, rows, column, columns, ACC: tl.constexpr):
    """[ROWS, COLUMNS] of a dense weight [rows, columns], 0 outside."""
    mask = (row < rows)[:, None] & (column < columns)[None, :]
    at = row[:, None] * columns + column[None, :]
    return tl.load(weight_ptr + at, mask=mask, other=0.0).to(ACC)


@triton.jit
def load_vector(ptr, at, count, ACC: tl.constexpr):
    """A vector's values at ``at``, 0 from ``count`` on."""
    return tl.load(ptr + at, mask=at < count, other=0.0).to(ACC)


@triton.jit
def reduced(
    sums_ptr, weight_ptr, bias_ptr, channels, rows, share,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R]: the reduction of an image's means, before its activation; 0 beyond ``rows``.

    ``share`` is 1 / count as ``_gpu.bits``.
    """
    r = tl.arange(0, BLOCK_R)
    total = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight = load_weight(weight_ptr, r, rows, c, channels, ACC)
        total += weight * load_vector(sums_ptr, c, channels, ACC)[None, :]
    total = tl.sum(total, 1) * number(share, ACC) + load_vector(bias_ptr, r, rows, ACC)
    return tl.where(r < rows, total, 0.0)  # an infinity times the zeros beyond is NaN


@triton.jit
def gated(u, GATE: tl.constexpr):
    """The gate of u: a sigmoid, or its piecewise linear stand-in."""
    if GATE == "sigmoid":
        return sigmoid(u)
    return activate(u + 3.0, "relu6") * (1.0 / 6.0)


@triton.jit(do_not_specialize=["row_units", "share", "shares", "steps"])
def squeeze_excite_fwd_kernel(
    sums_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr, expand_bias_ptr, gates_ptr,
    channels, row_units, share, shares, steps,
    ROW_UNIT: tl.constexpr, ACC: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program: BLOCK_C * steps gates of an image; BLOCK_R holds all rows of the reduction."""
    program = tl.program_id(0)
    image = (program // shares).to(tl.int64)
    rows = row_units * ROW_UNIT
    hidden = reduced(
        sums_ptr + image * channels, reduce_ptr, reduce_bias_ptr, channels, rows, share, ACC, BLOCK_R, BLOCK_C
    )  # fmt: skip
    hidden = activate(hidden, ACT)
    r = tl.arange(0, BLOCK_R)
    for step in range(steps):
        c = (program % shares * steps + step) * BLOCK_C + tl.arange(0, BLOCK_C)
        weight = load_weight(expand_ptr, c, channels, r, rows, ACC)  # [BLOCK_C, BLOCK_R]
        u = tl.sum(weight * hidden[None, :], 1) + load_vector(expand_bias_ptr, c, channels, ACC)
        tl.store(gates_ptr + image * channels + c, gated(u, GATE), mask=c < channels)


def tiling(kernel: str, sums: Tensor, reduce_weight: Tensor) -> dict[str, Any]:
    """Options of a kernel that takes all rows and some channels at once, a power of 2 of weights in all."""
    rows, channels = reduce_weight.shape[:2]
    options = _triton.config("squeeze_excite", kernel, sums, rows * channels)
    options["BLOCK_R"] = triton.next_power_of_2(rows)
    most = max(1, options.pop("TILE") // options["BLOCK_R"])
    options["BLOCK_C"] = min(most, triton.next_power_of_2(channels))
    return options


def run(
    sums: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    count: int,
    act: str,
    gate: str,
) -> Tensor:
    """Gates [B, C]."""
    batch, channels = sums.shape
    parameters = reduce_weight, reduce_bias, expand_weight, expand_bias
    (gates,) = _gpu.allocate([TensorSpec((batch, channels), sums.dtype, sums.device)])
    options = tiling("fwd", sums, reduce_weight)
    blocks = triton.cdiv(channels, options["BLOCK_C"])
    most = max(1, _gpu.MULTIPROCESSORS // max(1, batch))  # few images are shared out
    steps = triton.cdiv(blocks, most)
    shares = triton.cdiv(blocks, steps)
    unit = _gpu.alignment(len(reduce_weight))
    _triton.launch(
        squeeze_excite_fwd_kernel,
        batch * shares,
        sums.contiguous(), *map(_gpu.dense, parameters), gates,
        channels, len(reduce_weight) // unit, _gpu.bits(1 / count), shares, steps,
        ROW_UNIT=unit, ACC=_gpu.accumulator(sums.dtype), ACT=act, GATE=gate, **options,
        trips=(blocks, steps),
    )  # fmt: skip
    return gates
