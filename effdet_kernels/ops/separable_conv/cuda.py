"""Launcher of the CUDA kernel of ``separable_conv``."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from effdet_kernels import _cuda, _native
from effdet_kernels.ops import _walk
from effdet_kernels.ops.separable_conv import op
from effdet_kernels.ops.weighted_fusion import cuda as fusion

_KERNEL = 3
_MOST_LEVELS = 8  # of a launch, csrc/separable_conv/cuda.h has the same
_WIDTH = 16  # output pixels of a tile's row
_GROUP = 32  # output channels
_MOST_ELEMENTS = 2**31  # of an image
_BEYOND = 32  # rows and columns that a tile may have beyond a map
_SHARED_KB = 228  # of a multiprocessor that blocks are to share, each of which takes one more


class Cut(NamedTuple):
    """How a launch is cut; csrc/separable_conv/cuda.h says what the fields are."""

    rows: int
    warps: int
    groups: int
    depth: int
    stages: int


def refusal(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_act: str,
    act: str,
    method: str,
    fusion_weight: Tensor | None,
    resample: str,
    size: Sequence[int],
    pool_padding: Sequence[int],
    statistics: bool = False,
) -> str | None:
    """Why the kernel does not take a call, or None."""
    if statistics:
        return "statistics: got True, takes False"
    for i, weight in enumerate(dw_weight):
        if weight.shape[2] != _KERNEL:
            return f"dw_weight[{i}]: has a side of {weight.shape[2]}, takes {_KERNEL}"
    if method != "none":
        refused = fusion.refusal(x, fusion_weight, method, resample, size, pool_padding, "none")
        if refused:
            return refused.replace("weight:", "fusion_weight:")
        widest = len(pw_weight[0])
        if _extent(size[0], size[1], (size[1] + _BEYOND) * widest, 0) >= _MOST_ELEMENTS:
            return f"size: got {tuple(size)}, takes less than 2^31 elements an image"
    else:
        refused = refused_sizes(x, len(scale) or len(shift) or len(x), len(dw_weight))
        refused = refused or _refused_levels(x, pw_weight)
        if refused:
            return refused
    channels, kb = x[0].shape[1], _cuda.shared_kb(x[0])
    widest = max(len(weight) for weight in pw_weight)
    if _cut(x[0].element_size(), channels, widest, x[0].shape[0], (), kb) is None:
        return f"x[0]: has {channels} channels, whose smallest tile is more than {kb} KB of shared memory"
    return None


def refused_sizes(x: Sequence[Tensor], outputs: int, nets: int) -> str | None:
    """Why kernels do not take the sizes of maps that are not fused: those of a level are one."""
    levels = outputs // nets
    for i in range(levels, len(x)):
        here, first = tuple(x[i].shape[2:]), tuple(x[i % levels].shape[2:])
        if here != first:
            return f"x[{i}]: is {here}, takes {first}, which x[{i % levels}] is"
    return None


def _refused_levels(x: Sequence[Tensor], pw_weight: Sequence[Tensor]) -> str | None:
    widest = max(len(weight) for weight in pw_weight)
    for i, level in enumerate(x):
        refused = _cuda.refused_map(f"x[{i}]", level)
        if refused:
            return refused
        sides = level.shape[2:]
        of_result = _extent(sides[0], sides[1], (sides[1] + _BEYOND) * widest, 0)
        if (
            max(_extent(sides[0], sides[1], level.stride(2), level.stride(3)), of_result)
            >= _MOST_ELEMENTS
        ):
            return f"x[{i}]: an image of it, or of a result, has 2^31 elements or more"
    return None


def run(
    x: Sequence[Tensor],
    dw_weight: Sequence[Tensor],
    pw_weight: Sequence[Tensor],
    scale: Sequence[Tensor],
    shift: Sequence[Tensor],
    pre_act: str,
    act: str,
    method: str,
    fusion_weight: Tensor | None,
    resample: str,
    size: Sequence[int],
    pool_padding: Sequence[int],
    statistics: bool = False,
) -> list[Tensor]:
    """Maps [B, O, H, W], net-major."""
    specs = op._out_spec(
        x, dw_weight, pw_weight, scale, shift, pre_act, act, method, fusion_weight, resample, size,
        pool_padding,
    )  # fmt: skip
    y = [spec.empty() for spec in specs]
    batch, channels = x[0].shape[:2]
    if batch == 0:
        return y
    nets = len(dw_weight)
    levels = len(y) // nets
    widths = [len(weight) for weight in pw_weight]
    dw_weight = [_cuda.aligned(weight) for weight in dw_weight]
    pw_weight = [_cuda.aligned(weight) for weight in pw_weight]
    scale = [vector.contiguous() for vector in scale]
    shift = [vector.contiguous() for vector in shift]
    name, fused = "separable_conv", {}
    if method != "none":
        name = "separable_conv_fused"
        fused = fusion.fields(x, fusion_weight, method, resample, size, pool_padding)
    for begin in range(0, levels, _MOST_LEVELS):
        these = range(begin, min(begin + _MOST_LEVELS, levels))
        outputs = [[net * levels + level for net in range(nets)] for level in these]
        sizes = tuple(tuple(y[i].shape[2:]) for of_nets in outputs for i in of_nets)
        cut = _cut(x[0].element_size(), channels, max(widths), batch, sizes, _cuda.shared_kb(x[0]))
        assert cut is not None
        _cuda.launch(
            name,
            x[0],
            dtype=_cuda.DTYPE_CODES[x[0].dtype],
            batch=batch,
            channels=channels,
            nets=nets,
            out_channels=widths,
            dw_weight=dw_weight,
            pw_weight=pw_weight,
            pre_act=_native.ACTIVATIONS.index(pre_act),
            act=_native.ACTIVATIONS.index(act),
            levels=[
                {
                    "height": y[of_nets[0]].shape[2],
                    "width": y[of_nets[0]].shape[3],
                    "x": [] if fused else [_cuda.map_fields(x[i % len(x)]) for i in of_nets],
                    "y": [y[i] for i in of_nets],
                    "scale": [scale[i] if scale else None for i in of_nets],
                    "shift": [shift[i] if shift else None for i in of_nets],
                }
                for of_nets in outputs
            ],
            **cut._asdict(),
            **fused,
        )
    return y


@functools.lru_cache(1024)
def _cut(
    size: int,
    channels: int,
    widest: int,
    batch: int,
    sizes: tuple[tuple[int, int], ...],
    kb: int,
) -> Cut | None:
    """For elements of ``size`` bytes, maps of ``channels``, outputs of ``widest`` at most and of ``sizes``, one for
    each net and level, and ``kb`` KB of shared memory; None if no tile fits.

    Large tiles have less border, small ones are more blocks; few channels leave room for more blocks.
    """
    warps = 4 if channels * size <= 224 else 8
    choices = (8, 4, 2) if size == 2 else (4, 2, 1)
    enough = [
        rows
        for rows in choices
        if batch * sum(-(-h // rows) * -(-w // _WIDTH) for h, w in sizes)
        >= 2 * _walk.MULTIPROCESSORS
    ]
    step = 2 if size == 2 else 1
    vectors = -(-channels * size // 16 // step) * step
    share = _SHARED_KB * warps // 16 - 1
    first = choices.index(enough[0]) if enough else len(choices) - 1
    for rows in choices[first:]:
        fixed = 9 * channels * size + (rows + 2) * (_WIDTH + 2) * (vectors | 1) * 16
        fixed += -(-widest // _GROUP) * _GROUP * 8
        fits = []  # the best is the least
        for across, groups in _panels(warps // min(rows, 4), widest):
            panel = _GROUP * groups * across
            for depth in dict.fromkeys((vectors, *(d for d in (8, 4, 2) if d < vectors))):
                turns = -(-widest // panel) * -(-vectors // depth)
                for stages in dict.fromkeys((min(3, turns), min(2, turns))):
                    total = fixed + stages * panel * (depth | 1) * 16
                    cut = Cut(rows, min(rows, 4) * across, groups, depth, stages)
                    if total <= kb * 1024:
                        fits.append((total > share * 1024, -cut.warps, turns, -panel, -stages, cut))
        if fits:
            return min(fits)[-1]
    return None


def _panels(across: int, widest: int) -> list[tuple[int, int]]:
    """Warps side by side, and groups of output channels of each: as many as there are, else fewer, to save memory."""
    groups = 1 if widest <= _GROUP * across else 2
    return list(dict.fromkeys(((across, groups), (across, 1), (1, 1))))


def _extent(height: int, width: int, row_stride: int, pixel_stride: int) -> int:
    """The largest offset in an image, and in what tiles have beyond it."""
    return (height + _BEYOND) * row_stride + (width + _BEYOND) * pixel_stride
