"""OpSpec of ``expand_depthwise``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import accumulator, envelope, roundoff
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
)
from effdet_kernels.ops.depthwise_conv import op as depthwise
from effdet_kernels.ops.depthwise_conv.reference import depthwise_conv
from effdet_kernels.ops.expand_depthwise import op, reference
from effdet_kernels.ops.pointwise_conv import op as pointwise
from effdet_kernels.ops.pointwise_conv.reference import pointwise_conv
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *shape: int,
    expand: int,
    k: int = 3,
    padding: tuple[int, ...] = (1, 1, 1, 1),
    raw: bool = False,
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W] expanded to ``expand`` channels."""

    def make(g) -> Inputs:
        arguments = {
            "x": normal(g, *shape, std=std),
            "expand_weight": weights(g, expand, shape[1], 1, 1),
            "expand_scale": uniform(g, expand, low=0.5, high=1.5),
            "expand_shift": normal(g, expand),
            "dw_weight": weights(g, expand, 1, k, k),
            "scale": None if raw else uniform(g, expand, low=0.5, high=1.5),
            "shift": None if raw else normal(g, expand),
            "stride": 1,
            "padding": padding,
            "act": "swish",
            "squeeze": False,
        }
        return {**arguments, **options}

    return Case(name, make, tags, times=times)


def _expanded(a: Inputs) -> Tensor:
    return pointwise_conv(
        a["x"], a["expand_weight"], a["expand_scale"], a["expand_shift"], None, None, a["act"]
    )[0]


def _last_act(a: Inputs) -> str:
    return "none" if a["scale"] is None and a["shift"] is None else a["act"]


def _depthwise(maps: Tensor, weight: Tensor, a: Inputs) -> Tensor:
    return F.conv2d(
        F.pad(maps, tuple(a["padding"])), weight, stride=a["stride"], groups=len(weight)
    )


def _magnitude(**a: Any) -> list[Tensor]:
    scale, shift = (per_channel(a[name], 0).abs() for name in ("expand_scale", "expand_shift"))
    expanded = F.conv2d(a["x"].abs(), a["expand_weight"].abs()) * scale + shift
    y = _depthwise(envelope(expanded, a["act"]), a["dw_weight"].abs(), a)
    y = y * per_channel(a["scale"], 1).abs() + per_channel(a["shift"], 0).abs()
    y = envelope(y, _last_act(a))
    return [y, y.sum((2, 3))] if a["squeeze"] else [y]


