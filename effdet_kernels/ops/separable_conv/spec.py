"""OpSpec of ``separable_conv``."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import accumulator, envelope, roundoff
from effdet_kernels.ops._activations import ACTIVATIONS, conv_affine_act
from effdet_kernels.ops._cases import (
    mutant,
    nbytes,
    per_channel,
    with_moments_of_errors,
)
from effdet_kernels.ops._statistics import with_moments
from effdet_kernels.ops.separable_conv import op, reference
from effdet_kernels.ops.separable_conv.cases import CASES
from effdet_kernels.ops.weighted_fusion.magnitude import fusion_magnitude
from effdet_kernels.ops.weighted_fusion.reference import weighted_fusion
from effdet_kernels.spec import Inputs, OpSpec


def _fuse(a: Inputs, how: Callable[..., Tensor]) -> list[Tensor]:
    """The maps that are convolved: x, or what ``how`` makes of it."""
    if a["method"] is None:
        return list(a["x"])
    rest = ("fusion_weight", "method", "resample", "size", "pool_padding")
    return [how(a["x"], *(a[name] for name in rest))]


def _fused(a: Inputs) -> list[Tensor]:
    return _fuse(a, functools.partial(weighted_fusion, act="none"))


Output = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


def _outputs(a: Inputs, maps: Sequence[Tensor]) -> list[Output]:
    """Per output: its map, the weights of its net, its scale and shift."""
    count = len(a["scale"]) or len(a["shift"]) or len(maps)
    levels = count // len(a["dw_weight"])
    return [
        (
            maps[i % len(maps)],
            a["dw_weight"][i // levels],
            a["pw_weight"][i // levels],
            a["scale"][i] if a["scale"] else None,
            a["shift"][i] if a["shift"] else None,
        )
        for i in range(count)
    ]


def _depthwise(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=weight.shape[2] // 2, groups=len(weight))


def _magnitude(**a: Any) -> list[Tensor]:
    maps = [envelope(x.abs(), a["pre_act"]) for x in _fuse(a, fusion_magnitude)]
    return _errors(
        a,
        [
            envelope(
                F.conv2d(_depthwise(x, dw.abs()), pw.abs()) * per_channel(scale, 1).abs()
                + per_channel(shift, 0).abs(),
                a["act"],
            )
            for x, dw, pw, scale, shift in _outputs(a, maps)
        ],
    )


def _errors(a: Inputs, of_maps: list[Tensor]) -> list[Tensor]:
    """Errors of the maps, and what they make of the statistics."""
    if not a["statistics"]:
        return of_maps
    return with_moments_of_errors(reference.separable_conv(**{**a, "statistics": False}), of_maps)


def _terms(a: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The fused map, the activated map and the depthwise result may each be rounded to the input's dtype."""
    if dtype == accumulator(dtype):
        return []
    act = ACTIVATIONS[a["pre_act"]]
    maps = _fused(a)
    rounded = [torch.zeros_like(x) for x in maps]
    if a["pre_act"] != "none":
        rounded = [r + act(x).square() for r, x in zip(rounded, maps, strict=True)]
    if a["method"] is not None:
        rounded = [r + (x * _slope(act, x)).square() for r, x in zip(rounded, maps, strict=True)]
    terms = []
    pairs = zip(
        _outputs(a, [act(x) for x in maps]), (o[0] for o in _outputs(a, rounded)), strict=True
    )
    for (x, dw, pw, scale, _shift), squares in pairs:
        depthwise = F.conv2d(_depthwise(x, dw).square(), pw.square()).sqrt()
        before = F.conv2d(_depthwise(squares, dw.square()), pw.square()).sqrt()
        terms.append(4 * roundoff(dtype) * (depthwise + before) * per_channel(scale, 1).abs())
    return _errors(a, terms)


