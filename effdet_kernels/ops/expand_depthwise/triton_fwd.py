"""``expand_depthwise`` on the Triton kernels of its two convolutions; the README says why not one kernel."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels.ops.depthwise_conv import triton_fwd as depthwise
from effdet_kernels.ops.pointwise_conv import triton_fwd as pointwise


def run(
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
    """y [B, E, H', W'], and with ``squeeze`` its sums [B, E]; the expanded map is stored between."""
    last_act = "none" if scale is None and shift is None else act
    (e,) = pointwise.run(x, expand_weight, expand_scale, expand_shift, None, None, act)
    return depthwise.run(e, dw_weight, scale, shift, stride, padding, last_act, squeeze)
