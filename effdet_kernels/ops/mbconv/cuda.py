"""Two launches: the wide map with the sums of its blocks, and the projection, which makes its gates of those."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from effdet_kernels.ops.depthwise_conv import cuda as depthwise
from effdet_kernels.ops.expand_depthwise import cuda as expand
from effdet_kernels.ops.mbconv.op import MOST_EXCITED
from effdet_kernels.ops.pointwise_conv import cuda as pointwise


def refusal(
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
) -> str | None:
    """Why the kernels do not take a call, or None."""
    geometry: Any = dw_weight, dw_scale, dw_shift, stride, padding, act, True
    if expand_weight is None:
        reason = (depthwise.refusal(x, *geometry) or "").replace("weight:", "dw_weight:")
    else:
        assert expand_scale is not None and expand_shift is not None  # the op has seen to that
        expansion = expand_weight, expand_scale, expand_shift
        reason = expand.refusal(x, *expansion, *geometry) or ""
    if se_reduce_weight.numel() > MOST_EXCITED:
        return f"se_reduce_weight: has {se_reduce_weight.numel()} elements, takes at most {MOST_EXCITED}"
    refused = reason or pointwise.refused_weight(x, weight)
    return refused or pointwise.refused_excite(x, se_reduce_weight)


def run(
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
    geometry: Any = dw_weight, dw_scale, dw_shift, stride, padding, act, True
    if expand_weight is None:
        wide, parts = depthwise.run_to_parts(x, *geometry)
    else:
        assert expand_scale is not None and expand_shift is not None
        expansion = expand_weight, expand_scale, expand_shift
        wide, parts = expand.run_to_parts(x, *expansion, *geometry)
    assert parts is not None
    parameters = se_reduce_weight, se_reduce_bias, se_expand_weight, se_expand_bias
    excite = pointwise.Excite(parts, *parameters, se_act, gate)
    added = x if residual else None
    return pointwise.run(wide, weight, scale, shift, None, added, "none", excite=excite)[0]
