"""Launcher of the CUDA kernel of ``expand_depthwise``; what it does not take goes through those of two convolutions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native
from effdet_kernels.ops import _arguments, _walk
from effdet_kernels.ops.depthwise_conv import cuda as depthwise
from effdet_kernels.ops.pointwise_conv import cuda as pointwise

# Of csrc/depthwise_conv/matrix.h, by the kernel's side and the stride.
_COLUMNS = {1: 32, 2: 16}  # of the output, of a block
_CHANNELS = {3: 64, 5: 32}  # at most, of a block
_PIXELS = {(3, 1): 112, (3, 2): 144, (5, 1): 192, (5, 2): 224}  # of x, that are expanded at once
_MOST_ROWS = 64
_SHARED = 99 * 1024  # bytes that a block of every GPU from compute capability 8.0 on may have
# Channels of x from which on reading it for each block of channels costs more than storing the expanded map.
_MOST_CHANNELS = {3: 192, 5: 112}


def fuses(x: Tensor, dw_weight: Tensor, stride: int) -> bool:
    """Whether one kernel does all of a call that ``refusal`` has nothing against."""
    k, channels = dw_weight.shape[2], x.shape[1]
    if x.element_size() != 2 or channels > _MOST_CHANNELS[k]:
        return False
    pitch = -(-channels // 16) * 2 + 1  # of a pixel of x and of a row of the weights, in 16 bytes
    pixels, most = _PIXELS[k, stride], _CHANNELS[k]
    vectors = (pixels + most) * pitch + pixels * (most // 8 + 1)
    return 16 * vectors + 8 * most <= _SHARED


def refusal(
    x: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor,
    expand_shift: Tensor,
    dw_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
) -> str | None:
    """Why the kernels do not take a call, or None."""
    if dw_weight.shape[2] not in (3, 5):
        return f"dw_weight: has a side of {dw_weight.shape[2]}, takes 3 or 5"
    if stride not in (1, 2):
        return f"stride: got {stride}, takes 1 or 2"
    reason = pointwise.refusal(x, expand_weight, expand_scale, expand_shift, None, None, act)
    if reason is not None:
        return reason.replace("weight:", "expand_weight:", 1)
    expanded = expand_weight.shape[0]
    if (
        expanded * max(x.shape[2:].numel(), _out_pixels(x, dw_weight, stride, padding))
        > 2**31 - 2**17
    ):
        return f"x: has images of more than 2**31 elements when expanded to {expanded} channels"
    return None


def _out_pixels(x: Tensor, dw_weight: Tensor, stride: int, padding: Sequence[int]) -> int:
    height, width = _arguments.convolved_size(
        "expand_depthwise", x, dw_weight.shape[2], stride, padding
    )
    return height * width


def run(*args: Any) -> list[Tensor]:
    """y [B, E, H', W'], and with ``squeeze`` its sums [B, E] in float32."""
    y, parts = run_to_parts(*args)
    return [y] if parts is None else [y, parts.sum(1)]


def run_to_parts(
    x: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor,
    expand_shift: Tensor,
    dw_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and with ``squeeze`` what its blocks have of the sums, float32 [B, blocks of an image, E]."""
    last_act = "none" if scale is None and shift is None else act
    if x.shape[0] > 0 and not fuses(x, dw_weight, stride):
        (e,) = pointwise.run(x, expand_weight, expand_scale, expand_shift, None, None, act)
        return depthwise.run_to_parts(
            e, dw_weight, scale, shift, stride, padding, last_act, squeeze
        )
    batch, channels, k = x.shape[0], expand_weight.shape[0], dw_weight.shape[2]
    height, width = _arguments.convolved_size("expand_depthwise", x, k, stride, padding)
    y = _library.nchw((batch, channels, height, width), x).empty()
    tiles = -(-width // _COLUMNS[stride])
    others = batch * tiles * -(-channels // _CHANNELS[k])
    segments = _walk.segments(height, _MOST_ROWS, max(1, others), 2, 8)
    rows = -(-height // segments)
    sums = None
    if squeeze:
        parts = -(-height // rows) * tiles
        sums = torch.empty(batch, parts, channels, dtype=torch.float32, device=x.device)
    left, _, top, _ = padding
    if batch > 0:
        _cuda.launch(
            "expand_depthwise",
            x,
            dtype=_cuda.DTYPE_CODES[x.dtype],
            batch=batch,
            in_channels=x.shape[1],
            channels=channels,
            out_height=height,
            out_width=width,
            kernel=k,
            stride=stride,
            left=left,
            top=top,
            act=_native.ACTIVATIONS.index(act),
            last_act=_native.ACTIVATIONS.index(last_act),
            rows=rows,
            x=_cuda.map_fields(x),
            expand_weight=expand_weight.contiguous(),
            expand_scale=expand_scale.contiguous(),
            expand_shift=expand_shift.contiguous(),
            weight=dw_weight.contiguous(),
            scale=_cuda.dense(scale),
            shift=_cuda.dense(shift),
            y=y,
            sums=sums,
        )
    return y, sums