def _terms(a: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The expanded map may be rounded to the input's dtype."""
    if dtype == accumulator(dtype):
        return []
    square = _depthwise(_expanded(a).square(), a["dw_weight"].square(), a)
    term = 4 * roundoff(dtype) * square.sqrt() * per_channel(a["scale"], 1).abs()
    return [term, term.sum((2, 3))] if a["squeeze"] else [term]


def _out_pixels(x, dw_weight, stride, padding, **_) -> int:
    left, right, top, bottom = padding
    k = dw_weight.shape[2]
    height = (x.shape[2] + top + bottom - k) // stride + 1
    return height * ((x.shape[3] + left + right - k) // stride + 1)


def _written(a: Inputs) -> int:
    maps = a["x"].shape[0] * len(a["dw_weight"])
    sums = maps * max(a["x"].element_size(), 4) if a["squeeze"] else 0
    return maps * _out_pixels(**a) * a["x"].element_size() + sums


def _bytes(**a: Any) -> int:
    return nbytes(*a.values()) + _written(a)


def _backward_bytes(**a: Any) -> int:
    """Reads the inputs and the outputs' gradients, writes a gradient for each input."""
    return 2 * nbytes(*a.values()) + _written(a)


def _products(a: Inputs) -> tuple[int, int]:
    """FLOPs of the expansion and of the depthwise taps."""
    maps = a["x"].shape[0] * len(a["dw_weight"])
    taps = 2 * maps * _out_pixels(**a) * a["dw_weight"].shape[2] ** 2
    return 2 * a["x"].numel() * len(a["dw_weight"]), taps


def _flops(**a: Any) -> int:
    return sum(_products(a))


def _backward_flops(**a: Any) -> int:
    """Both gradients of both convolutions; e, and under an activation z, are needed once more."""
    expansion, taps = _products(a)
    return 3 * expansion + (2 if _last_act(a) == "none" else 3) * taps


def _padded_before_expansion(**a: Any) -> list[Tensor]:
    """Zeros around x become act(expand_shift) around the expanded map."""
    padded = {**a, "x": F.pad(a["x"], tuple(a["padding"])), "padding": (0, 0, 0, 0)}
    return reference.expand_depthwise(**padded)


def _one_activation(first: bool):
    def mutated(**a: Any) -> list[Tensor]:
        vectors = a["expand_scale"], a["expand_shift"]
        (expanded,) = pointwise_conv(
            a["x"], a["expand_weight"], *vectors, None, None, a["act"] if first else "none"
        )
        last = "none" if first else _last_act(a)
        geometry = a["stride"], a["padding"], last, a["squeeze"]
        return depthwise_conv(expanded, a["dw_weight"], a["scale"], a["shift"], *geometry)

    return mutated


def _separate(**a: Any) -> Tensor | tuple[Tensor, ...]:
    """The two convolutions as ops of their own, on the backends that they are given by default: e is stored."""
    vectors = a["expand_scale"], a["expand_shift"]
    expanded = pointwise.pointwise_conv(a["x"], a["expand_weight"], *vectors, act=a["act"])
    assert isinstance(expanded, Tensor)  # no statistics were asked for
    geometry = {name: a[name] for name in ("stride", "padding", "squeeze")}
    return depthwise.depthwise_conv(
        expanded, a["dw_weight"], a["scale"], a["shift"], act=_last_act(a), **geometry
    )


_reference = reference.expand_depthwise
_vectors = functools.partial(_case, tags=VECTORS)


def _real(name: str, *shape: int, k: int = 3, stride: int = 1, tags=BENCH, times=1) -> Case:
    """The opening of an MBConv block, which expands six times."""
    padding, expand = (SAME if stride == 1 else HALVED)[k], 6 * shape[1]
    options: Inputs = {"stride": stride, "squeeze": True, "tags": tags, "times": times}
    return _case(name, *shape, expand=expand, k=k, padding=padding, **options)


SPEC = OpSpec(
    name="expand_depthwise",
    op=op.expand_depthwise,
    reference=_reference,
    cases=(
        _case("3x3", 2, 3, 5, 4, expand=7, squeeze=True),
        _case(
            "5x5_stride2", 1, 3, 8, 7, expand=5, k=5, stride=2, padding=(2, 2, 1, 2), squeeze=True
        ),
        _case("3x3_stride2", 2, 2, 6, 5, expand=6, stride=2, padding=(1, 1, 0, 1), act="relu6"),
        _case("raw", 1, 4, 4, 5, expand=6, raw=True, squeeze=True),
        _case("scale_only", 1, 2, 3, 4, expand=3, shift=None),
        _case("shift_only", 3, 2, 3, 4, expand=3, scale=None),
        _case("5x5", 2, 2, 6, 5, expand=3, k=5, padding=(2, 2, 2, 2)),
        *[_case(f"far_{act}", 1, 2, 3, 4, expand=3, act=act, std=FAR) for act in ACTS],
        _case("one_pixel", 1, 3, 1, 1, expand=4, act="hard_swish"),
        _vectors("vectors", 2, 8, 4, 35, expand=24, squeeze=True),
        _vectors("vectors_stride2", 1, 24, 9, 18, expand=16, stride=2, padding=(0, 1, 0, 1)),
        _vectors("vectors_5x5", 1, 16, 6, 7, expand=40, k=5, padding=SAME[5], squeeze=True),
        _vectors("vectors_5x5_stride2", 1, 8, 8, 5, expand=8, k=5, stride=2, padding=HALVED[5]),
        _vectors("vectors_raw", 1, 8, 3, 4, expand=8, raw=True, squeeze=True),
        _vectors("vectors_scale_only", 1, 8, 3, 4, expand=8, shift=None, padding=(2, 0, 1, 3)),
        _vectors("vectors_shift_only", 1, 8, 4, 4, expand=8, scale=None, padding=(0, 0, 0, 0)),
        *[_vectors(f"vectors_far_{act}", 1, 8, 2, 3, expand=8, act=act, std=FAR) for act in ACTS],
        _vectors("vectors_no_images", 0, 8, 2, 3, expand=8, squeeze=True),
        _vectors("vectors_deep", 1, 200, 3, 4, expand=8),
        _case("no_images", 0, 3, 4, 4, expand=6, squeeze=True),
        _case("blocks", 2, 21, 19, 37, expand=77, squeeze=True, tags=BLOCKS),
        _real("blocks_stride2", 2, 13, 18, 20, stride=2, tags=BLOCKS),
        _real("blocks_5x5", 1, 40, 9, 18, k=5, tags=BLOCKS),
        _real("blocks_5x5_stride2", 2, 16, 24, 34, k=5, stride=2, tags=BLOCKS),
        _real("blocks_vectors", 1, 24, 7, 35, k=5, tags=BLOCKS),
        _real("blocks_vectors_stride2", 2, 16, 21, 34, stride=2, tags=BLOCKS),
        _real("d0_early", 1, 16, 256, 256, stride=2),
        _real("d0_wide", 1, 24, 128, 128),
        _real("d0_middle", 1, 40, 64, 64, k=5),
        _real("d0_late_batch8", 8, 192, 16, 16, k=5),
        _real("d0_early_batch128", 2, 16, 256, 256, stride=2, tags=GPU, times=64),
        _real("d0_late_batch128", 2, 192, 16, 16, k=5, tags=GPU, times=64),
        _real("d4_early", 1, 24, 512, 512, stride=2, tags=GPU),
        _real("d4_middle", 1, 56, 128, 128, k=5),
        _real("d4_late", 1, 272, 32, 32, k=5),
        _real("d7_early", 1, 32, 768, 768, stride=2, tags=GPU),
        _real("d7_middle", 1, 72, 192, 192, k=5, tags=GPU),
        _real("d7_late", 1, 344, 48, 48, k=5),
        _real("d7_last", 1, 576, 48, 48),
    ),
    mutants={
        "padding before the expansion": _padded_before_expansion,
        "no activation after the expansion": _one_activation(first=False),
        "no activation at the end": _one_activation(first=True),
        "kernel flipped": mutant(_reference, lambda a: {"dw_weight": a["dw_weight"].flip(2, 3)}),
        "left and right, top and bottom padding swapped": mutant(
            _reference, lambda a: {"padding": [a["padding"][i] for i in (1, 0, 3, 2)]}
        ),
    },
    peers={"separate": _separate},
    diff_args=("x", "expand_weight", "expand_scale", "expand_shift", "dw_weight", "scale", "shift"),
    keep_wide=("expand_scale", "expand_shift", "scale", "shift"),
    batched=("x",),
    nonfinite=("x", "expand_shift", "shift"),
    magnitude=_magnitude,
    reduction=lambda **a: max(
        a["x"].shape[1], a["dw_weight"].shape[2] ** 2, _out_pixels(**a) if a["squeeze"] else 0
    ),
    terms=_terms,
    gradient_reduction=lambda **a: max(
        len(a["dw_weight"]), a["x"].shape[0] * a["x"].shape[2:].numel()
    ),
    gradient_roundings=4,  # e, its gradient, and those before the two convolutions
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
