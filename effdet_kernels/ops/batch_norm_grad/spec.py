"""OpSpec of ``batch_norm_grad``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels.bound import STEEPEST
from effdet_kernels.ops._activations import moments
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
)
from effdet_kernels.ops.batch_norm_grad import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_AXES = (0, 2, 3)
_ROUNDINGS = 16  # one after the other in the longest chain of an element of dx, those inside an activation with it


def _case(
    name: str,
    *shape: int,
    dx: bool = True,
    mean: float = 0.0,
    std: float = 1.0,
    gain: float = 1.0,
    eps: float = 1e-3,
    act: str = "swish",
    tags: frozenset[str] = frozenset(),
) -> Case:
    """A case on maps of ``shape`` [B, C, H, W], with statistics of more images than are here; ``dx`` or the sums."""

    def make(g) -> Inputs:
        x = normal(g, *shape, std=std) + mean
        channels = shape[1]
        here = moments(x) if x.numel() else (torch.zeros(channels), torch.ones(channels))
        shift = normal(g, channels, std=0.3 * std)
        return {
            "grad": normal(g, *shape),
            "x": x,
            "weight": uniform(g, channels, low=0.5, high=1.5) * gain,
            "bias": normal(g, channels),
            "mean": here[0] + shift,
            "variance": 0.8 * here[1] + shift.square() + 1e-6,
            "eps": eps,
            "act": act,
            "averages": normal(g, 2, channels, std=0.2) if dx else None,
        }

    return Case(name, make, tags)


def _terms(a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised x, its factor, and of delta the size and what its error is in proportion to."""
    rate = torch.rsqrt(a["variance"] + a["eps"])
    value = (a["x"] - per_channel(a["mean"], 0)) * per_channel(rate, 1)
    size, weight, bias = a["grad"].abs(), a["weight"].abs(), a["bias"].abs()
    if a["act"] == "none":
        return value, rate, size, size
    argument = per_channel(weight, 1) * value.abs() + per_channel(bias, 0)
    return value, rate, STEEPEST * size, size * (STEEPEST + argument)


def _magnitude(**a: Any) -> list[Tensor]:
    """Derived in the README."""
    value, rate, size, error = _terms(a)
    if a["averages"] is None:
        along = ((error + size) * value.abs()).sum(_AXES)
        return [torch.stack([along, error.sum(_AXES)])]
    along, total = a["averages"].abs()
    terms = error + per_channel(total, 0) + 2 * value.abs() * per_channel(along, 0)
    return [per_channel(a["weight"].abs() * rate, 1) * terms]


def _reduction(grad, averages, **_) -> int:
    return max(1, grad.numel() // grad.shape[1]) if averages is None else _ROUNDINGS


def _bytes(grad, x, weight, bias, mean, variance, averages, **_) -> int:
    """Reads the maps and the vectors; writes the sums, or reads their averages and writes dx."""
    vectors = nbytes(weight, bias, mean, variance)
    if averages is None:
        return grad.nbytes + x.nbytes + vectors + 2 * mean.nbytes
    return grad.nbytes + 2 * x.nbytes + vectors + averages.nbytes


def _eps_outside(**a: Any) -> Tensor:
    """1 / (sqrt(variance) + eps)."""
    variance = (a["variance"].sqrt() + a["eps"]).square() - a["eps"]
    return _reference(**{**a, "variance": variance})


def _averages(change) -> Any:
    return mutant(
        _reference,
        lambda a: {"averages": None if a["averages"] is None else change(a["averages"])},
    )


_reference = reference.batch_norm_grad

SPEC = OpSpec(
    name="batch_norm_grad",
    op=op.batch_norm_grad,
    reference=_reference,
    cases=(
        _case("swish", 2, 5, 7, 3),
        _case("sums", 2, 5, 7, 3, dx=False),
        _case("none", 3, 3, 4, 4, act="none"),
        _case("sums_none", 3, 3, 4, 4, act="none", dx=False),
        _case("offset", 2, 3, 5, 6, mean=100.0, act="relu"),
        _case("sums_offset", 2, 3, 5, 6, mean=100.0, act="relu", dx=False),
        _case("narrow", 2, 3, 5, 4, std=1e-2, eps=1e-5, act="mish"),
        _case("one_value", 1, 4, 1, 1, act="hard_swish"),
        _case("sums_one_value", 1, 4, 1, 1, act="hard_swish", dx=False),
        _case("empty", 0, 3, 4, 5),
        _case("sums_empty", 0, 3, 4, 5, dx=False),
        *[_case(f"far_{act}", 2, 3, 4, 5, act=act, gain=FAR) for act in ACTS],
        *[_case(f"sums_far_{act}", 2, 3, 4, 5, act=act, gain=FAR, dx=False) for act in ACTS],
        _case("blocks", 2, 77, 19, 37, mean=3.0, tags=BLOCKS),
        _case("blocks_sums", 7, 77, 19, 37, mean=3.0, dx=False, tags=BLOCKS),
        _case("blocks_channels", 2, 147, 5, 6, dx=False, tags=BLOCKS),
        _case("d0_stem", 1, 32, 256, 256, tags=BENCH),
        _case("d0_stem_sums", 1, 32, 256, 256, dx=False, tags=BENCH),
        _case("d0_late_batch8", 8, 1152, 16, 16, tags=BENCH),
        _case("d0_late_batch8_sums", 8, 1152, 16, 16, dx=False, tags=BENCH),
        _case("d0_stem_batch32", 32, 32, 256, 256, tags=GPU),
        _case("d0_stem_batch32_sums", 32, 32, 256, 256, dx=False, tags=GPU),
        _case("d4_middle", 1, 336, 128, 128, tags=BENCH),
        _case("d7_head", 1, 384, 192, 192, tags=BENCH),
    ),
    mutants={
        "averages swapped": _averages(lambda averages: averages.flip(0)),
        "averages forgotten": _averages(torch.zeros_like),
        "no activation": mutant(_reference, lambda a: {"act": "none"}),
        "mean not subtracted": mutant(_reference, lambda a: {"mean": 0 * a["mean"]}),
        "eps outside of the root": _eps_outside,
        "weight and bias swapped": mutant(
            _reference, lambda a: {"weight": a["bias"], "bias": a["weight"]}
        ),
    },
    keep_wide=("weight", "bias", "mean", "variance", "averages"),
    nonfinite=("averages",),
    magnitude=_magnitude,
    reduction=_reduction,
    bytes=_bytes,
    flops=lambda grad, **_: 12 * grad.numel(),
)
