"""Two launches: the wide map with the sums of its blocks, and the projection, which makes its gates of those."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from effdet_kernels.ops.depthwise_conv import cuda as depthwise
from effdet_kernels.ops.expand_depthwise import cuda as expand
from effdet_kernels.ops.mbconv.op import MOST_EXCITED, Block
from effdet_kernels.ops.pointwise_conv import cuda as pointwise


def refusal(*args: Any) -> str | None:
    """Why the kernels do not take a call, or None."""
    block = Block(*args)
    if block.expand_weight is None:
        reason = (depthwise.refusal(*block.opening) or "").replace("weight:", "dw_weight:")
    else:
        reason = expand.refusal(*block.opening) or ""
    elements = block.se_reduce_weight.numel()
    if elements > MOST_EXCITED:
        return f"se_reduce_weight: has {elements} elements, takes at most {MOST_EXCITED}"
    refused = reason or pointwise.refused_weight(block.x, block.weight)
    return refused or pointwise.refused_excite(block.x, block.se_reduce_weight)


def run(*args: Any) -> Tensor:
    """y [B, O, H', W'] of a whole block."""
    block = Block(*args)
    first = depthwise if block.expand_weight is None else expand
    wide, parts = first.run_to_parts(*block.opening)
    assert parts is not None
    excite = pointwise.Excite(parts, *block.excite, block.se_act, block.gate)
    projection = block.weight, block.scale, block.shift, None, block.added, "none"
    return pointwise.run(wide, *projection, excite=excite)[0]
