"""OpSpec of ``mbconv``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import accumulator, envelope, roundoff
from effdet_kernels.ops._activations import ACTIVATIONS
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
from effdet_kernels.ops.mbconv import op, reference
from effdet_kernels.ops.pointwise_conv.reference import pointwise_conv
from effdet_kernels.ops.squeeze_excite.reference import squeeze_excite
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *shape: int,
    expand: int | None,
    reduced: int,
    out: int,
    k: int = 3,
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W] expanded to ``expand`` channels, or not."""

    def make(g) -> Inputs:
        wide = shape[1] if expand is None else expand
        opening: Inputs = {"expand_weight": None, "expand_scale": None, "expand_shift": None}
        if expand is not None:
            opening = {
                "expand_weight": weights(g, expand, shape[1], 1, 1),
                "expand_scale": uniform(g, expand, low=0.5, high=1.5),
                "expand_shift": normal(g, expand),
            }
        return {
            "x": normal(g, *shape, std=std),
            **opening,
            "dw_weight": weights(g, wide, 1, k, k),
            "dw_scale": uniform(g, wide, low=0.5, high=1.5),
            "dw_shift": normal(g, wide),
            "se_reduce_weight": weights(g, reduced, wide, 1, 1),
            "se_reduce_bias": normal(g, reduced),
            "se_expand_weight": weights(g, wide, reduced, 1, 1),
            "se_expand_bias": normal(g, wide),
            "weight": weights(g, out, wide, 1, 1),
            "scale": uniform(g, out, low=0.5, high=1.5),
            "shift": normal(g, out),
            "stride": 1,
            "padding": SAME[k],
            "act": "swish",
            "se_act": "swish",
            "gate": "sigmoid",
            "residual": False,
            **options,
        }

    return Case(name, make, tags, times=times)


def _depthwise(maps: Tensor, weight: Tensor, a: Inputs) -> Tensor:
    padded = F.pad(maps, tuple(a["padding"]))
    return F.conv2d(padded, weight, stride=a["stride"], groups=len(weight))


def _expanded(a: Inputs) -> Tensor:
    if a["expand_weight"] is None:
        return a["x"]
    vectors = a["expand_scale"], a["expand_shift"]
    return pointwise_conv(a["x"], a["expand_weight"], *vectors, None, None, a["act"])[0]


