"""The activations of the fused ops in plain torch: what every kernel's epilogue must compute."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "swish": F.silu,
    "relu": F.relu,
    "relu6": F.relu6,
    "hard_swish": F.hardswish,
    "leaky_relu": F.leaky_relu,  # slope 0.01
    "mish": F.mish,
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64, fp32 for fp32, bf16 and fp16."""
    return torch.promote_types(dtype, torch.float32)


def widen(x: Tensor) -> Tensor:
    """``x`` in its accumulation dtype."""
    return x.to(accumulation_dtype(x.dtype))


def affine_act(y: Tensor, scale: Tensor | None, shift: Tensor | None, act: str) -> Tensor:
    """``act(y * scale + shift)`` per channel of ``y`` [B, C, H, W], already widened."""
    if scale is not None:
        y = y * scale.to(y.dtype).view(1, -1, 1, 1)
    if shift is not None:
        y = y + shift.to(y.dtype).view(1, -1, 1, 1)
    return ACTIVATIONS[act](y)
