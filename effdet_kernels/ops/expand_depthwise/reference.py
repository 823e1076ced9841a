"""The definition of right for ``expand_depthwise``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels.ops.depthwise_conv.reference import depthwise_conv
from effdet_kernels.ops.pointwise_conv.reference import pointwise_conv


def expand_depthwise(
    x: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor,
    expand_shift: Tensor,
    dw_weight: Tensor,
    scale: Tensor | None,
    shift: Tensor | None,
    stride: int,
    padding: Sequence[int],
    act: str,
    squeeze: bool,
) -> list[Tensor]:
    """``act(dw(e) * scale + shift)`` with ``e = act(expand(x) * expand_scale + expand_shift)``."""
    raw = scale is None and shift is None
    (expanded,) = pointwise_conv(x, expand_weight, expand_scale, expand_shift, None, None, act)
    last_act = "none" if raw else act
    # Its padding puts zeros around the map after normalisation and activation.
    return depthwise_conv(expanded, dw_weight, scale, shift, stride, padding, last_act, squeeze)
