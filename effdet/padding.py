"""The two padding rules of the models, resolved to four explicit integers."""

from __future__ import annotations

import torch
from torch import Tensor

Size = tuple[int, ...]  # (vertical, horizontal), such as (H, W)


def spatial_size(x: Tensor) -> Size:
    """(H, W) of a map [..., H, W]: plain numbers under torch.jit.trace too, where sizes are tensors."""
    height, width = x.shape[-2:]
    return (int(height), int(width)) if torch.jit.is_tracing() else (height, width)


def same_padding(
    size: Size, kernel: Size, stride: Size, dilation: Size = (1, 1)
) -> tuple[int, ...]:
    """TensorFlow's "same": the output is ceil(size / stride), odd padding goes right and below.

    All pairs are (vertical, horizontal); returns (left, right, top, bottom).
    """
    top, bottom = _same(size[0], kernel[0], stride[0], dilation[0])
    left, right = _same(size[1], kernel[1], stride[1], dilation[1])
    return left, right, top, bottom


def _same(size: int, kernel: int, stride: int, dilation: int) -> tuple[int, int]:
    total = max((-(-size // stride) - 1) * stride + (kernel - 1) * dilation + 1 - size, 0)
    return total // 2, total - total // 2


def symmetric_padding(kernel: Size, stride: Size, dilation: Size = (1, 1)) -> tuple[int, ...]:
    """PyTorch's usual padding, the same on both sides whatever the input; order as above."""
    vertical, horizontal = (
        ((s - 1) + d * (k - 1)) // 2 for k, s, d in zip(kernel, stride, dilation, strict=True)
    )
    return horizontal, horizontal, vertical, vertical


def resolve_padding(
    pad_type: str | None, size: Size, kernel: Size, stride: Size, dilation: Size = (1, 1)
) -> tuple[int, ...]:
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
