"""The definition of right for ``squeeze_excite``: plain PyTorch."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS

# Not F.hardsigmoid: its gradient has a sixth in float32 also for float64 (torch 2.13).
GATES = {"sigmoid": lambda x: x.sigmoid(), "hard_sigmoid": lambda x: F.relu6(x + 3) / 6}


def squeeze_excite(
    sums: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
    count: int,
    act: str,
    gate: str,
) -> Tensor:
    """``gate(expand(act(reduce(sums / count))))``."""
    weights = (reduce_weight.flatten(1), reduce_bias, expand_weight.flatten(1), expand_bias)
    reduce, reduce_bias, expand, expand_bias = (w.to(sums.dtype) for w in weights)
    hidden = ACTIVATIONS[act](F.linear(sums / count, reduce, reduce_bias))
    return GATES[gate](F.linear(hidden, expand, expand_bias))
