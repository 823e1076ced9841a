"""The definition of right for ``batch_norm_grad``: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, widen


def batch_norm_grad(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    eps: float,
    act: str,
    averages: Tensor | None = None,
) -> Tensor:
    """``(sum of d * n, sum of d)`` [2, C], or ``weight * rate * (d - averages[1] - n * averages[0])``.

    n is the normalised x, rate what it was multiplied by, d the gradient of n * weight + bias.
    """
    wide, grad = widen(x), widen(grad)
    weight, bias, mean, variance = (
        v.to(wide.dtype).view(1, -1, 1, 1) for v in (weight, bias, mean, variance)
    )
    rate = torch.rsqrt(variance + eps)
    normal = (wide - mean) * rate
    with torch.inference_mode(False), torch.enable_grad():
        value = (normal * weight + bias).detach().requires_grad_()
        (delta,) = torch.autograd.grad(ACTIVATIONS[act](value), value, grad.clone())
    if averages is None:
        return torch.stack([(delta * normal).sum((0, 2, 3)), delta.sum((0, 2, 3))])
    along, total = averages.to(wide.dtype).view(2, 1, -1, 1, 1)
    return (weight * rate * (delta - total - normal * along)).to(x.dtype)
