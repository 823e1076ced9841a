"""OpSpec of ``depthwise_conv``."""

from __future__ import annotations

import functools
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import accumulator, envelope
from effdet_kernels.ops._activations import ACTIVATIONS, moments
from effdet_kernels.ops._cases import (
    ACTS,
    BENCH,
    BLOCKS,
    FAR,
    GPU,
    HALVED,
    SAME,
    VECTORS,
    mutant,
    nbytes,
    normal,
    per_channel,
    uniform,
    weights,
    with_moments_of_errors,
)
from effdet_kernels.ops._statistics import with_moments
from effdet_kernels.ops.depthwise_conv import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *shape: int,
    k: int = 3,
    padding: tuple[int, ...] = (1, 1, 1, 1),
    bn: bool = True,
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W]."""

    def make(g) -> Inputs:
        channels = shape[1]
        arguments = {
            "x": normal(g, *shape, std=std),
            "weight": weights(g, channels, 1, k, k),
            "scale": uniform(g, channels, low=0.5, high=1.5) if bn else None,
            "shift": normal(g, channels) if bn else None,
            "stride": 1,
            "padding": padding,
            "act": "swish",
            "squeeze": False,
        }
        return {**arguments, **options}

    return Case(name, make, tags, times=times)


def _magnitude(
    x, weight, scale, shift, stride, padding, act, squeeze, statistics=False
) -> list[Tensor]:
    padded = F.pad(x.abs(), tuple(padding))
    conv = F.conv2d(padded, weight.abs(), stride=stride, groups=len(weight))
    y = envelope(conv * per_channel(scale, 1).abs() + per_channel(shift, 0).abs(), act)
    if statistics:
        exact = reference.depthwise_conv(x, weight, scale, shift, stride, padding, act, False)
        return with_moments_of_errors(exact, [y])
    return [y, y.sum((2, 3))] if squeeze else [y]


def _out_pixels(x, weight, stride, padding, **_) -> int:
    left, right, top, bottom = padding
    k = weight.shape[2]
    height = (x.shape[2] + top + bottom - k) // stride + 1
    return height * ((x.shape[3] + left + right - k) // stride + 1)


def _summed(a: Inputs) -> int:
    """Values in a sum over pixels."""
    images = 1 if a["squeeze"] else a["x"].shape[0] if a.get("statistics") else 0
    return images * _out_pixels(**a)


def _inputs(a: Inputs) -> int:
    return nbytes(a["x"], a["weight"], a["scale"], a["shift"])


def _written(a: Inputs) -> int:
    maps = a["x"].shape[0] * a["x"].shape[1]
    sums = maps * _wide(a) if a["squeeze"] else 0
    return maps * _out_pixels(**a) * a["x"].element_size() + sums


def _wide(a: Inputs) -> int:
    return accumulator(a["x"].dtype).itemsize


def _bytes(**a: Any) -> int:
    moments = 2 * a["x"].shape[1] * _wide(a) if a.get("statistics") else 0
    return _inputs(a) + _written(a) + moments


def _backward_bytes(**a: Any) -> int:
    """Reads the inputs and the outputs' gradients, writes a gradient for each input."""
    return 2 * _inputs(a) + _written(a)


def _flops(**a: Any) -> int:
    maps = a["x"].shape[0] * a["x"].shape[1]
    return 2 * maps * _out_pixels(**a) * a["weight"].shape[2] ** 2


def _backward_flops(**a: Any) -> int:
    """The taps of both gradients; act' needs the convolution once more."""
    return (2 if a["act"] == "none" else 3) * _flops(**a)


def _act_before_bn(**a: Any) -> list[Tensor]:
    y = reference.depthwise_conv(**{**a, **_RAW, "act": a["act"]})[0]
    return _results(a, y * per_channel(a["scale"], 1) + per_channel(a["shift"], 0))


def _results(a: Inputs, y: Tensor) -> list[Tensor]:
    """The outputs of a wrong y."""
    if a.get("statistics"):
        return with_moments([y], y.dtype)
    return [y, y.sum((2, 3))] if a["squeeze"] else [y]


