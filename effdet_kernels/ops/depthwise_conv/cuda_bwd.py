"""Launcher of the CUDA kernel for the gradients of ``depthwise_conv``: x and weight in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library
from effdet_kernels.ops import _walk
from effdet_kernels.ops._gradients import chosen, wanted
from effdet_kernels.ops.depthwise_conv import cuda

_TILE = 32  # columns of x of a block; csrc/depthwise_conv/cuda_bwd.cu has the same
_CHANNELS = 32  # at most, of a block
_MOST_ROWS = 64
_PROGRAMS = (
    2048  # beyond so many a block takes several images: each has sums of its own for the weight
)


def refusal(grads: Sequence[Tensor | None], *rest) -> str | None:
    """Why the kernel does not take a call, or None."""
    x, weight, scale, shift, stride, padding, act, squeeze, _, _ = rest
    for name, value in (("scale", scale), ("shift", shift)):
        if value is not None:
            return f"{name}: got a tensor, takes None"
    if act != "none":
        return f"act: got {act!r}, takes 'none'"
    if squeeze:
        return "squeeze: got True, takes False"
    if min(padding) < 0:
        return f"padding: got {tuple(padding)}, takes no number below 0"
    if grads[0] is None or not x.numel():
        return "grads: takes a gradient of y, and images"
    refused = cuda.refusal(x, weight, scale, shift, stride, padding, act, squeeze)
    return refused or _cuda.refused_map("grads", grads[0])


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of x and weight; calls with scale or shift are refused."""
    x, weight, scale, shift, stride, padding, _, _, _, needs = rest
    of_x, of_weight, *others = wanted((x, weight, scale, shift), needs)
    batch, channels, height, width = x.shape
    k = weight.shape[2]
    left, _, top, _ = padding
    rows, tiles = height + top % stride, -(-(width + left % stride) // _TILE)
    blocks = -(-channels // _CHANNELS)
    segments = _walk.segments(rows, _MOST_ROWS, batch * tiles * blocks, 3, 4)
    each = -(-rows // segments)
    each += each % stride
    segments = -(-rows // each)
    groups = max(1, min(batch, _PROGRAMS // (segments * tiles * blocks)))
    dx = parts = None
    if of_x:
        dx = _library.nchw(x.shape, x).empty()
    if of_weight:
        shape = groups * segments * tiles, channels, k * k
        parts = torch.empty(shape, dtype=torch.float32, device=x.device)
    _cuda.launch(
        "depthwise_conv_gradient",
        x,
        dtype=_cuda.DTYPE_CODES[x.dtype],
        batch=batch,
        channels=channels,
        kernel=k,
        stride=stride,
        left=left,
        top=top,
        rows=each,
        groups=groups,
        grad=_cuda.map_fields(grads[0]),
        x=_cuda.map_fields(x),
        weight=weight.contiguous(),
        dx=dx,
        dweight=parts,
    )
    dweight = None if parts is None else parts.sum(0).view(channels, 1, k, k)
    return chosen((dx, dweight, None, None), (of_x, of_weight, *others))
