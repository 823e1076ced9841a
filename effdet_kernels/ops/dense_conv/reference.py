"""The definition of right for ``dense_conv``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import conv_affine_act, widen
from effdet_kernels.ops._statistics import with_moments


def dense_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    statistics: bool = False,
) -> list[Tensor]:
    """``y = act(conv(x) * scale + shift)``; with ``statistics`` also its mean and variance."""
    left, right, top, bottom = padding
    if left == right == top == bottom:
        padded, own = widen(x), left
    else:
        padded, own = F.pad(widen(x), tuple(padding)), 0
    y = conv_affine_act(padded, weight, scale, shift, act, stride, own)
    return with_moments([y], x.dtype) if statistics else [y.to(x.dtype)]
