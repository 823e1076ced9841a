"""OpSpec of ``batch_norm_act``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal, per_channel, uniform
from effdet_kernels.ops.batch_norm_act import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_AXES = (0, 2, 3)


def _case(name: str, *shape: int, mean: float = 0.0, std: float = 1.0, act: str = "swish") -> Case:
    """A case on a map of ``shape`` [B, C, H, W]."""

    def make(g) -> Inputs:
        return {
            "x": normal(g, *shape, std=std) + mean,
            "weight": uniform(g, shape[1], low=0.5, high=1.5),
            "bias": normal(g, shape[1]),
            "eps": 1e-3,
            "act": act,
        }

    real = max(shape[2:]) >= 16
    return Case(name, make, BENCH if real else frozenset())


def _magnitude(x, weight, bias, eps, **_) -> list[Tensor]:
    var, mean = torch.var_mean(x, _AXES, correction=0)
    mean_size = x.abs().mean(_AXES)
    gain = per_channel(weight.abs() * torch.rsqrt(var + eps), 1)
    spread = (x - per_channel(mean, 0)).abs() + x.abs() + per_channel(mean_size, 0)
    return [gain * spread + per_channel(bias, 0).abs(), mean_size, var]


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
        _case("d0_stem", 1, 32, 256, 256),
        _case("d0_head", 8, 64, 64, 64),
        _case("d0_late", 8, 1152, 16, 16),
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
    magnitude=_magnitude,
    reduction=lambda x, **_: x.numel() // x.shape[1],
    bytes=lambda x, weight, bias, **_: 3 * x.nbytes + 2 * nbytes(weight, bias),
    flops=lambda x, **_: 8 * x.numel(),
)