def _slope(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        return torch.autograd.grad(function(x).sum(), x)[0]


def _pixels(a: Inputs) -> list[int]:
    """B * H * W of every output."""
    sizes = [a["size"]] if a["method"] else [x.shape[2:] for x in a["x"]]
    count = len(a["scale"]) or len(a["shift"]) or len(sizes)
    return [
        a["x"][0].shape[0] * sizes[i % len(sizes)][0] * sizes[i % len(sizes)][1]
        for i in range(count)
    ]


def _widths(a: Inputs) -> list[int]:
    """Channels of every output."""
    levels = len(_pixels(a)) // len(a["pw_weight"])
    return [len(pw) for pw in a["pw_weight"] for _ in range(levels)]


def _written(a: Inputs) -> int:
    size = a["x"][0].element_size()
    return sum(n * width * size for n, width in zip(_pixels(a), _widths(a), strict=True))


def _bytes(**a: Any) -> int:
    vectors = 2 * sum(_widths(a)) if a["statistics"] else 0
    wide = accumulator(a["x"][0].dtype).itemsize
    return nbytes(*a.values()) + _written(a) + vectors * wide


def _flops(**a: Any) -> int:
    channels, k = a["dw_weight"][0].shape[0], a["dw_weight"][0].shape[2]
    convolved = sum(
        2 * n * channels * (k * k + width) for n, width in zip(_pixels(a), _widths(a), strict=True)
    )
    fused = 2 * len(a["x"]) * channels * _pixels(a)[0] if a["method"] else 0
    return convolved + fused


def _backward_bytes(**a: Any) -> int:
    """Reads x, the weights and the outputs' gradients; writes a gradient for each input."""
    return 2 * nbytes(*a.values()) + _written(a)


def _backward_flops(**a: Any) -> int:
    """Two products with the pointwise weights, three passes of the depthwise taps (one recomputes its result)."""
    channels, k = a["dw_weight"][0].shape[0], a["dw_weight"][0].shape[2]
    convolved = sum(
        2 * n * channels * (3 * k * k + 2 * width)
        for n, width in zip(_pixels(a), _widths(a), strict=True)
    )
    fused = 6 * len(a["x"]) * channels * _pixels(a)[0] if a["method"] else 0
    return convolved + fused


def _variant(
    depthwise: Callable[[Tensor, Tensor], Tensor], rounding: torch.dtype
) -> Callable[..., Any]:
    """The op with another depthwise convolution, its product rounded to ``rounding`` before BN."""

    def mutated(**a: Any) -> list[Tensor]:
        act = ACTIVATIONS[a["pre_act"]]
        outputs = []
        for x, dw, pw, scale, shift in _outputs(a, [act(x) for x in _fused(a)]):
            y = F.conv2d(depthwise(x, dw), pw).to(rounding).double()
            outputs.append(ACTIVATIONS[a["act"]](y * per_channel(scale, 1) + per_channel(shift, 0)))
        return with_moments(outputs, outputs[0].dtype) if a["statistics"] else outputs

    return mutated


def _border_repeated(x: Tensor, weight: Tensor) -> Tensor:
    half = weight.shape[2] // 2
    rows = torch.arange(-half, x.shape[2] + half).clamp(0, x.shape[2] - 1)
    columns = torch.arange(-half, x.shape[3] + half).clamp(0, x.shape[3] - 1)
    return F.conv2d(x[:, :, rows][..., columns], weight, groups=len(weight))


def _first_level_bn(a: Inputs) -> Inputs:
    """BN of a net's first level on all of its levels."""
    levels = len(_pixels(a)) // len(a["dw_weight"])
    return {
        name: [a[name][i - i % levels] for i in range(len(a[name]))] for name in ("scale", "shift")
    }


def _activated_before_fusion(a: Inputs) -> Inputs:
    if a["method"] is None:
        return {}
    return {"x": [ACTIVATIONS[a["pre_act"]](x) for x in a["x"]], "pre_act": "none"}


def _merged_dense(**a: Any) -> list[Tensor]:
    """Both convolutions as one dense k x k: k * k times the products of the pointwise one, on matrix units."""
    act = ACTIVATIONS[a["pre_act"]]
    outputs = []
    for x, dw, pw, scale, shift in _outputs(a, [act(x) for x in _fused(a)]):
        merged = pw * dw.permute(1, 0, 2, 3)  # [O, C, k, k]
        half = dw.shape[2] // 2
        outputs.append(conv_affine_act(x, merged, scale, shift, a["act"], padding=half))
    dtype = a["x"][0].dtype
    return with_moments(outputs, dtype) if a["statistics"] else [y.to(dtype) for y in outputs]


def _statistics_of_last(**a: Any) -> list[Tensor]:
    y = reference.separable_conv(**{**a, "statistics": False})
    if not a["statistics"]:
        return y
    return [*y, *with_moments([out[-1:] for out in y], y[0].dtype)[len(y) :]]


def _reduction(**a: Any) -> int:
    return max(
        *(max(len(w), w.shape[2] ** 2) for w in a["dw_weight"]),
        max(_pixels(a)) if a["statistics"] else 0,
    )


_reference = reference.separable_conv

SPEC = OpSpec(
    name="separable_conv",
    op=op.separable_conv,
    reference=_reference,
    cases=CASES,
    mutants={
        "kernel flipped": mutant(
            _reference, lambda a: {"dw_weight": [w.flip(2, 3) for w in a["dw_weight"]]}
        ),
        "statistics of the last image": _statistics_of_last,
        "the first level's BN everywhere": mutant(_reference, _first_level_bn),
        "pre-activation forgotten": mutant(_reference, lambda a: {"pre_act": "none"}),
        "inputs activated before they are fused": mutant(_reference, _activated_before_fusion),
        "border repeated instead of zero": _variant(_border_repeated, torch.float64),
        "product rounded to bfloat16 before BN": _variant(_depthwise, torch.bfloat16),
    },
    peers={"merged dense": _merged_dense},
    diff_args=("x", "dw_weight", "pw_weight", "scale", "shift", "fusion_weight"),
    keep_wide=("scale", "shift", "fusion_weight"),
    batched=("x",),
    nonfinite=("x",),
    magnitude=_magnitude,
    reduction=_reduction,
    terms=_terms,
    gradient_reduction=lambda **a: max(
        max(_widths(a)), sum(_pixels(a)), sum(_pixels(a)) * a["x"][0].shape[1] if a["method"] else 0
    ),
    gradient_roundings=5,  # fused, activated, depthwise, and the gradients of the last two
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
