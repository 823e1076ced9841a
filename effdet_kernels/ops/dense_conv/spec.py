"""OpSpec of ``dense_conv``."""

from __future__ import annotations

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
    mutant,
    nbytes,
    normal,
    per_channel,
    uniform,
    weights,
    with_moments_of_errors,
)
from effdet_kernels.ops._statistics import with_moments
from effdet_kernels.ops.dense_conv import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_HALVED = (0, 1, 0, 1)  # "same" of a 3x3 kernel with stride 2 on even sizes


def _case(
    name: str,
    *shape: int,
    out: int,
    k: int = 3,
    stride: int = 1,
    padding: tuple[int, ...] = (1, 1, 1, 1),
    bn: bool = True,
    act: str = "swish",
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W] with ``out`` output channels."""

    def make(g) -> Inputs:
        return {
            "x": normal(g, *shape, std=std),
            "weight": weights(g, out, shape[1], k, k),
            "scale": uniform(g, out, low=0.5, high=1.5) if bn else None,
            "shift": normal(g, out) if bn else None,
            "stride": stride,
            "padding": padding,
            "act": act,
            **options,
        }

    return Case(name, make, tags, times=times)


def _magnitude(x, weight, scale, shift, stride, padding, act, statistics=False) -> list[Tensor]:
    conv = F.conv2d(F.pad(x.abs(), tuple(padding)), weight.abs(), stride=stride)
    y = envelope(conv * per_channel(scale, 1).abs() + per_channel(shift, 0).abs(), act)
    if not statistics:
        return [y]
    exact = reference.dense_conv(x, weight, scale, shift, stride, padding, act)
    return with_moments_of_errors(exact, [y])


def _out_pixels(x, weight, stride, padding, **_) -> int:
    left, right, top, bottom = padding
    k = weight.shape[2]
    height = (x.shape[2] + top + bottom - k) // stride + 1
    width = (x.shape[3] + left + right - k) // stride + 1
    return x.shape[0] * height * width


def _out_elements(**a: Any) -> int:
    return len(a["weight"]) * _out_pixels(**a)


def _reduction(**a: Any) -> int:
    return max(a["weight"][0].numel(), _out_pixels(**a) if a.get("statistics") else 0)


def _inputs(a: Inputs) -> int:
    return nbytes(a["x"], a["weight"], a["scale"], a["shift"])


def _bytes(**a: Any) -> int:
    vectors = 2 * len(a["weight"]) if a.get("statistics") else 0
    wide = accumulator(a["x"].dtype).itemsize
    return _inputs(a) + _out_elements(**a) * a["x"].element_size() + vectors * wide


def _backward_bytes(**a: Any) -> int:
    """Reads the inputs and the output's gradient, writes a gradient for each input."""
    return 2 * _inputs(a) + _out_elements(**a) * a["x"].element_size()


def _flops(**a: Any) -> int:
    return 2 * _out_elements(**a) * a["weight"][0].numel()


def _backward_flops(**a: Any) -> int:
    """The products for x and the weights; act' needs the forward's once more."""
    return (2 if a["act"] == "none" else 3) * _flops(**a)


def _act_before_bn(**a: Any) -> list[Tensor]:
    y = reference.dense_conv(**{**a, "scale": None, "shift": None})[0]
    return _results(a, y * per_channel(a["scale"], 1) + per_channel(a["shift"], 0))


def _results(a: Inputs, y: Tensor) -> list[Tensor]:
    """The outputs of a wrong y."""
    return with_moments([y], y.dtype) if a.get("statistics") else [y]


def _rounded_result(**a: Any) -> list[Tensor]:
    y = reference.dense_conv(**{**a, "scale": None, "shift": None, "act": "none"})[0]
    y = y.bfloat16().double() * per_channel(a["scale"], 1) + per_channel(a["shift"], 0)
    return _results(a, ACTIVATIONS[a["act"]](y))


def _statistics_of_last(**a: Any) -> list[Tensor]:
    y, *found = reference.dense_conv(**a)
    return [y, *moments(y[-1:])] if found else [y]


_reference = reference.dense_conv
_TRAINING: Inputs = {
    "stride": 2, "padding": _HALVED, "bn": False, "act": "none", "statistics": True,
}  # fmt: skip

