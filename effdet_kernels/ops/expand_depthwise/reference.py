"""Plain-torch `expand_depthwise`: the definition of right."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..depthwise_conv.reference import depthwise_conv
from ..pointwise_conv.reference import pointwise_conv


def expand_depthwise(
    x: Tensor,
    expand_weight: Tensor,
    expand_scale: Tensor,
    expand_shift: Tensor,
    dw_weight: Tensor,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    *,
    stride: int = 1,
    padding: Sequence[int] = (0, 0, 0, 0),
    act: str = "none",
    squeeze: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`act(depthwise(act(expand(x) * expand_scale + expand_shift)) * scale + shift)`; raw without BN vectors."""
    raw = scale is None and shift is None
    expanded = pointwise_conv(x, expand_weight, expand_scale, expand_shift, act=act)
    return depthwise_conv(
        expanded,
        dw_weight,
        scale,
        shift,
        stride=stride,
        padding=padding,  # zeros around the activated, normalised map
        act="none" if raw else act,
        squeeze=squeeze,
    )
