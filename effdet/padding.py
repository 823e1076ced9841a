"""The two padding rules of the models, resolved to four explicit integers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

Size = tuple[int, int]
Padding = tuple[int, int, int, int]


def pair(values: Sequence[int]) -> Size:
    """Two values as a `Size`: torch declares those of a convolution as tuples of any length."""
    return values[0], values[1]


def spatial_size(x: Tensor) -> Size:
    """(H, W) of a map [..., H, W]: plain numbers under torch.jit.trace too, where sizes are tensors."""
    height, width = x.shape[-2:]
    return (int(height), int(width)) if torch.jit.is_tracing() else (height, width)


def halved(size: int) -> int:
    """``size`` / 2, rounded up."""
    return size // 2 + size % 2


def same_padding(size: Size, kernel: Size, stride: Size, dilation: Size = (1, 1)) -> Padding:
    """TensorFlow's "same": the output is ceil(size / stride), odd padding goes right and below.

    All pairs are (vertical, horizontal); returns (left, right, top, bottom).
    """
    top, bottom = _same(size[0], kernel[0], stride[0], dilation[0])
    left, right = _same(size[1], kernel[1], stride[1], dilation[1])
    return left, right, top, bottom


def _same(size: int, kernel: int, stride: int, dilation: int) -> Size:
    # By the remainder, which an export of any size that is a multiple of the stride knows to be 0.
    last = size % stride or stride
    total = max((kernel - 1) * dilation + 1 - last, 0)
    return total // 2, total - total // 2


def symmetric_padding(kernel: Size, stride: Size, dilation: Size = (1, 1)) -> Padding:
    """PyTorch's usual padding, the same on both sides whatever the input; order as above."""
    vertical, horizontal = (
        ((s - 1) + d * (k - 1)) // 2 for k, s, d in zip(kernel, stride, dilation, strict=True)
    )
    return horizontal, horizontal, vertical, vertical


def resolve_padding(
    pad_type: str | None, size: Size, kernel: Size, stride: Size, dilation: Size = (1, 1)
) -> Padding:
    """(left, right, top, bottom) for `pad_type` "same" or "" (symmetric).

    Raises:
        ValueError: any other `pad_type`.
    """
    kind = (pad_type or "").lower()
    if kind == "same":
        return same_padding(size, kernel, stride, dilation)
    if kind == "":
        return symmetric_padding(kernel, stride, dilation)
    raise ValueError(f"pad_type: got {pad_type!r}, expected 'same' or ''")


def conv_padding(x: Tensor, conv: nn.Conv2d, pad_type: str | None) -> Padding:
    """`resolve_padding` for what `conv` reads, the map x [B, C, H, W]."""
    kernel, stride, dilation = pair(conv.kernel_size), pair(conv.stride), pair(conv.dilation)
    return resolve_padding(pad_type, spatial_size(x), kernel, stride, dilation)
