"""The definition of right for ``batch_norm_act``: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, moments, widen


def batch_norm_act(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, act: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``y = act((x - mean) / sqrt(var + eps) * weight + bias)``; mean and biased variance of x."""
    wide = widen(x)
    # On a CPU, torch's backward takes any vector for a dense one.
    weight, bias = (v.to(wide.dtype).contiguous() for v in (weight, bias))
    y, _, _ = torch.native_batch_norm(wide, weight, bias, None, None, True, 0.0, eps)
    return ACTIVATIONS[act](y).to(x.dtype), *moments(wide)
