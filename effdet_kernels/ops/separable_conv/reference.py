"""The definition of right for ``separable_conv``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, conv_affine_act, widen


def separable_conv(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_act: str,
    act: str,
) -> list[Tensor]:
    """``y = act(pointwise(depthwise(pre_act(x))) * scale + shift)`` for every map of every net."""
    nets = len(dw_weight)
    outputs = len(scale) or len(shift) or len(x)
    levels = outputs // nets
    y = []
    for i in range(outputs):
        source = x[i % len(x)]  # l maps that the nets share, or one map per output
        dw, pw = widen(dw_weight[i // levels]), pw_weight[i // levels]
        active = ACTIVATIONS[pre_act](widen(source))
        middle = F.conv2d(active, dw, padding=dw.shape[-1] // 2, groups=dw.shape[0])
        out = conv_affine_act(
            middle, pw, scale[i] if scale else None, shift[i] if shift else None, act
        )
        y.append(out.to(source.dtype))
    return y
