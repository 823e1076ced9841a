"""The backward of ``separable_conv`` on the C++ kernels; the README has the formulas."""

from __future__ import annotations

from torch import Tensor

from effdet_kernels.ops import _cpu, _gradients
from effdet_kernels.ops.depthwise_conv.op import convolve, input_gradient
from effdet_kernels.ops.pointwise_conv.op import run_cpu as pointwise
from effdet_kernels.ops.weighted_fusion.op import gradients as fusion_gradients
from effdet_kernels.ops.weighted_fusion.op import run_cpu as fuse


def backward(grads, *rest) -> list[Tensor]:
    """Goes back output by output; maps and weights that several outputs share add up, in their order."""
    *args, needs = rest
    x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, *how, statistics = (
        _gradients.wide(args)
    )
    # Mean and variance of each map have no gradient.
    grads = _gradients.wide(grads[: len(grads) // 3] if statistics else grads)
    variables = x, dw_weight, pw_weight, scale, shift, fusion_weight
    of_x, of_dw, of_pw, of_scale, of_shift, of_fusion = _gradients.wanted(variables, needs)
    maps = x if method == "none" else [fuse(x, fusion_weight, method, *how, "none")]
    of_maps = of_x if method == "none" else [any(of_x) or of_fusion]
    d_maps: list[Tensor | None] = [None] * len(maps)
    d_dw: list[Tensor | None] = [None] * len(dw_weight)
    d_pw: list[Tensor | None] = [None] * len(pw_weight)
    d_scale: list[Tensor | None] = []
    d_shift: list[Tensor | None] = []
    levels = len(grads) // len(dw_weight)
    for i, grad in enumerate(grads):
        m, n = i % len(maps), i // levels
        dw, pw = dw_weight[n], pw_weight[n]
        side = dw.shape[2] // 2
        padding = [side] * 4
        active = _activated(maps[m], pre_act)
        middle = convolve(active, dw, 1, padding)
        delta = grad
        if scale or shift or act != "none":
            z = None
            if act != "none" or (scale and of_scale[i]):
                z = pointwise(middle, pw, None, None, None, None, "none")
            vectors = scale[i] if scale else None, shift[i] if shift else None
            delta, of_factor, of_term = _gradients.affine(grad, z, *vectors, act, overwrite=True)
            d_scale += [of_factor] if scale and of_scale[i] else []
            d_shift += [of_term] if shift and of_shift[i] else []
        delta = _cpu.channels_inner(delta)
        if of_pw[n]:
            operands = _cpu.map_fields(delta), len(pw), _cpu.map_fields(middle), pw.shape[1]
            d_pw[n] = _sum(d_pw[n], _gradients.product(*operands)[:, :, None, None])
        if not (of_dw[n] or of_maps[m]):
            continue
        d_middle = pointwise(delta, pw.permute(1, 0, 2, 3), None, None, None, None, "none")
        if of_dw[n]:
            found = _gradients.depthwise_weight(active, d_middle, dw.shape[2], 1, padding)
            d_dw[n] = _sum(d_dw[n], found)
        if of_maps[m]:
            d_active = input_gradient(d_middle, dw, active, 1, padding)
            if pre_act != "none":
                d_active, _, _ = _gradients.affine(d_active, maps[m], None, None, pre_act)
            d_maps[m] = _sum(d_maps[m], d_active)
    d_weight = None
    if method != "none":
        fused, d_maps = d_maps[0], [None] * len(x)
        if fused is not None:
            names, _, pool_padding = how
            d_maps, d_weight = fusion_gradients(
                fused, x, fusion_weight, method, names, pool_padding, of_x
            )
    return [
        *_gradients.chosen(d_maps, of_x),
        *_gradients.chosen(d_dw, of_dw),
        *_gradients.chosen(d_pw, of_pw),
        *_gradients.chosen(d_scale, [True] * len(d_scale)),
        *_gradients.chosen(d_shift, [True] * len(d_shift)),
        *_gradients.chosen([d_weight], [of_fusion]),
    ]


def _activated(x: Tensor, act: str) -> Tensor:
    if act == "none":
        return _cpu.channels_inner(x)
    return fuse([x], None, "sum", "identity", list(x.shape[2:]), [0, 0, 0, 0], act)


def _sum(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)
