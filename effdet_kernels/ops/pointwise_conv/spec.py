"""OpSpec of ``pointwise_conv``."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal, per_channel, uniform, weights
from effdet_kernels.ops.pointwise_conv import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec, accumulator, roundoff


def _case(
    name: str,
    *shape: int,
    out: int,
    bn: bool = True,
    gate: bool = False,
    residual: bool = False,
    act: str = "none",
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W] with ``out`` output channels."""

    def make(g) -> Inputs:
        batch, channels, height, width = shape
        return {
            "x": normal(g, *shape),
            "weight": weights(g, out, channels, 1, 1),
            "scale": uniform(g, out, low=0.5, high=1.5) if bn else None,
            "shift": normal(g, out) if bn else None,
            "gate": uniform(g, batch, channels) if gate else None,
            "residual": normal(g, batch, out, height, width) if residual else None,
            "act": act,
        }

    real = max(shape[2:]) >= 16
    return Case(name, make, BENCH if real else frozenset())


def _gated(x: Tensor, gate: Tensor | None) -> Tensor:
    return x if gate is None else x * gate[:, :, None, None]


def _magnitude(x, weight, scale, shift, gate, residual, **_) -> list[Tensor]:
    conv = F.conv2d(_gated(x, gate).abs(), weight.abs())
    y = conv * per_channel(scale, 1).abs() + per_channel(shift, 0).abs()
    return [y if residual is None else y + residual.abs()]


def _terms(inputs: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The gated input may be rounded to the input's dtype before the product."""
    if inputs["gate"] is None or dtype == accumulator(dtype):
        return []
    square = F.conv2d(_gated(inputs["x"], inputs["gate"]).square(), inputs["weight"].square())
    return [4 * roundoff(dtype) * square.sqrt() * per_channel(inputs["scale"], 1).abs()]


def _bytes(x, weight, scale, shift, gate, residual, **_) -> int:
    out = x.nbytes // x.shape[1] * weight.shape[0]
    return nbytes(x, weight, scale, shift, gate, residual) + out


def _rounded_result(**a: Any) -> Tensor:
    product = F.conv2d(_gated(a["x"], a["gate"]), a["weight"]).bfloat16().double()
    y = ACTIVATIONS[a["act"]](product * per_channel(a["scale"], 1) + per_channel(a["shift"], 0))
    return y if a["residual"] is None else y + a["residual"]


def _residual_before_activation(**a: Any) -> Tensor:
    y = reference.pointwise_conv(**{**a, "act": "none"})
    return ACTIVATIONS[a["act"]](y)


_reference = reference.pointwise_conv

SPEC = OpSpec(
    name="pointwise_conv",
    op=op.pointwise_conv,
    reference=_reference,
    cases=(
        _case("expand", 2, 5, 3, 4, out=7, act="swish"),
        _case("project", 2, 9, 4, 3, out=5, gate=True, residual=True),
        _case("all", 1, 6, 3, 5, out=6, gate=True, residual=True, act="relu"),
        _case("raw", 1, 4, 5, 3, out=3, bn=False),
        _case("raw_gated", 2, 3, 2, 2, out=4, bn=False, gate=True),
        _case("one_pixel", 2, 17, 1, 1, out=1, act="hard_swish"),
        _case("no_images", 0, 4, 2, 3, out=5, gate=True),
        _case("d0_expand", 1, 16, 256, 256, out=96, act="swish"),
        _case("d0_project", 1, 240, 64, 64, out=40, gate=True, residual=True),
        _case("d0_lateral_batch8", 8, 320, 16, 16, out=64),
    ),
    mutants={
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
    magnitude=_magnitude,
    reduction=lambda weight, **_: weight.shape[1],
    terms=_terms,
    bytes=_bytes,
    flops=lambda x, weight, **_: 2 * x.numel() * weight.shape[0],
)
