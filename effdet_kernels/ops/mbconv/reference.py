"""The definition of right for ``mbconv``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effdet_kernels.ops.depthwise_conv.reference import depthwise_conv
from effdet_kernels.ops.expand_depthwise.reference import expand_depthwise
from effdet_kernels.ops.pointwise_conv.reference import pointwise_conv
from effdet_kernels.ops.squeeze_excite.reference import squeeze_excite


def mbconv(
    x: Tensor,
    expand_weight: Tensor | None,
    expand_scale: Tensor | None,
    expand_shift: Tensor | None,
    dw_weight: Tensor,
    dw_scale: Tensor,
    dw_shift: Tensor,
    se_reduce_weight: Tensor,
    se_reduce_bias: Tensor,
    se_expand_weight: Tensor,
    se_expand_bias: Tensor,
    weight: Tensor,
    scale: Tensor,
    shift: Tensor,
    stride: int,
    padding: Sequence[int],
    act: str,
    se_act: str,
    gate: str,
    residual: bool,
) -> Tensor:
    """``project(gates * wide) + x``: the four convolutions, one after the other."""
    geometry: Any = dw_weight, dw_scale, dw_shift, stride, padding, act, True
    if expand_weight is None:
        wide, sums = depthwise_conv(x, *geometry)
    else:
        expansion: Any = expand_weight, expand_scale, expand_shift
        wide, sums = expand_depthwise(x, *expansion, *geometry)
    excite = se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias
    gates = squeeze_excite(sums, *excite, wide.shape[2] * wide.shape[3], se_act, gate)
    return pointwise_conv(wide, weight, scale, shift, gates, x if residual else None, "none")[0]
