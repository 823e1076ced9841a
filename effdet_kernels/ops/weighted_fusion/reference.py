"""The definition of right for ``weighted_fusion``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, widen

FASTATTN_EPS = 1e-4


def resampled(x: Tensor, how: str, size: Sequence[int], pool_padding: Sequence[int]) -> Tensor:
    """``x`` brought to ``size`` by "identity", "nearest", "bilinear" or "max"."""
    if how == "identity":
        return x
    if how == "max":
        return F.max_pool2d(F.pad(x, tuple(pool_padding), value=-torch.inf), 3, 2)
    align_corners = None if how == "nearest" else False
    return F.interpolate(x, tuple(size), mode=how, align_corners=align_corners)


def weighted_fusion(
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: Sequence[str],
    size: Sequence[int],
    pool_padding: Sequence[int],
    act: str,
) -> Tensor:
    """``y = act(sum_i w_i * resample_i(x_i))`` with ``w`` normalised as ``method`` says."""
    maps = [
        resampled(widen(m), how, size, pool_padding) for m, how in zip(x, resample, strict=True)
    ]
    if weight is None:  # "sum"
        y = sum(maps[1:], maps[0])
    elif method == "attn":
        share = weight.to(maps[0].dtype).softmax(0)
        y = sum(m * w for m, w in zip(maps, share, strict=True))
    else:
        share = weight.to(maps[0].dtype).relu()
        total = share.sum() + FASTATTN_EPS
        y = sum(m * w / total for m, w in zip(maps, share, strict=True))
    return ACTIVATIONS[act](y).to(x[0].dtype)
