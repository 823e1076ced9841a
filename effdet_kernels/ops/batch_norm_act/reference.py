"""The definition of right for ``batch_norm_act``: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, widen


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act((x - mean) / sqrt(var + eps) * weight + bias)``; mean and biased variance of x."""
    wide = widen(x)
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    scale = weight.to(wide.dtype) * torch.rsqrt(var + eps)
    centred = wide - mean.view(1, -1, 1, 1)
    y = centred * scale.view(1, -1, 1, 1) + bias.to(wide.dtype).view(1, -1, 1, 1)
    return ACTIVATIONS[act](y).to(x.dtype), mean.detach(), var.detach()