def _sums_before_activation(**a: Any) -> list[Tensor]:
    y, *sums = reference.depthwise_conv(**{**a, "act": "none"})
    return [ACTIVATIONS[a["act"]](y), *sums]


def _of_last(**a: Any) -> list[Tensor]:
    y, *found = reference.depthwise_conv(**a)
    return [y, *(moments(y[-1:]) if a.get("statistics") else found)]


def _rounded_result(**a: Any) -> list[Tensor]:
    y = reference.depthwise_conv(**{**a, **_RAW})[0]
    y = y.bfloat16().double() * per_channel(a["scale"], 1) + per_channel(a["shift"], 0)
    return _results(a, ACTIVATIONS[a["act"]](y))


_reference = reference.depthwise_conv
_RAW: Inputs = {"scale": None, "shift": None, "act": "none"}

# BN is an op of its own.
_STRIDED: Inputs = {"bn": False, "act": "none", "stride": 2}
_TRAINING: Inputs = {"bn": False, "act": "none", "squeeze": False, "statistics": True}


def _real(name: str, *shape: int, k: int = 3, stride: int = 1, tags=BENCH, **options: Any) -> Case:
    """A layer of a model: squeezed for squeeze-excite."""
    padding = (SAME if stride == 1 else HALVED)[k]
    options = {"squeeze": True, **options}
    return _case(name, *shape, k=k, stride=stride, padding=padding, tags=tags, **options)


_blocks = functools.partial(_real, tags=BLOCKS)
_vectors = functools.partial(_case, tags=VECTORS)

