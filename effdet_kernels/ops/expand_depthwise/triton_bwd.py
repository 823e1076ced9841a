"""The backward of ``expand_depthwise`` on the Triton kernels of its convolutions; nothing of the forward is stored."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from effdet_kernels.ops.depthwise_conv import triton_bwd as depthwise
from effdet_kernels.ops.pointwise_conv import triton_bwd as pointwise
from effdet_kernels.ops.pointwise_conv import triton_fwd


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """Makes the expanded map again and goes back through both convolutions."""
    *args, needs = rest
    x, *expansion, dw_weight, scale, shift, stride, padding, act, squeeze = args
    first, last = needs[:4], needs[4:]
    last_act = "none" if scale is None and shift is None else act
    (e,) = triton_fwd.run(x, *expansion, None, None, act)
    after = dw_weight, scale, shift, stride, padding, last_act, squeeze, False
    of_e = any(first)
    found = depthwise.run(grads, e, *after, [of_e, *last])
    before = []
    if of_e:
        d_e, *found = found
        before = pointwise.run([d_e], x, *expansion, None, None, act, False, [*first])
    return before + found
