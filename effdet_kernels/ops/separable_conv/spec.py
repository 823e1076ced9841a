"""OpSpec of ``separable_conv``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal, per_channel, uniform, weights
from effdet_kernels.ops.separable_conv import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec, accumulator, roundoff


def _case(
    name: str,
    sizes: Sequence[tuple[int, int]],
    outs: Sequence[int],
    *,
    batch: int = 2,
    channels: int = 4,
    k: int = 3,
    shared: bool = True,
    scaled: bool = True,
    shifted: bool = True,
    pre_act: str = "none",
    act: str = "none",
) -> Case:
    """Maps of ``sizes`` (H, W), one net per entry of ``outs`` (its output channels)."""

    def make(g) -> Inputs:
        copies = 1 if shared else len(outs)
        widths = [out for out in outs for _ in sizes]
        return {
            "x": [normal(g, batch, channels, *size) for size in list(sizes) * copies],
            "dw_weight": [weights(g, channels, 1, k, k) for _ in outs],
            "pw_weight": [weights(g, out, channels, 1, 1) for out in outs],
            "scale": [uniform(g, width, low=0.5, high=1.5) for width in widths] if scaled else [],
            "shift": [normal(g, width) for width in widths] if shifted else [],
            "pre_act": pre_act,
            "act": act,
        }

    real = max(max(size) for size in sizes) >= 16
    return Case(name, make, BENCH if real else frozenset())


def _outputs(a: Inputs) -> list[tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Per output: its activated input, the weights of its net, its scale and shift."""
    count = len(a["scale"]) or len(a["shift"]) or len(a["x"])
    levels = count // len(a["dw_weight"])
    return [
        (
            ACTIVATIONS[a["pre_act"]](a["x"][i % len(a["x"])]),
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
    return [
        F.conv2d(_depthwise(x.abs(), dw.abs()), pw.abs()) * per_channel(scale, 1).abs()
        + per_channel(shift, 0).abs()
        for x, dw, pw, scale, shift in _outputs(a)
    ]


def _terms(a: Inputs, dtype: torch.dtype) -> list[Tensor]:
    """The activated input and the depthwise result may be rounded to the input's dtype."""
    if dtype == accumulator(dtype):
        return []
    terms = []
    for x, dw, pw, scale, _shift in _outputs(a):
        depthwise = F.conv2d(_depthwise(x, dw).square(), pw.square()).sqrt()
        activated = F.conv2d(_depthwise(x.square(), dw.square()), pw.square()).sqrt()
        spread = depthwise + (0 if a["pre_act"] == "none" else activated)
        terms.append(4 * roundoff(dtype) * spread * per_channel(scale, 1).abs())
    return terms


def _bytes(**a: Any) -> int:
    written = sum(x.nbytes // x.shape[1] * len(pw) for x, _, pw, _, _ in _outputs(a))
    return nbytes(*a.values()) + written


def _flops(**a: Any) -> int:
    return sum(2 * x.numel() * (dw.shape[2] ** 2 + len(pw)) for x, dw, pw, _, _ in _outputs(a))


def _variant(
    depthwise: Callable[[Tensor, Tensor], Tensor], rounding: torch.dtype
) -> Callable[..., Any]:
    """The op with another depthwise convolution, its product rounded to ``rounding`` before BN."""

    def mutated(**a: Any) -> list[Tensor]:
        outputs = []
        for x, dw, pw, scale, shift in _outputs(a):
            y = F.conv2d(depthwise(x, dw), pw).to(rounding).double()
            outputs.append(ACTIVATIONS[a["act"]](y * per_channel(scale, 1) + per_channel(shift, 0)))
        return outputs

    return mutated


def _border_repeated(x: Tensor, weight: Tensor) -> Tensor:
    half = weight.shape[2] // 2
    rows = torch.arange(-half, x.shape[2] + half).clamp(0, x.shape[2] - 1)
    columns = torch.arange(-half, x.shape[3] + half).clamp(0, x.shape[3] - 1)
    return F.conv2d(x[:, :, rows][..., columns], weight, groups=len(weight))


def _first_level_bn(a: Inputs) -> Inputs:
    """BN of a net's first level on all of its levels."""
    levels = len(_outputs(a)) // len(a["dw_weight"])
    return {
        name: [a[name][i - i % levels] for i in range(len(a[name]))] for name in ("scale", "shift")
    }


_reference = reference.separable_conv
_PYRAMID = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))

SPEC = OpSpec(
    name="separable_conv",
    op=op.separable_conv,
    reference=_reference,
    cases=(
        _case("node", [(5, 6)], [5], pre_act="swish"),
        _case("levels", [(5, 4), (3, 2), (1, 1)], [6], act="swish"),
        _case("two_nets_shared", [(4, 3), (2, 2)], [5, 5], act="relu6"),
        _case("two_nets", [(4, 3), (2, 2)], [3, 3], shared=False, act="hard_swish"),
        _case("predict", [(3, 3), (2, 1)], [7, 2], batch=1, shared=False, scaled=False),
        _case("raw_5x5", [(5, 3), (2, 2)], [3, 3], k=5, shared=False, scaled=False, shifted=False),
        _case("no_images", [(3, 3), (1, 2)], [4], batch=0),
        _case("d0_node", [(64, 64)], [64], batch=1, channels=64, pre_act="swish"),
        _case("d0_heads", _PYRAMID, [64, 64], batch=1, channels=64, shared=False, act="swish"),
        _case(
            "d0_heads_batch8", _PYRAMID, [64, 64], batch=8, channels=64, shared=False, act="swish"
        ),
        _case("d0_predict", _PYRAMID, [810, 36], batch=1, channels=64, shared=False, scaled=False),
    ),
    mutants={
        "kernel flipped": mutant(
            _reference, lambda a: {"dw_weight": [w.flip(2, 3) for w in a["dw_weight"]]}
        ),
        "the first level's BN everywhere": mutant(_reference, _first_level_bn),
        "pre-activation forgotten": mutant(_reference, lambda a: {"pre_act": "none"}),
        "border repeated instead of zero": _variant(_border_repeated, torch.float64),
        "product rounded to bfloat16 before BN": _variant(_depthwise, torch.bfloat16),
    },
    diff_args=("x", "dw_weight", "pw_weight", "scale", "shift"),
    keep_wide=("scale", "shift"),
    magnitude=_magnitude,
    reduction=lambda dw_weight, **_: max(max(len(w), w.shape[2] ** 2) for w in dw_weight),
    terms=_terms,
    bytes=_bytes,
    flops=_flops,
)
