"""OpSpec of ``pointwise_conv``."""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import accumulator, envelope, roundoff
from effdet_kernels.ops._activations import ACTIVATIONS, moments
from effdet_kernels.ops._cases import (
    ACTS,
    BENCH,
    BLOCKS,
    FAR,
    GPU,
    VECTORS,
    mutant,
    nbytes,
    normal,
    per_channel,
    uniform,
    weights,
    with_moments_of_errors,
)
from effdet_kernels.ops.pointwise_conv import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *shape: int,
    out: int,
    bn: bool = True,
    gate: bool = False,
    residual: bool = False,
    act: str = "none",
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W] with ``out`` output channels."""

    def make(g) -> Inputs:
        batch, channels, height, width = shape
        return {
            "x": normal(g, *shape, std=std),
            "weight": weights(g, out, channels, 1, 1),
            "scale": uniform(g, out, low=0.5, high=1.5) if bn else None,
            "shift": normal(g, out) if bn else None,
            "gate": uniform(g, batch, channels) if gate else None,
            "residual": normal(g, batch, out, height, width) if residual else None,
            "act": act,
            **options,
        }

    return Case(name, make, tags, times=times)


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate[:, :, None, None]


def _magnitude(x, weight, scale, shift, gate, residual, act, statistics=False) -> list[Tensor]:
    conv = F.conv2d(_gated(x, gate).abs(), weight.abs())
    y = envelope(conv * per_channel(scale, 1).abs() + per_channel(shift, 0).abs(), act)
    y = y if residual is None else y + residual.abs()
    if not statistics:
        return [y]
    (exact,) = reference.pointwise_conv(x, weight, scale, shift, gate, residual, act)
    return with_moments_of_errors([exact], [y])


def _terms(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The gated input may be rounded to the input's dtype before the product."""
    if inputs["gate"] is None or dtype == accumulator(dtype):
        return []
    square = F.conv2d(_gated(inputs["x"], inputs["gate"]).square(), inputs["weight"].square())
    term = 4 * roundoff(dtype) * square.sqrt() * per_channel(inputs["scale"], 1).abs()
    if not inputs.get("statistics"):
        return [term]
    (y,) = reference.pointwise_conv(**{**inputs, "statistics": False})
    return with_moments_of_errors([y], [term])


def _written(x, weight, **_) -> int:
    return x.shape[0] * x.shape[2:].numel() * len(weight) * x.element_size()


def _bytes(**a: Any) -> int:
    moments = (
        2 * len(a["weight"]) * accumulator(a["x"].dtype).itemsize if a.get("statistics") else 0
    )
    return nbytes(*a.values()) + _written(**a) + moments


def _backward_bytes(**a: Any) -> int:
    """Reads the gradient of y and the inputs but the residual, writes a gradient for each input."""
    return 2 * nbytes(*a.values()) - nbytes(a["residual"]) + _written(**a)


def _flops(x, weight, **_) -> int:
    return 2 * x.numel() * len(weight)


def _backward_flops(**a: Any) -> int:
    """The products for x and the weights; act' needs the forward's once more."""
    return (2 if a["act"] == "none" else 3) * _flops(**a)


def _rounded_result(**a: Any) -> list[Tensor]:
    product = F.conv2d(_gated(a["x"], a["gate"]), a["weight"]).bfloat16().double()
    y = ACTIVATIONS[a["act"]](product * per_channel(a["scale"], 1) + per_channel(a["shift"], 0))
    y = y if a["residual"] is None else y + a["residual"]
    return [y, *moments(y)] if a.get("statistics") else [y]


def _residual_before_activation(**a: Any) -> list[Tensor]:
    y, *moments = reference.pointwise_conv(**{**a, "act": "none"})
    return [ACTIVATIONS[a["act"]](y), *moments]


def _moments_of_last(**a: Any) -> list[Tensor]:
    y, *found = reference.pointwise_conv(**a)
    return [y, *moments(y[-1:])] if found else [y]


_reference = reference.pointwise_conv
_vectors = functools.partial(_case, tags=VECTORS)
_SKIPPED: Inputs = {"gate": True, "residual": True}  # the end of an MBConv block with a skip

