"""The definition of right for ``pointwise_conv``: plain PyTorch."""

from __future__ import annotations

from torch import Tensor

from effdet_kernels.ops._activations import conv_affine_act, widen
from effdet_kernels.ops._statistics import with_moments


def pointwise_conv(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    gate: Tensor | None,
    residual: Tensor | None,
    act: str,
    statistics: bool = False,
) -> list[Tensor]:
    """``y = act(conv(x * gate) * scale + shift) + residual``; with ``statistics`` also its mean and variance."""
    gated = widen(x)
    if gate is not None:
        gated = gated * gate.to(gated.dtype)[:, :, None, None]
    y = conv_affine_act(gated, weight, scale, shift, act)
    if residual is not None:
        y = y + residual
    return with_moments([y], x.dtype) if statistics else [y.to(x.dtype)]