def _affine(y: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return y * per_channel(scale, 1).abs() + per_channel(shift, 0).abs()


def _gate_steps(means: Tensor, a: Inputs, biases: bool) -> Tensor:
    """Squeeze-excite on absolute values; without biases: how far an error of the means carries."""
    names = "se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias"
    reduce, first, expand, last = (a[name].abs().to(means.dtype) for name in names)
    hidden = F.linear(means, reduce.flatten(1), first if biases else None)
    hidden = envelope(hidden, a["se_act"])
    return envelope(F.linear(hidden, expand.flatten(1), last if biases else None), a["gate"])


def _wide_magnitude(a: Inputs) -> Tensor:
    e = a["x"].abs()
    if a["expand_weight"] is not None:
        e = F.conv2d(e, a["expand_weight"].abs())
        e = envelope(_affine(e, a["expand_scale"], a["expand_shift"]), a["act"])
    y = _affine(_depthwise(e, a["dw_weight"].abs(), a), a["dw_scale"], a["dw_shift"])
    return envelope(y, a["act"])


def _projected(maps: Tensor, a: Inputs) -> Tensor:
    return F.conv2d(maps, a["weight"].abs()) * per_channel(a["scale"], 1).abs()


def _magnitude(**a: Any) -> list[Tensor]:
    """A gate is at most 1, and off by what the wide map carries to it."""
    wide = _wide_magnitude(a)
    gates = 1 + _gate_steps(wide.mean((2, 3)), a, biases=True)
    y = _projected(wide * gates[:, :, None, None], a) + per_channel(a["shift"], 0).abs()
    return [y + a["x"].abs() if a["residual"] else y]


def _terms(a: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The expanded and the wide map are rounded to the input's dtype, and perhaps their gated values."""
    if dtype == accumulator(dtype):
        return []
    step = roundoff(dtype)
    wide, gates = _wide(a)
    off = torch.zeros_like(wide)
    if a["expand_weight"] is not None:
        square = _depthwise(_expanded(a).square(), a["dw_weight"].square(), a)
        off = 4 * step * square.sqrt() * per_channel(a["dw_scale"], 1).abs()
    carried = _gate_steps(off.mean((2, 3)), a, biases=False)[:, :, None, None]
    gated = off * gates.abs() + wide.abs() * carried
    rounded = 4 * step * _root(wide * gates, a)
    return [_projected(gated, a) + rounded]


def _wide(a: Inputs) -> tuple[Tensor, Tensor]:
    """The wide map and its gates [B, E, 1, 1]."""
    y = _depthwise(_expanded(a), a["dw_weight"], a)
    y = y * per_channel(a["dw_scale"], 1) + per_channel(a["dw_shift"], 0)
    wide = ACTIVATIONS[a["act"]](y)
    names = "se_reduce_weight", "se_reduce_bias", "se_expand_weight", "se_expand_bias"
    excite: Any = [a[name] for name in names]
    how: Any = wide.shape[2] * wide.shape[3], a["se_act"], a["gate"]
    gates = squeeze_excite(wide.sum((2, 3)), *excite, *how)
    return wide, gates[:, :, None, None]


def _root(maps: Tensor, a: Inputs) -> Tensor:
    """Errors of a sum's addends that are as large as they are, and independent."""
    squares = F.conv2d(maps.square(), a["weight"].square())
    return squares.sqrt() * per_channel(a["scale"], 1).abs()


def _out_pixels(x, dw_weight, stride, padding, **_) -> int:
    left, right, top, bottom = padding
    k = dw_weight.shape[2]
    height = (x.shape[2] + top + bottom - k) // stride + 1
    return height * ((x.shape[3] + left + right - k) // stride + 1)


def _bytes(**a: Any) -> int:
    """Compulsory; two launches also write and read the wide map."""
    written = a["x"].shape[0] * len(a["weight"]) * _out_pixels(**a) * a["x"].element_size()
    return nbytes(*a.values()) + written


def _flops(**a: Any) -> int:
    wide, pixels = len(a["dw_weight"]), a["x"].shape[0] * _out_pixels(**a)
    expansion = 0 if a["expand_weight"] is None else 2 * a["x"].numel() * wide
    taps = 2 * pixels * wide * a["dw_weight"].shape[2] ** 2
    excite = 4 * a["x"].shape[0] * a["se_reduce_weight"].numel()
    return expansion + taps + excite + 2 * pixels * wide * len(a["weight"])


def _gates_of_the_first(**a: Any) -> Tensor:
    """Every image has the gates of the first."""
    first = {**a, "x": a["x"][:1].expand_as(a["x"])}
    wide, _ = _wide(a)
    _, gates = _wide(first)
    added = a["x"] if a["residual"] else None
    args = a["weight"], a["scale"], a["shift"], gates[:, :, 0, 0].to(wide.dtype), added, "none"
    return pointwise_conv(wide, *args)[0]


_reference = reference.mbconv
_vectors = functools.partial(_case, tags=VECTORS)


def _real(
    name: str, *shape: int, out: int, k: int = 3, stride: int = 1, tags=BENCH, times=1
) -> Case:
    """A block of EfficientNet, which expands six times and squeezes to a quarter of its input."""
    options: Inputs = {"tags": tags, "times": times, "stride": stride, "k": k}
    options["padding"] = (SAME if stride == 1 else HALVED)[k]
    options["residual"] = stride == 1 and out == shape[1]
    return _case(name, *shape, expand=6 * shape[1], reduced=shape[1] // 4, out=out, **options)


SPEC = OpSpec(
    name="mbconv",
    op=op.mbconv,
    reference=_reference,
    cases=(
        _case("3x3", 2, 3, 5, 4, expand=7, reduced=2, out=3, residual=True),
        _case("5x5_stride2", 2, 3, 8, 7, expand=5, reduced=3, out=4, k=5, stride=2),
        _case("not_expanded", 2, 6, 6, 5, expand=None, reduced=3, out=5),
        _case("not_expanded_residual", 1, 4, 3, 4, expand=None, reduced=1, out=4, residual=True),
        _case(
            "hard",
            2,
            3,
            4,
            4,
            expand=6,
            reduced=2,
            out=3,
            act="hard_swish",
            se_act="relu",
            gate="hard_sigmoid",
        ),
        *[
            _case(f"far_{act}", 1, 2, 3, 4, expand=3, reduced=2, out=2, act=act, std=FAR)
            for act in ACTS
        ],
        _case("one_pixel", 1, 3, 1, 1, expand=4, reduced=1, out=2),
        _case("no_images", 0, 3, 4, 4, expand=6, reduced=2, out=3, residual=True),
        _vectors("vectors", 2, 8, 4, 35, expand=24, reduced=3, out=8, residual=True),
        _vectors(
            "vectors_stride2",
            1,
            24,
            9,
            18,
            expand=16,
            reduced=6,
            out=40,
            stride=2,
            padding=(0, 1, 0, 1),
        ),
        _vectors(
            "vectors_5x5",
            2,
            16,
            6,
            7,
            expand=40,
            reduced=8,
            out=16,
            k=5,
            gate="hard_sigmoid",
            se_act="relu",
        ),
        _vectors("vectors_not_expanded", 2, 32, 5, 6, expand=None, reduced=8, out=16),
        _vectors("vectors_deep", 1, 200, 3, 4, expand=64, reduced=10, out=8),
        _vectors("vectors_no_images", 0, 8, 2, 3, expand=8, reduced=2, out=8),
        *[
            _vectors(
                f"vectors_far_{act}",
                1,
                8,
                2,
                3,
                expand=8,
                reduced=4,
                out=8,
                act=act,
                se_act=act,
                std=FAR,
            )
            for act in ACTS
        ],
        _case("blocks", 2, 21, 19, 37, expand=77, reduced=5, out=67, tags=BLOCKS),
        _real("blocks_vectors", 2, 24, 7, 35, out=24, k=5, tags=BLOCKS),
        _real("blocks_vectors_stride2", 2, 16, 21, 34, out=24, stride=2, tags=BLOCKS),
        _real("d0_early", 1, 16, 256, 256, out=24, stride=2),
        _real("d0_wide", 1, 24, 128, 128, out=24),
        _real("d0_middle", 1, 40, 64, 64, out=40, k=5),
        _real("d0_late_batch8", 8, 192, 16, 16, out=192, k=5),
        _real("d0_late_batch128", 2, 192, 16, 16, out=192, k=5, tags=GPU, times=64),
        _real("d4_late", 1, 272, 32, 32, out=272, k=5),
        _real("d7_late", 1, 576, 48, 48, out=576),
    ),
    mutants={
        "no squeeze-excite": mutant(
            _reference, lambda a: {"se_expand_bias": torch.full_like(a["se_expand_bias"], 99.0)}
        ),
        "gates of the first image": _gates_of_the_first,
        "no activation inside": mutant(_reference, lambda _: {"act": "none"}),
        "residual forgotten": mutant(_reference, lambda _: {"residual": False}),
        "last shift forgotten": mutant(
            _reference, lambda a: {"shift": torch.zeros_like(a["shift"])}
        ),
        "kernel flipped": mutant(_reference, lambda a: {"dw_weight": a["dw_weight"].flip(2, 3)}),
    },
    keep_wide=("expand_scale", "expand_shift", "dw_scale", "dw_shift", "scale", "shift"),
    batched=("x",),
    nonfinite=("x", "dw_shift", "shift"),
    magnitude=_magnitude,
    reduction=lambda **a: max(
        a["x"].shape[1], len(a["dw_weight"]), _out_pixels(**a), a["dw_weight"].shape[2] ** 2
    ),
    terms=_terms,
    bytes=_bytes,
    flops=_flops,
)
