"""Triton kernels of the backward of ``squeeze_excite``; the README has the formulas."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from effdet_kernels import _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _gpu
from effdet_kernels.ops._gradients import chosen
from effdet_kernels.ops._tl import activate, number, sigmoid, slope
from effdet_kernels.ops.squeeze_excite.triton_fwd import (
    load_vector,
    load_weight,
    reduced,
    tiling,
)


@triton.jit
def _gate_slope(u, GATE: tl.constexpr):
    if GATE == "sigmoid":
        s = sigmoid(u)
        return s * (1.0 - s)
    return slope(u + 3.0, "relu6") * (1.0 / 6.0)


@triton.jit(do_not_specialize=["share"])
def squeeze_excite_bwd_kernel(
    sums_ptr, reduce_ptr, reduce_bias_ptr, expand_ptr, expand_bias_ptr, grad_ptr,
    hidden_ptr, of_reduced_ptr, of_expanded_ptr, of_sums_ptr,
    channels, rows, share,
    ACC: tl.constexpr, ACT: tl.constexpr, GATE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """A program: of an image, the hidden values, the gradients before both activations, and that of the sums."""
    image = tl.program_id(0).to(tl.int64)
    r = tl.arange(0, BLOCK_R)
    t = reduced(
        sums_ptr + image * channels, reduce_ptr, reduce_bias_ptr, channels, rows, share, ACC, BLOCK_R, BLOCK_C
    )  # fmt: skip
    hidden = activate(t, ACT)
    tl.store(hidden_ptr + image * rows + r, hidden, mask=r < rows)
    total = tl.zeros((BLOCK_C, BLOCK_R), ACC)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight = load_weight(expand_ptr, c, channels, r, rows, ACC)  # [BLOCK_C, BLOCK_R]
        u = tl.sum(weight * hidden[None, :], 1) + load_vector(expand_bias_ptr, c, channels, ACC)
        grad = load_vector(grad_ptr + image * channels, c, channels, ACC)
        of_expanded = grad * _gate_slope(u, GATE)
        tl.store(of_expanded_ptr + image * channels + c, of_expanded, mask=c < channels)
        total += weight * of_expanded[:, None]
    of_reduced = tl.where(r < rows, tl.sum(total, 0) * slope(t, ACT), 0.0)
    tl.store(of_reduced_ptr + image * rows + r, of_reduced, mask=r < rows)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C)
        weight = load_weight(reduce_ptr, r, rows, c, channels, ACC)  # [BLOCK_R, BLOCK_C]
        of_sums = tl.sum(weight * of_reduced[:, None], 0) * number(share, ACC)
        tl.store(of_sums_ptr + image * channels + c, of_sums, mask=c < channels)


@triton.jit(do_not_specialize=["batch", "share"])
def squeeze_excite_bwd_weight_kernel(
    sums_ptr, hidden_ptr, of_reduced_ptr, of_expanded_ptr,
    of_reduce_ptr, of_reduce_bias_ptr, of_expand_ptr, of_expand_bias_ptr,
    batch, channels, rows, blocks, share,
    ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """A program: the gradients of BLOCK_R by BLOCK_C weights of both products, all images; some add up biases."""
    program = tl.program_id(0)
    r = (program // blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
    c = (program % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    of_reduce = tl.zeros((BLOCK_R, BLOCK_C), ACC)
    of_expand = tl.zeros((BLOCK_C, BLOCK_R), ACC)
    of_reduce_bias = tl.zeros((BLOCK_B, BLOCK_R), ACC)
    of_expand_bias = tl.zeros((BLOCK_B, BLOCK_C), ACC)
    for first in range(0, batch, BLOCK_B):
        image = first + tl.arange(0, BLOCK_B)
        sums = load_weight(sums_ptr, image, batch, c, channels, ACC)  # [BLOCK_B, BLOCK_C]
        hidden = load_weight(hidden_ptr, image, batch, r, rows, ACC)  # [BLOCK_B, BLOCK_R]
        of_reduced = load_weight(of_reduced_ptr, image, batch, r, rows, ACC)
        of_expanded = load_weight(of_expanded_ptr, image, batch, c, channels, ACC)
        of_reduce = tl.dot(
            tl.trans(of_reduced), sums, acc=of_reduce, input_precision="ieee", out_dtype=ACC
        )
        of_expand = tl.dot(
            tl.trans(of_expanded), hidden, acc=of_expand, input_precision="ieee", out_dtype=ACC
        )
        of_reduce_bias += of_reduced
        of_expand_bias += of_expanded
    mask = (r < rows)[:, None] & (c < channels)[None, :]
    tl.store(
        of_reduce_ptr + r[:, None] * channels + c[None, :],
        of_reduce * number(share, ACC),
        mask=mask,
    )
    mask = (c < channels)[:, None] & (r < rows)[None, :]
    tl.store(of_expand_ptr + c[:, None] * rows + r[None, :], of_expand, mask=mask)
    if program % blocks == 0:
        tl.store(of_reduce_bias_ptr + r, tl.sum(of_reduce_bias, 0), mask=r < rows)
    if program // blocks == 0:
        tl.store(of_expand_bias_ptr + c, tl.sum(of_expand_bias, 0), mask=c < channels)


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of sums [B, C] and of the weights and biases."""
    sums, *parameters, count, act, gate, needs = rest
    (batch, channels), rows = sums.shape, len(parameters[0])
    sums = sums.contiguous()
    shapes = [(batch, channels), *(p.shape for p in parameters)]
    found = _gpu.allocate([TensorSpec(tuple(s), sums.dtype, sums.device) for s in shapes])
    hidden, of_reduced = (sums.new_empty(batch, rows) for _ in range(2))
    of_expanded = torch.empty_like(sums)
    accumulator = _gpu.accumulator(sums.dtype)
    options = tiling("bwd", sums, parameters[0])
    steps = triton.cdiv(channels, options["BLOCK_C"])
    share = _gpu.bits(1 / count)
    _triton.launch(
        squeeze_excite_bwd_kernel,
        batch,
        sums, *map(_gpu.dense, parameters), grads[0].contiguous(),
        hidden, of_reduced, of_expanded, found[0],
        channels, rows, share,
        ACC=accumulator, ACT=act, GATE=gate, **options,
        trips=(steps, steps, steps),
    )  # fmt: skip
    if any(needs[1:]):
        options = _triton.config("squeeze_excite", "bwd_weight", sums)
        blocks = triton.cdiv(channels, options["BLOCK_C"])
        _triton.launch(
            squeeze_excite_bwd_weight_kernel,
            triton.cdiv(rows, options["BLOCK_R"]) * blocks,
            sums, hidden, of_reduced, of_expanded, *found[1:],
            batch, channels, rows, blocks, share,
            ACC=accumulator, **options,
            trips=(triton.cdiv(batch, options["BLOCK_B"]),),
        )  # fmt: skip
    return chosen(found, needs)
