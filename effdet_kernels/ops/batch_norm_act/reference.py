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
    mean, unbiased = wide.new_zeros(2, x.shape[1])
    # Momentum 1 makes the running statistics those of this batch.
    y, _, _ = torch.native_batch_norm(
        wide, weight.to(wide.dtype), bias.to(wide.dtype), mean, unbiased, True, 1.0, eps
    )
    count = x.numel() // x.shape[1]
    var = unbiased * ((count - 1) / count) if count > 1 else torch.zeros_like(unbiased)
    return ACTIVATIONS[act](y).to(x.dtype), mean, var