SPEC = OpSpec(
    name="depthwise_conv",
    op=op.depthwise_conv,
    reference=_reference,
    cases=(
        _case("3x3", 2, 5, 7, 6, squeeze=True),
        _case("3x3_stride2", 2, 3, 8, 9, stride=2, padding=(1, 1, 0, 1), act="relu6"),
        _case(
            "5x5_stride2",
            1,
            3,
            9,
            8,
            k=5,
            stride=2,
            padding=(1, 2, 2, 2),
            act="hard_swish",
            squeeze=True,
        ),
        _case("raw", 1, 4, 5, 5, bn=False, act="none", squeeze=True),
        _case("scale_only", 1, 3, 4, 5, act="leaky_relu", shift=None),
        _case("no_padding", 1, 2, 6, 3, padding=(0, 0, 0, 0), act="mish"),
        _case("one_pixel", 2, 3, 1, 1, squeeze=True),
        _case("shift_only", 1, 3, 4, 5, act="relu", scale=None),
        _case("uneven_padding", 3, 3, 5, 4, padding=(2, 0, 1, 3)),
        _case("stride3", 2, 3, 11, 10, stride=3, squeeze=True),
        _case("9x9", 2, 3, 6, 11, k=9, padding=(4, 4, 4, 4)),
        *[_case(f"far_{act}", 1, 3, 4, 5, act=act, std=FAR) for act in ACTS],
        _case("5x5_two_pixels", 1, 3, 1, 2, k=5, padding=(2, 2, 2, 2)),
        _case("statistics", 3, 5, 6, 7, bn=False, act="none", statistics=True),
        _case("statistics_act", 2, 3, 7, 5, stride=2, padding=(0, 1, 1, 0), statistics=True),
        _case("eight_channels", 2, 8, 5, 6, squeeze=True),
        _case("eight_channels_stride2", 2, 8, 6, 7, stride=2, padding=(0, 1, 1, 0)),
        _vectors("vectors_5x5", 1, 8, 9, 20, k=5, padding=(2, 2, 2, 2), squeeze=True),
        _vectors("vectors_5x5_stride2", 2, 16, 9, 37, k=5, stride=2, padding=(1, 2, 2, 2)),
        _vectors("vectors_stride2", 1, 24, 12, 35, stride=2, padding=(0, 1, 0, 1), squeeze=True),
        _vectors("vectors_no_padding", 1, 8, 8, 19, padding=(0, 0, 0, 0), act="mish"),
        _vectors("vectors_uneven_padding", 2, 8, 5, 4, padding=(2, 0, 1, 3), act="relu6"),
        _vectors("vectors_raw", 1, 16, 7, 34, bn=False, act="none", squeeze=True),
        _vectors("vectors_raw_3x3", 2, 8, 7, 6, bn=False, act="none"),
        _vectors("vectors_raw_3x3_stride2", 1, 16, 6, 35, padding=(0, 1, 0, 1), **_STRIDED),
        _vectors("vectors_raw_5x5", 1, 8, 6, 33, k=5, padding=(2, 2, 2, 2), bn=False, act="none"),
        _vectors("vectors_raw_5x5_stride2", 2, 40, 7, 9, k=5, padding=(1, 2, 2, 2), **_STRIDED),
        _vectors("vectors_no_images", 0, 8, 4, 4, squeeze=True),
        _vectors("vectors_raw_uneven", 1, 8, 5, 4, padding=(2, 0, 1, 3), bn=False, act="none"),
        _vectors("vectors_scale_only", 1, 8, 3, 3, act="hard_swish", shift=None),
        _vectors("vectors_shift_only", 1, 8, 3, 3, act="leaky_relu", scale=None),
        *[_vectors(f"vectors_far_{act}", 1, 8, 3, 5, act=act, std=FAR) for act in ACTS],
        _case("no_images", 0, 3, 4, 4, squeeze=True),
        _blocks("blocks", 2, 77, 19, 37),
        _blocks("blocks_5x5", 2, 80, 21, 33, k=5),
        _blocks("blocks_stride2", 2, 77, 38, 35, stride=2),
        _blocks("blocks_channels", 2, 147, 5, 6),
        _blocks("blocks_5x5_stride2", 2, 64, 32, 34, k=5, stride=2),
        _blocks("blocks_statistics", 2, 77, 39, 37, **_TRAINING),
        _blocks("blocks_5x5_statistics", 2, 64, 32, 34, k=5, stride=2, **_TRAINING),
        _real("d0_first", 1, 32, 256, 256),
        _real("d0_3x3_stride2", 1, 96, 256, 256, stride=2),
        _real("d0_5x5", 1, 240, 64, 64, k=5),
        _real("d0_late_batch8", 8, 1152, 16, 16, k=5),
        _real("d0_training", 1, 144, 128, 128, k=5, stride=2, **_TRAINING),
        _real("d0_first_batch128", 2, 32, 256, 256, tags=GPU, times=64),
        _real("d0_5x5_batch128", 2, 240, 64, 64, k=5, tags=GPU, times=64),
        _real("d4_first", 1, 48, 512, 512),
        _real("d4_5x5", 1, 336, 128, 128, k=5),
        _real("d4_late_batch32", 2, 1632, 32, 32, k=5, tags=GPU, times=16),
        _real("d7_first", 1, 56, 768, 768, tags=GPU),
        _real("d7_3x3_stride2", 1, 192, 768, 768, stride=2, tags=GPU),
        _real("d7_late", 1, 2064, 48, 48, k=5),
    ),
    mutants={
        "kernel flipped": mutant(_reference, lambda a: {"weight": a["weight"].flip(2, 3)}),
        "left and right, top and bottom padding swapped": mutant(
            _reference, lambda a: {"padding": [a["padding"][i] for i in (1, 0, 3, 2)]}
        ),
        "shift forgotten": mutant(_reference, lambda a: {"shift": None}),
        "activation before BN": _act_before_bn,
        "statistics of the last image": _of_last,
        "sums of the values before the activation": _sums_before_activation,
        "result rounded to bfloat16 before BN": _rounded_result,
    },
    diff_args=("x", "weight", "scale", "shift"),
    keep_wide=("scale", "shift"),
    batched=("x",),
    nonfinite=("x", "shift"),
    magnitude=_magnitude,
    reduction=lambda **a: max(a["weight"].shape[2] ** 2, _summed(a)),
    gradient_roundings=1,  # the gradient before the convolution
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
