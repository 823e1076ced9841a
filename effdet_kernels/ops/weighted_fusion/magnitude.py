"""The magnitude of a weighted fusion, and of its gradients: for the error bounds of the ops that fuse on load."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels import bound
from effdet_kernels.ops.weighted_fusion.reference import FASTATTN_EPS, resampled


def fusion_magnitude(
    x: Sequence[Tensor],
    weight: Tensor | None,
    method: str,
    resample: Sequence[str],
    size: Sequence[int],
    pool_padding: Sequence[int],
) -> Tensor:
    """sum_i a_i |r_i(x_i)|; its vector-Jacobian product gives the magnitudes of the gradients."""
    maps = [_extent(m, how, size, pool_padding) for m, how in zip(x, resample, strict=True)]
    if weight is None:
        return sum(maps[1:], maps[0])
    share = _Shares.apply(weight, method).unbind()
    return sum((m * w for m, w in zip(maps, share, strict=True)), torch.zeros(()).to(maps[0]))


def _extent(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Of one resampled map. The coordinates of "bilinear" round in proportion to the map's extent."""
    y = resampled(x if how == "max" else x.abs(), how, size, padding).abs()
    if how != "bilinear":
        return y
    around = 9 * F.avg_pool2d(x.abs(), 3, 1, 1, count_include_pad=True)
    return y + max(x.shape[2:]) * resampled(around, how, size, padding)


class _Shares(torch.autograd.Function):
    """a(w); the derivative of each share is replaced by the sum of the magnitudes of its terms.

    da_j/dw_i is (d_ij - a_j) / S for a = relu(w) / S and a_j (d_ij - a_i) for the softmax.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, method: str) -> Tensor:
        squared = bound.squared_operands()
        w = weight.sign() * weight.abs().sqrt() if squared else weight
        if method == "attn":
            share = w.softmax(0)
            factor = share
        else:
            total = w.relu().sum() + FASTATTN_EPS
            share = w.relu() / total
            factor = (1 / total).expand_as(share)
        share, factor = (t.square() if squared else t for t in (share, factor))
        ctx.save_for_backward(share, factor)
        return share

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        share, factor = ctx.saved_tensors
        return factor * (grad + (share * grad).sum()), None
