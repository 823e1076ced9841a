"""Plain-torch `depthwise_conv`: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from .._activations import affine_act


def depthwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
    squeeze: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`y = act(conv(x) * scale + shift)`, and with `squeeze` also the sums of `y` over H and W."""
    padded = F.pad(x, tuple(padding))
    conv = F.conv2d(padded, weight, stride=stride, groups=x.shape[1])
    y = affine_act(conv, scale, shift, act)
    return (y.to(x.dtype), y.sum((2, 3))) if squeeze else y.to(x.dtype)
