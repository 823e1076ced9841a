"""Launcher of the CUDA kernel of ``depthwise_conv``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library, _native
from effdet_kernels.ops import _arguments, _walk

# Output columns of a block, by bytes of an element and stride; csrc/depthwise_conv/cuda.cu has the same.
_TILE = {(2, 1): 32, (2, 2): 16, (4, 1): 64, (4, 2): 32}
_CHANNELS = {3: 64, 5: 32}  # at most, of a block of 16-bit numbers, by the kernel's side
_MOST_ROWS = 64


def refusal(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
    statistics: bool = False,
) -> str | None:
    """Why the kernel does not take a call, or None."""
    if weight.shape[2] not in (3, 5):
        return f"weight: has a side of {weight.shape[2]}, takes 3 or 5"
    if stride not in (1, 2):
        return f"stride: got {stride}, takes 1 or 2"
    if statistics:
        return "statistics: got True, takes False"
    return _cuda.refused_map("x", x)


def run(*args: Any) -> list[Tensor]:
    """y [B, C, H', W'], and with ``squeeze`` its sums [B, C] in float32."""
    y, parts = run_to_parts(*args)
    return [y] if parts is None else [y, parts.sum(1)]


def run_to_parts(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
    statistics: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y, and with ``squeeze`` what its blocks have of the sums, float32 [B, blocks of an image, C]."""
    batch, channels = x.shape[:2]
    k = weight.shape[2]
    height, width = _arguments.convolved_size("depthwise_conv", x, k, stride, padding)
    y = _library.nchw((batch, channels, height, width), x).empty()
    if batch == 0:
        return y, y.new_zeros(0, 1, channels, dtype=torch.float32) if squeeze else None
    tiles = -(-width // _TILE[x.element_size(), stride])
    others = batch * tiles * -(-channels // _CHANNELS[k])
    segments = _walk.segments(height, _MOST_ROWS, max(1, others), 3, 8)
    rows = -(-height // segments)
    segments = -(-height // rows)
    sums = None
    if squeeze:
        parts = segments * tiles
        sums = torch.empty(batch, parts, channels, dtype=torch.float32, device=x.device)
    left, _, top, _ = padding
    _cuda.launch(
        "depthwise_conv",
        x,
        dtype=_cuda.DTYPE_CODES[x.dtype],
        batch=batch,
        channels=channels,
        out_height=height,
        out_width=width,
        kernel=k,
        stride=stride,
        left=left,
        top=top,
        act=_native.ACTIVATIONS.index(act),
        rows=rows,
        x=_cuda.map_fields(x),
        weight=weight.contiguous(),
        scale=_cuda.dense(scale),
        shift=_cuda.dense(shift),
        y=y,
        sums=sums,
    )
    return y, sums
