"""Launcher of the CUDA kernel of the backward of ``separable_conv``: maps and weights in one pass, 16 bits.

A fusion goes before it and after it as a kernel of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _cuda, _library
from effdet_kernels.ops import _walk
from effdet_kernels.ops._gradients import chosen, wanted
from effdet_kernels.ops.separable_conv import cuda
from effdet_kernels.ops.weighted_fusion import cuda as fusion
from effdet_kernels.ops.weighted_fusion import cuda_bwd as fusion_bwd

# As csrc/separable_conv has them.
_KERNEL, _MOST_LEVELS, _MOST_CHANNELS = 3, 8, 128
_ROWS, _WIDTH = 8, 16  # of a tile
_UNIT = 8  # channels of a vector


def refusal(grads: Sequence[Tensor | None], *rest) -> str | None:
    """Why the kernel does not take a call, or None."""
    (
        x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, resample, size,
        pool_padding, statistics, _,
    ) = rest  # fmt: skip
    for name, vectors in (("scale", scale), ("shift", shift)):
        if len(vectors):
            return f"{name}: got {len(vectors)} vectors, takes none"
    if act != "none":
        return f"act: got {act!r}, takes 'none'"
    if x[0].dtype == torch.float32:
        return "x[0]: is float32, takes bfloat16 or float16"
    for i, weight in enumerate(dw_weight):
        if weight.shape[2] != _KERNEL:
            return f"dw_weight[{i}]: has a side of {weight.shape[2]}, takes {_KERNEL}"
    if method == "none":
        if pre_act != "none":
            return f"pre_act: got {pre_act!r}, takes 'none' without method"
        refused = cuda.refused_sizes(x, len(x), len(dw_weight))
        each = (_refused(f"x[{i}]", level) for i, level in enumerate(x))
        refused = refused or next(filter(None, each), None)
    else:
        refused = fusion.refusal(x, fusion_weight, method, resample, size, pool_padding, pre_act)
        refused = refused and refused.replace("weight:", "fusion_weight:")
        refused = refused or _refused("x[0]", x[0])
    # Mean and variance of each map have no gradient.
    of_results = grads[: len(grads) // 3] if statistics else grads
    return refused or _refused_gradients(of_results, x[0], pw_weight)


def _refused(name: str, level: Tensor) -> str | None:
    refused = _cuda.refused_map(name, level)
    if refused is None and level.shape[1] > _MOST_CHANNELS:
        return f"{name}: has {level.shape[1]} channels, takes at most {_MOST_CHANNELS}"
    return refused


def _refused_gradients(
    grads: Sequence[Tensor | None], x: Tensor, pw_weight: Sequence[Tensor]
) -> str | None:
    """Why it does not take the gradients of the maps, or the shared memory that they take."""
    for i, grad in enumerate(grads):
        if grad is None or not grad.numel():
            return f"grads[{i}]: takes a gradient, and images"
        if grad.dtype != x.dtype:
            return f"grads[{i}]: is {_cuda.dtype_name(grad.dtype)}, takes {_cuda.dtype_name(x.dtype)} as x has"
        if refused := _refused(f"grads[{i}]", grad):
            return refused
    if len(grads) > _MOST_LEVELS * len(pw_weight):
        return f"x: got {len(grads) // len(pw_weight)} levels, takes at most {_MOST_LEVELS}"
    needed = shared_bytes(x.shape[1], max(len(weight) for weight in pw_weight))
    if needed > _cuda.shared_kb(x) * 1024:
        return f"x[0]: has {x.shape[1]} channels, whose tile is {needed // 1024 + 1} KB of shared memory"
    return None


def shared_bytes(channels: int, out_channels: int) -> int:
    """Of a block, as csrc/separable_conv/cuda_bwd.cu cuts it."""
    vectors, of_grad = channels // _UNIT, 2 * -(-out_channels // 16)
    wide = 4 * -(-channels // 32)
    patch = (_ROWS + 2) * (_WIDTH + 2)
    total = patch * (vectors | 1) + -(-patch // 16) * 16 * (max(vectors, of_grad) | 1)
    total += (_ROWS * _WIDTH + 8 * of_grad) * (wide | 1)
    return 16 * total + -(-18 * channels // 16) * 16 + 36 * channels


def run(grads: Sequence[Tensor], *rest) -> list[Tensor]:
    """The wanted gradients of every tensor, in the order of the arguments."""
    (
        x, dw_weight, pw_weight, scale, shift, pre_act, _, method, fusion_weight, resample, size,
        pool_padding, statistics, needs,
    ) = rest  # fmt: skip
    variables = x, dw_weight, pw_weight, scale, shift, fusion_weight
    of_x, of_dw, of_pw, _, _, of_fusion = wanted(variables, needs)
    maps, of_maps = x, of_x
    if method != "none":
        maps = [fusion.run(x, fusion_weight, method, resample, size, pool_padding, pre_act)]
        of_maps = [any(of_x) or of_fusion]
    of_results = grads[: len(grads) // 3] if statistics else grads
    d_maps, d_dw, d_pw = _launch(of_results, maps, dw_weight, pw_weight, of_maps, of_dw, of_pw)
    d_weight = None
    if method != "none":
        fused, d_maps = d_maps[0], [None] * len(x)
        if fused is not None:
            d_maps, d_weight = fusion_bwd.gradients(
                fused, x, fusion_weight, method, resample, pool_padding, of_x, of_fusion, pre_act
            )
    return [
        *chosen(d_maps, of_x),
        *chosen(d_dw, of_dw),
        *chosen(d_pw, of_pw),
        *chosen([d_weight], [of_fusion]),
    ]


def _launch(
    grads: Sequence[Tensor],
    maps: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    of_maps: Sequence[bool],
    of_dw: Sequence[bool],
    of_pw: Sequence[bool],
) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor | None]]:
    """Of each map, of which there is one for each output, its gradient; of each net those of its weights."""
    nets = len(dw_weight)
    levels, (batch, channels) = len(grads) // nets, maps[0].shape[:2]
    dx = [
        _library.nchw(level.shape, level).empty() if need else None
        for level, need in zip(maps, of_maps, strict=True)
    ]
    tiles = batch * sum(-(-g.shape[2] // _ROWS) * -(-g.shape[3] // _WIDTH) for g in grads[:levels])
    widths = [len(weight) for weight in pw_weight]
    resident = 2 if max(channels, *widths) <= _MOST_CHANNELS // 2 else 1
    workers = max(1, min(tiles, resident * _walk.MULTIPROCESSORS // nets))

    def parts(need: bool, *shape: int) -> Tensor | None:
        size = (workers, *shape)
        return torch.empty(size, dtype=torch.float32, device=maps[0].device) if need else None

    d_dw = [parts(need, channels, _KERNEL**2) for need in of_dw]
    d_pw = [parts(need, width, channels) for need, width in zip(of_pw, widths, strict=True)]
    _cuda.launch(
        "separable_conv_gradient",
        maps[0],
        dtype=_cuda.DTYPE_CODES[maps[0].dtype],
        batch=batch,
        channels=channels,
        nets=nets,
        workers=workers,
        out_channels=widths,
        dw_weight=[_cuda.aligned(weight) for weight in dw_weight],
        pw_weight=[_cuda.aligned(weight) for weight in pw_weight],
        d_dw=d_dw,
        d_pw=d_pw,
        levels=[
            {
                "height": grads[level].shape[2],
                "width": grads[level].shape[3],
                "x": [_cuda.map_fields(maps[i]) for i in of_nets],
                "grad": [_cuda.map_fields(grads[i]) for i in of_nets],
                "dx": [dx[i] for i in of_nets],
            }
            for level in range(levels)
            for of_nets in [range(level, len(grads), levels)]
        ],
    )
    return (
        dx,
        [None if p is None else p.sum(0).view(channels, 1, _KERNEL, _KERNEL) for p in d_dw],
        [None if p is None else p.sum(0)[:, :, None, None] for p in d_pw],
    )
