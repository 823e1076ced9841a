"""Plain-torch `pointwise_conv`: the definition of right."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from .._activations import affine_act


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    gate: Tensor | None = None,
    residual: Tensor | None = None,
    act: str = "none",
) -> Tensor:
    """`y = act(conv(x * gate) * scale + shift) + residual`."""
    gated = x if gate is None else x * gate.to(x.dtype)[:, :, None, None]
    y = affine_act(F.conv2d(gated, weight), scale, shift, act)
    if residual is not None:
        y = y + residual
    return y.to(x.dtype)
