"""OpSpec of ``batch_norm_act``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.bound import STEEPEST
from effdet_kernels.ops._activations import ACTIVATIONS
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
from effdet_kernels.ops.batch_norm_act import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_AXES = (0, 2, 3)


def _case(
    name: str,
    *shape: int,
    mean: float = 0.0,
    std: float = 1.0,
    gain: float = 1.0,
    eps: float = 1e-3,
    act: str = "swish",
    tags: frozenset[str] = frozenset(),
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W]."""

    def make(g) -> Inputs:
        return {
            "x": normal(g, *shape, std=std) + mean,
            "weight": uniform(g, shape[1], low=0.5, high=1.5) * gain,
            "bias": normal(g, shape[1]),
            "eps": eps,
            "act": act,
        }

    return Case(name, make, tags)


def _moments(x: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised x, the sum of magnitudes that its error is in proportion to, var, 1 / sqrt(var + eps)."""
    var, mean = torch.var_mean(x, _AXES, correction=0)
    rate = torch.rsqrt(var + eps)
    centred = x - per_channel(mean, 0)
    spread = centred.abs() + x.abs() + per_channel(x.abs().mean(_AXES), 0)
    return centred * per_channel(rate, 1), spread * per_channel(rate, 1), var, rate


def _magnitude(x, weight, bias, eps, **_) -> list[Tensor]:
    _normal, spread, var, _rate = _moments(x, eps)
    y = per_channel(weight.abs(), 1) * spread + per_channel(bias.abs(), 0)
    return [y, x.abs().mean(_AXES), var]


def _gradient_magnitude(a: Inputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Derived in the README."""
    normal, spread, _var, rate = _moments(a["x"], a["eps"])
    size = torch.zeros_like(a["x"]) if grads[0] is None else grads[0].abs()
    value = STEEPEST * size if a["act"] != "none" else size
    error = value if a["act"] == "none" else value + size * _magnitude(**a)[0]
    bias = error.sum(_AXES)
    weight = (error * normal.abs() + value * spread).sum(_AXES)
    centred = (value * normal.abs()).sum(_AXES)
    count = size.numel() // size.shape[1]
    x = error + per_channel(bias / count, 0)
    x = x + (normal.abs() * per_channel(weight, 0) + spread * per_channel(centred, 0)) / count
    return [per_channel(a["weight"].abs() * rate, 1) * x, weight, bias]


def _bytes(x, weight, bias, **_) -> int:
    return 2 * x.nbytes + 2 * nbytes(weight, bias)


def _backward_bytes(x, weight, bias, **_) -> int:
    """Reads x, the gradient of y, weight and bias; writes three gradients."""
    return 3 * x.nbytes + 2 * nbytes(weight, bias)


def _with_variance(variance) -> Any:
    """The op with another estimate of the variance, from x [B, C, H, W]."""

    def mutated(x, weight, bias, eps, act) -> tuple[Tensor, Tensor, Tensor]:
        mean, var = x.mean(_AXES), variance(x)
        scale = per_channel(weight * torch.rsqrt(var + eps), 1)
        y = (x - per_channel(mean, 0)) * scale + per_channel(bias, 0)
        return ACTIVATIONS[act](y), mean, var

    return mutated


def _unbiased_variance(x: Tensor) -> Tensor:
    count = x.numel() // x.shape[1]
    return x.var(_AXES, correction=0) * count / max(count - 1, 1)


def _one_pass_variance(x: Tensor) -> Tensor:
    """E[x^2] - E[x]^2 in float32: cancels where the mean is large."""
    x = x.float()
    return (x.square().mean(_AXES) - x.mean(_AXES).square()).double()


def _eps_outside(x, weight, bias, eps, act) -> tuple[Tensor, Tensor, Tensor]:
    var, mean = torch.var_mean(x, _AXES, correction=0)
    y = (x - per_channel(mean, 0)) * per_channel(weight / (var.sqrt() + eps), 1)
    return ACTIVATIONS[act](y + per_channel(bias, 0)), mean, var


_reference = reference.batch_norm_act

SPEC = OpSpec(
    name="batch_norm_act",
    op=op.batch_norm_act,
    reference=_reference,
    cases=(
        _case("swish", 2, 5, 7, 3),
        _case("none", 3, 3, 4, 4, act="none"),
        _case("offset", 2, 3, 5, 6, mean=100.0, act="relu"),
        _case("narrow", 2, 3, 5, 4, std=1e-2, act="mish"),
        _case("one_value", 1, 4, 1, 1, act="hard_swish"),
        _case("small_eps", 5, 3, 3, 4, std=1e-2, eps=1e-5),
        *[_case(f"far_{act}", 2, 3, 4, 5, act=act, gain=FAR) for act in ACTS],
        _case("blocks", 7, 77, 19, 37, mean=3.0, tags=BLOCKS),
        _case("blocks_channels", 2, 147, 5, 6, tags=BLOCKS),
        _case("d0_stem", 1, 32, 256, 256, tags=BENCH),
        _case("d0_expanded", 1, 96, 256, 256, tags=BENCH),
        _case("d0_head_batch8", 8, 64, 64, 64, tags=BENCH),
        _case("d0_late_batch8", 8, 1152, 16, 16, tags=BENCH),
        _case("d0_stem_batch128", 128, 32, 256, 256, tags=GPU),
        _case("d0_late_batch128", 128, 1152, 16, 16, tags=GPU),
        _case("d4_middle", 1, 336, 128, 128, tags=BENCH),
        _case("d4_expanded", 1, 144, 512, 512, tags=GPU),
        _case("d4_late_batch8", 8, 1632, 32, 32, tags=GPU),
        _case("d7_expanded", 1, 192, 768, 768, tags=GPU),
        _case("d7_head", 1, 384, 192, 192, tags=BENCH),
        _case("d7_late", 1, 3456, 48, 48, act="none", tags=BENCH),
    ),
    mutants={
        "unbiased variance": _with_variance(_unbiased_variance),
        "variance in one pass": _with_variance(_one_pass_variance),
        "eps outside of the root": _eps_outside,
        "no activation": mutant(_reference, lambda a: {"act": "none"}),
        "weight and bias swapped": mutant(
            _reference, lambda a: {"weight": a["bias"], "bias": a["weight"]}
        ),
    },
    diff_args=("x", "weight", "bias"),
    keep_wide=("weight", "bias"),
    nonfinite=("x", "bias"),
    magnitude=_magnitude,
    reduction=lambda x, **_: x.numel() // x.shape[1],
    gradient_magnitude=_gradient_magnitude,
    gradient_reduction=lambda x, **_: x.numel() // x.shape[1],
    bytes=_bytes,
    flops=lambda x, **_: 8 * x.numel(),
    backward_bytes=_backward_bytes,
    backward_flops=lambda x, **_: 16 * x.numel(),
)