SPEC = OpSpec(
    name="pointwise_conv",
    op=op.pointwise_conv,
    reference=_reference,
    cases=(
        _case("expand", 2, 5, 3, 4, out=7, act="swish"),
        _case("project", 2, 9, 4, 3, out=5, gate=True, residual=True),
        _case("all", 1, 6, 3, 5, out=6, gate=True, residual=True, act="swish"),
        _case("relu", 2, 3, 5, 1, out=4, residual=True, act="relu"),
        _case("raw", 1, 4, 5, 3, out=3, bn=False),
        _case("scale_only", 3, 4, 2, 3, out=3, shift=None),
        _case("shift_only", 1, 4, 2, 3, out=3, scale=None),
        *[_case(f"far_{act}", 1, 4, 3, 4, out=3, act=act, std=FAR) for act in ACTS],
        _case("raw_gated", 2, 3, 2, 2, out=4, bn=False, gate=True),
        _case("one_pixel", 2, 17, 1, 1, out=1, act="hard_swish"),
        _case("statistics", 3, 5, 3, 4, out=7, bn=False, statistics=True),
        _case("statistics_gated", 2, 4, 5, 3, out=3, gate=True, statistics=True),
        _vectors("vectors", 2, 24, 5, 7, out=40, act="swish", **_SKIPPED),
        _vectors("vectors_raw", 1, 8, 3, 3, out=8, bn=False),
        _vectors("vectors_scale_only", 3, 8, 2, 3, out=16, shift=None),
        _vectors("vectors_shift_only", 1, 16, 2, 3, out=24, scale=None, residual=True),
        _vectors("vectors_gated", 2, 40, 1, 9, out=8, bn=False, gate=True),
        _vectors("vectors_deep", 1, 264, 5, 7, out=24, act="relu", **_SKIPPED),
        *[_vectors(f"vectors_far_{act}", 1, 8, 3, 5, out=8, act=act, std=FAR) for act in ACTS],
        _vectors("vectors_no_images", 0, 8, 2, 3, out=8, gate=True),
        _case("no_images", 0, 4, 2, 3, out=5, gate=True),
        _case("blocks", 2, 77, 19, 37, out=83, act="swish", **_SKIPPED, tags=BLOCKS),
        _case("blocks_whole", 1, 64, 16, 32, out=64, act="swish", tags=BLOCKS),
        _case("blocks_vectors", 2, 88, 9, 19, out=72, act="swish", **_SKIPPED, tags=BLOCKS),
        _case("blocks_vectors_deep", 1, 536, 5, 7, out=144, tags=BLOCKS),
        _case("blocks_statistics", 2, 21, 19, 37, out=77, bn=False, statistics=True, tags=BLOCKS),
        _case("blocks_deep", 1, 530, 5, 7, out=147, tags=BLOCKS),
        _case("d0_first_project", 1, 32, 256, 256, out=16, gate=True, tags=BENCH),
        _case("d0_expand", 1, 16, 256, 256, out=96, act="swish", tags=BENCH),
        _case("d0_project", 1, 240, 64, 64, out=40, **_SKIPPED, tags=BENCH),
        _case("d0_late_batch8", 8, 1152, 16, 16, out=192, **_SKIPPED, tags=BENCH),
        _case("d0_lateral_batch8", 8, 320, 16, 16, out=64, tags=BENCH),
        _case("d0_project_batch128", 2, 144, 128, 128, out=24, **_SKIPPED, tags=GPU, times=64),
        _case("d0_late_batch128", 2, 1152, 16, 16, out=192, **_SKIPPED, tags=GPU, times=64),
        _case("d4_project", 1, 192, 256, 256, out=32, **_SKIPPED, tags=BENCH),
        _case("d4_late", 1, 1632, 32, 32, out=272, **_SKIPPED, tags=BENCH),
        _case("d4_lateral", 1, 56, 128, 128, out=224, tags=BENCH),
        _case("d7_first_project", 1, 56, 768, 768, out=32, gate=True, tags=GPU),
        _case("d7_project", 1, 240, 384, 384, out=40, **_SKIPPED, tags=GPU),
        _case("d7_middle", 1, 432, 192, 192, out=72, **_SKIPPED, tags=BENCH),
        _case("d7_late", 1, 3456, 48, 48, out=576, **_SKIPPED, tags=BENCH),
    ),
    mutants={
        "statistics of the last image": _moments_of_last,
        "gate ignored": mutant(_reference, lambda a: {"gate": None}),
        "gate of the next channel": mutant(
            _reference, lambda a: {"gate": None if a["gate"] is None else a["gate"].roll(1, 1)}
        ),
        "residual before the activation": _residual_before_activation,
        "shift forgotten": mutant(_reference, lambda a: {"shift": None}),
        "last channel left out": mutant(
            _reference, lambda a: {"x": torch.cat([a["x"][:, :-1], 0 * a["x"][:, -1:]], 1)}
        ),
        "result rounded to bfloat16 before BN": _rounded_result,
    },
    diff_args=("x", "weight", "scale", "shift", "gate", "residual"),
    keep_wide=("scale", "shift"),
    batched=("x", "gate", "residual"),
    nonfinite=("x", "shift", "gate", "residual"),
    magnitude=_magnitude,
    reduction=lambda weight, **_: weight.shape[1],
    terms=_terms,
    gradient_roundings=3,  # the gated input, and the gradients on both sides of the weights
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
