"""OpSpec of ``batch_norm_act``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.bound import STEEPEST
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
)
from effdet_kernels.ops.batch_norm_act import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_AXES = (0, 2, 3)
_ONLY_FORWARD = frozenset({"not_differentiable_here"})


def _case(
    name: str,
    *shape: int,
    mean: float = 0.0,
    std: float = 1.0,
    gain: float = 1.0,
    eps: float = 1e-3,
    act: str = "swish",
    given: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None,
    tags: frozenset[str] = frozenset(),
) -> Case:
    """A case on a map of ``shape`` [B, C, H, W]; ``given`` makes mean and variance of it."""

    def make(g) -> Inputs:
        x = normal(g, *shape, std=std) + mean
        statistics = (None, None) if given is None else given(x)
        return {
            "x": x,
            "weight": uniform(g, shape[1], low=0.5, high=1.5) * gain,
            "bias": normal(g, shape[1]),
            "eps": eps,
            "act": act,
            "mean": statistics[0],
            "variance": statistics[1],
        }

    return Case(name, make, tags)


def _of_another(x: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics that are not those of x: they are taken as they are."""
    mean, variance = moments(x)
    return mean + 0.3, 1.5 * variance + 0.1


def _derived(a: Inputs) -> Inputs:
    if a["mean"] is None:
        return {}
    return dict(zip(("mean", "variance"), moments(a["x"]), strict=True))


def _moments(a: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The normalised x, the sum of magnitudes that its error is in proportion to, var, 1 / sqrt(var + eps)."""
    x, eps = a["x"], a["eps"]
    mean, var = moments(x) if a["mean"] is None else (a["mean"], a["variance"])
    rate = torch.rsqrt(var + eps)
    centred = x - per_channel(mean, 0)
    spread = centred.abs() + x.abs() + per_channel(x.abs().mean(_AXES).maximum(mean.abs()), 0)
    return centred * per_channel(rate, 1), spread * per_channel(rate, 1), var, rate


def _magnitude(**a: Any) -> list[Tensor]:
    _normal, spread, var, _rate = _moments(a)
    y = per_channel(a["weight"].abs(), 1) * spread + per_channel(a["bias"].abs(), 0)
    return [y, a["x"].abs().mean(_AXES), var] if a["mean"] is None else [y]


def _gradient_magnitude(a: Inputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Derived in the README."""
    normal, spread, _var, rate = _moments(a)
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
    """Reads x, weight and bias; writes y and the statistics, or reads those."""
    return 2 * x.nbytes + 2 * nbytes(weight, bias)


def _backward_bytes(x, weight, bias, **_) -> int:
    """Reads x, the gradient of y, weight and bias; writes three gradients."""
    return 3 * x.nbytes + 2 * nbytes(weight, bias)


def _with_variance(variance) -> Any:
    """The op with another estimate of the variance, from x [B, C, H, W]."""

    def mutated(**a: Any) -> list[Tensor]:
        return _normalised(a, variance(a["x"]), lambda var: torch.rsqrt(var + a["eps"]))

    return mutated


def _unbiased_variance(x: Tensor) -> Tensor:
    count = x.numel() // x.shape[1]
    return x.var(_AXES, correction=0) * count / max(count - 1, 1)


def _one_pass_variance(x: Tensor) -> Tensor:
    """E[x^2] - E[x]^2 in float32: cancels where the mean is large."""
    x = x.float()
    return (x.square().mean(_AXES) - x.mean(_AXES).square()).double()


def _eps_outside(**a: Any) -> list[Tensor]:
    var = a["x"].var(_AXES, correction=0)
    return _normalised(a, var, lambda var: 1 / (var.sqrt() + a["eps"]))


def _normalised(a: Inputs, var: Tensor, rate: Callable[[Tensor], Tensor]) -> list[Tensor]:
    mean, given = a["x"].mean(_AXES), a["mean"] is not None
    if given:
        mean, var = a["mean"], a["variance"]
    y = (a["x"] - per_channel(mean, 0)) * per_channel(a["weight"] * rate(var), 1)
    y = ACTIVATIONS[a["act"]](y + per_channel(a["bias"], 0))
    return [y] if given else [y, mean, var]


def _given_ignored(**a: Any) -> list[Tensor]:
    """Statistics of x in place of those that were given."""
    outputs = reference.batch_norm_act(**{**a, "mean": None, "variance": None})
    return outputs if a["mean"] is None else outputs[:1]


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
        _case("given", 2, 5, 4, 7, mean=3.0, given=moments),
        _case("given_none", 3, 4, 5, 2, act="none", given=moments),
        _case("given_of_another", 2, 4, 5, 3, given=_of_another, tags=_ONLY_FORWARD),
        _case("blocks", 7, 77, 19, 37, mean=3.0, tags=BLOCKS),
        _case("blocks_given", 2, 77, 19, 37, given=moments, tags=BLOCKS),
        _case("blocks_channels", 2, 147, 5, 6, tags=BLOCKS),
        _case("d0_stem", 1, 32, 256, 256, tags=BENCH),
        _case("d0_expanded", 1, 96, 256, 256, tags=BENCH),
        _case("d0_expanded_given", 1, 96, 256, 256, given=moments, tags=BENCH),
        _case("d0_head_batch8", 8, 64, 64, 64, tags=BENCH),
        _case("d0_late_batch8", 8, 1152, 16, 16, tags=BENCH),
        _case("d0_stem_batch128", 128, 32, 256, 256, tags=GPU),
        _case("d0_late_batch128", 128, 1152, 16, 16, tags=GPU),
        _case("d4_middle", 1, 336, 128, 128, tags=BENCH),
        _case("d4_expanded", 1, 144, 512, 512, tags=GPU),
        _case("d4_expanded_given", 1, 144, 512, 512, given=moments, tags=GPU),
        _case("d4_late_batch8", 8, 1632, 32, 32, tags=GPU),
        _case("d7_expanded", 1, 192, 768, 768, tags=GPU),
        _case("d7_head", 1, 384, 192, 192, tags=BENCH),
        _case("d7_late", 1, 3456, 48, 48, act="none", tags=BENCH),
    ),
    mutants={
        "unbiased variance": _with_variance(_unbiased_variance),
        "variance in one pass": _with_variance(_one_pass_variance),
        "eps outside of the root": _eps_outside,
        "given statistics ignored": _given_ignored,
        "no activation": mutant(_reference, lambda a: {"act": "none"}),
        "weight and bias swapped": mutant(
            _reference, lambda a: {"weight": a["bias"], "bias": a["weight"]}
        ),
    },
    diff_args=("x", "weight", "bias"),
    keep_wide=("weight", "bias", "mean", "variance"),
    nonfinite=("x", "bias"),
    magnitude=_magnitude,
    reduction=lambda x, **_: x.numel() // x.shape[1],
    gradient_magnitude=_gradient_magnitude,
    gradient_reduction=lambda x, **_: x.numel() // x.shape[1],
    bytes=_bytes,
    flops=lambda x, **_: 8 * x.numel(),
    derived=_derived,
    backward_bytes=_backward_bytes,
    backward_flops=lambda x, **_: 16 * x.numel(),
)
