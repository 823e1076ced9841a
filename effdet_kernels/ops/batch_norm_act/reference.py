"""The definition of right for ``batch_norm_act``: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, moments, widen

_ROWS = (0, 2, 3)


def batch_norm_act(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    act: str,
    mean: Tensor | None = None,
    variance: Tensor | None = None,
) -> list[Tensor]:
    """``y = act((x - mean) / sqrt(var + eps) * weight + bias)``, and mean and biased variance of x if not given."""
    wide = widen(x)
    # On a CPU, torch's backward takes any vector for a dense one.
    weight, bias = (v.to(wide.dtype).contiguous() for v in (weight, bias))
    if mean is None or variance is None:
        y, _, _ = torch.native_batch_norm(wide, weight, bias, None, None, True, 0.0, eps)
        return [ACTIVATIONS[act](y).to(x.dtype), *moments(wide)]
    centre, spread, weight, bias = (
        v.to(wide.dtype).view(1, -1, 1, 1) for v in (mean, variance, weight, bias)
    )
    squares = (wide - centre).square().mean(_ROWS, keepdim=True)
    centred = wide - _valued(wide.mean(_ROWS, keepdim=True), centre)
    y = centred * torch.rsqrt(_valued(squares, spread) + eps) * weight + bias
    return [ACTIVATIONS[act](y).to(x.dtype)]


def _valued(function: Tensor, value: Tensor) -> Tensor:
    """``value``, with the gradient of ``function``, which it is but for rounding."""
    return value + (function - function.detach()) if function.requires_grad else value