SPEC = OpSpec(
    name="dense_conv",
    op=op.dense_conv,
    reference=_reference,
    cases=(
        _case("stem", 2, 3, 8, 10, out=7, stride=2, padding=_HALVED),
        _case("stem_odd", 1, 3, 9, 7, out=5, stride=2, act="hard_swish"),
        _case("3x3", 2, 5, 4, 6, out=4, act="relu6"),
        _case("5x5_stride2", 1, 3, 9, 8, out=4, k=5, stride=2, padding=(1, 2, 2, 2), act="mish"),
        _case("stride3", 2, 3, 11, 10, out=3, stride=3),
        _case("1x1", 2, 5, 3, 4, out=6, k=1, padding=(0, 0, 0, 0), act="relu"),
        _case("1x1_stride2", 1, 4, 5, 6, out=3, k=1, stride=2, padding=(0, 0, 0, 0)),
        _case("one_channel", 2, 1, 5, 4, out=1, act="leaky_relu"),
        _case("raw", 1, 4, 5, 5, out=3, bn=False, act="none"),
        _case("scale_only", 1, 3, 4, 5, out=4, shift=None),
        _case("shift_only", 1, 3, 4, 5, out=4, scale=None),
        _case("uneven_padding", 3, 3, 5, 4, out=4, padding=(2, 0, 1, 3)),
        _case("no_padding", 1, 2, 6, 3, out=3, padding=(0, 0, 0, 0)),
        _case("one_pixel", 2, 3, 1, 1, out=4),
        _case("9x9", 1, 2, 4, 6, out=2, k=9, padding=(4, 4, 4, 4)),
        *[_case(f"far_{act}", 1, 3, 4, 5, out=3, act=act, std=FAR) for act in ACTS],
        _case("statistics", 2, 3, 8, 9, out=5, stride=2, bn=False, act="none", statistics=True),
        _case("statistics_wide", 2, 11, 5, 4, out=3, statistics=True),
        _case("no_images", 0, 3, 4, 4, out=5),
        _case("blocks", 2, 21, 11, 37, out=67, tags=BLOCKS),
        _case("blocks_stem", 2, 3, 38, 70, out=40, stride=2, padding=_HALVED, tags=BLOCKS),
        _case("blocks_wide", 1, 16, 8, 16, out=147, tags=BLOCKS),
        _case("blocks_statistics", 2, 3, 38, 70, out=40, **_TRAINING, tags=BLOCKS),
        _case("d0_stem", 1, 3, 512, 512, out=32, stride=2, padding=_HALVED, tags=BENCH),
        _case("d0_stem_batch8", 8, 3, 512, 512, out=32, stride=2, padding=_HALVED, tags=BENCH),
        _case("d0_stem_training", 1, 3, 512, 512, out=32, **_TRAINING, tags=BENCH),
        _case("d4_stem", 1, 3, 1024, 1024, out=48, stride=2, padding=_HALVED, tags=BENCH),
        _case("d7_stem", 1, 3, 1536, 1536, out=64, stride=2, padding=_HALVED, tags=GPU),
        _case("d0_edgetpu_expand", 1, 24, 128, 128, out=192, stride=2, padding=_HALVED, tags=BENCH),
        _case(
            "d0_stem_batch128",
            2,
            3,
            512,
            512,
            out=32,
            stride=2,
            padding=_HALVED,
            tags=GPU,
            times=64,
        ),
    ),
    mutants={
        "kernel flipped": mutant(_reference, lambda a: {"weight": a["weight"].flip(2, 3)}),
        "left and right, top and bottom padding swapped": mutant(
            _reference, lambda a: {"padding": [a["padding"][i] for i in (1, 0, 3, 2)]}
        ),
        "channels in another order": mutant(
            _reference, lambda a: {"weight": a["weight"].roll(1, 1)}
        ),
        "statistics of the last image": _statistics_of_last,
        "shift forgotten": mutant(_reference, lambda a: {"shift": None}),
        "activation before BN": _act_before_bn,
        "result rounded to bfloat16 before BN": _rounded_result,
    },
    diff_args=("x", "weight", "scale", "shift"),
    keep_wide=("scale", "shift"),
    batched=("x",),
    nonfinite=("x", "shift"),
    magnitude=_magnitude,
    reduction=_reduction,
    gradient_roundings=1,  # the gradient before the convolution
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
