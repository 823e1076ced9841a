"""The definition of right for ``separable_conv``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS, conv_affine_act, widen
from effdet_kernels.ops._statistics import with_moments
from effdet_kernels.ops.weighted_fusion.reference import weighted_fusion


def separable_conv(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_act: str,
    act: str,
    method: str | None,
    fusion_weight: Tensor | None,
    resample: Sequence[str],
    size: Sequence[int],
    pool_padding: Sequence[int],
    statistics: bool = False,
) -> list[Tensor]:
    """``y = act(pointwise(depthwise(pre_act(x))) * scale + shift)`` for every map of every net.

    With ``statistics`` also the means and the variances of all.
    """
    dtype = x[0].dtype
    maps = [widen(level) for level in x]
    if method is not None:  # one map, fused from all of x
        fused = weighted_fusion(maps, fusion_weight, method, resample, size, pool_padding, "none")
        maps = [fused]
    outputs = len(scale) or len(shift) or len(maps)
    levels = outputs // len(dw_weight)
    y = []
    for i in range(outputs):
        source = maps[i % len(maps)]  # l maps that the nets share, or one map per output
        dw, pw = widen(dw_weight[i // levels]), pw_weight[i // levels]
        active = ACTIVATIONS[pre_act](source)
        middle = F.conv2d(active, dw, padding=dw.shape[-1] // 2, groups=dw.shape[0])
        out = conv_affine_act(
            middle, pw, scale[i] if scale else None, shift[i] if shift else None, act
        )
        y.append(out)
    return with_moments(y, dtype) if statistics else [out.to(dtype) for out in y]
