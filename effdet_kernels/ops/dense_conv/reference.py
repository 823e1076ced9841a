"""The definition of right for ``dense_conv``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import conv_affine_act, widen


def dense_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
) -> Tensor:
    """``y = act(conv(x) * scale + shift)``."""
    left, right, top, bottom = padding
    if left == right == top == bottom:
        padded, own = widen(x), left
    else:
        padded, own = F.pad(widen(x), tuple(padding)), 0
    return conv_affine_act(padded, weight, scale, shift, act, stride, own).to(x.dtype)
