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
from effdet_kernels.ops._cases import weights as draw_weights
from effdet_kernels.ops.separable_conv import op, reference
from effdet_kernels.ops.weighted_fusion.magnitude import fusion_magnitude
from effdet_kernels.ops.weighted_fusion.reference import weighted_fusion
from effdet_kernels.spec import Case, Inputs, OpSpec

Sizes = Sequence[tuple[int, int]]


def _case(
    name: str,
    sizes: Sizes,
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
    std: float = 1.0,
    fused: Inputs | None = None,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
) -> Case:
    """Maps of ``sizes`` (H, W), one net per entry of ``outs`` (its output channels); ``fused`` into one map."""

    def make(g) -> Inputs:
        copies = 1 if shared else len(outs)
        levels = 1 if fused else len(sizes)
        widths = [out for out in outs for _ in range(levels)]
        return {
            "x": [normal(g, batch, channels, *size, std=std) for size in list(sizes) * copies],
            "dw_weight": [draw_weights(g, channels, 1, k, k) for _ in outs],
            "pw_weight": [draw_weights(g, out, channels, 1, 1) for out in outs],
            "scale": [uniform(g, width, low=0.5, high=1.5) for width in widths] if scaled else [],
            "shift": [normal(g, width) for width in widths] if shifted else [],
            "pre_act": pre_act,
            "act": act,
            **(fused or _not_fused),
        }

    return Case(name, make, tags, times=times)


def _node(
    name: str,
    *maps: tuple[int, int, str],
    method: str = "fastattn",
    channels: int = 4,
    pool_padding: Sequence[int] | None = None,
    **options,
) -> Case:
    """A BiFPN node: ``maps`` are (H, W, resampling), the first of the output's size."""
    weight = torch.tensor((0.9, 1.4, 0.3)[: len(maps)], dtype=torch.float64)
    odd = any(how == "max" and height % 2 for height, _, how in maps)
    fused = {
        "method": method,
        "fusion_weight": None if method == "sum" else weight,
        "resample": [how for *_, how in maps],
        "size": list(maps[0][:2]),
        "pool_padding": pool_padding or ((1, 1, 1, 1) if odd else (0, 1, 0, 1)),
    }
    sizes = [size[:2] for size in maps]
    return _case(name, sizes, [channels + 1 if channels == 4 else channels], fused=fused,
                 channels=channels, pre_act="swish", **options)  # fmt: skip


_not_fused: Inputs = {
    "method": None, "fusion_weight": None, "resample": None, "size": None,
    "pool_padding": (0, 0, 0, 0),
}  # fmt: skip


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
    return [
        envelope(
            F.conv2d(_depthwise(x, dw.abs()), pw.abs()) * per_channel(scale, 1).abs()
            + per_channel(shift, 0).abs(),
            a["act"],
        )
        for x, dw, pw, scale, shift in _outputs(a, maps)
    ]


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
    return terms


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
    return nbytes(*a.values()) + _written(a)


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
        return outputs

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
        outputs.append(conv_affine_act(x, merged, scale, shift, a["act"], padding=half).to(x.dtype))
    return outputs


def _pyramid(largest: int) -> Sizes:
    return [(largest >> level, largest >> level) for level in range(5)]


_reference = reference.separable_conv
_heads: Inputs = {"shared": False, "act": "swish", "tags": BENCH}
_predict: Inputs = {"shared": False, "scaled": False, "tags": BENCH}

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
        _case("pyramid", [(9, 8), (5, 4), (3, 2), (2, 1), (1, 1)], [5, 3], act="swish"),
        _case("scale_only", [(3, 4)], [3], shifted=False, k=5, pre_act="relu", act="swish"),
        *[_case(f"far_{act}", [(3, 4)], [3], pre_act=act, act=act, std=FAR) for act in ACTS],
        _node("fused_any_ratio", (7, 5, "identity"), (3, 2, "nearest"), k=5, batch=1),
        _node("fused_pool_padded", (4, 3, "identity"), (6, 4, "max"), pool_padding=(2, 2, 2, 2)),
        _node("fused_top_down", (5, 4, "identity"), (3, 2, "nearest")),
        _node("fused_three", (3, 4, "identity"), (3, 4, "identity"), (5, 7, "max"), act="relu"),
        _node("fused_softmax", (3, 5, "identity"), (2, 2, "bilinear"), method="attn", batch=1),
        _node("fused_sum", (4, 3, "nearest"), (8, 6, "max"), method="sum", scaled=False),
        _node("fused_one_pixel", (1, 1, "identity"), (2, 2, "max")),
        _case(
            "blocks",
            [(19, 37), (10, 19), (5, 10)],
            [83],
            channels=77,
            act="swish",
            tags=BLOCKS,
        ),
        _case(
            "blocks_two_nets",
            [(16, 32), (8, 16)],
            [64, 64],
            channels=64,
            batch=1,
            **{**_heads, "tags": BLOCKS},
        ),
        _case(
            "blocks_predict",
            [(9, 17), (5, 9)],
            [530, 36],
            channels=64,
            batch=1,
            **{**_predict, "tags": BLOCKS},
        ),
        _case(
            "blocks_channels",
            [(5, 6), (3, 3), (2, 2), (1, 1)],
            [147, 9],
            channels=147,
            shared=False,
            act="swish",
            tags=BLOCKS,
        ),
        _node(
            "fused_blocks_top_down",
            (18, 36, "identity"),
            (9, 18, "nearest"),
            channels=77,
            method="attn",
            tags=BLOCKS,
        ),
        _node(
            "fused_blocks",
            *[(19, 37, "identity")] * 2,
            (38, 74, "max"),
            channels=77,
            tags=BLOCKS,
        ),
        _node(
            "d0_top_down",
            (64, 64, "identity"),
            (32, 32, "nearest"),
            channels=64,
            batch=1,
            tags=BENCH,
        ),
        _node(
            "d0_bottom_up",
            *[(32, 32, "identity")] * 2,
            (64, 64, "max"),
            channels=64,
            batch=1,
            tags=BENCH,
        ),
        _node(
            "d0_top_down_batch128",
            (64, 64, "identity"),
            (32, 32, "nearest"),
            channels=64,
            times=64,
            tags=GPU,
        ),
        _node(
            "d4_top_down",
            (128, 128, "identity"),
            (64, 64, "nearest"),
            channels=224,
            batch=1,
            tags=BENCH,
        ),
        _node(
            "d7_bottom_up",
            *[(96, 96, "identity")] * 2,
            (192, 192, "max"),
            method="sum",
            channels=384,
            batch=1,
            tags=BENCH,
        ),
        _case(
            "d0_heads_first",
            _pyramid(64),
            [64, 64],
            batch=1,
            channels=64,
            **{**_heads, "shared": True},
        ),
        _case("d0_heads", _pyramid(64), [64, 64], batch=1, channels=64, **_heads),
        _case("d0_heads_batch8", _pyramid(64), [64, 64], batch=8, channels=64, **_heads),
        _case(
            "d0_heads_batch128",
            _pyramid(64),
            [64, 64],
            channels=64,
            times=64,
            **{**_heads, "tags": GPU},
        ),
        _case("d4_heads", _pyramid(128), [224, 224], batch=1, channels=224, **_heads),
        _case(
            "d4_heads_batch32",
            _pyramid(128),
            [224, 224],
            channels=224,
            times=16,
            **{**_heads, "tags": GPU},
        ),
        _case("d7_heads", _pyramid(192), [384, 384], batch=1, channels=384, **_heads),
        _case("d0_predict", _pyramid(64), [810, 36], batch=1, channels=64, **_predict),
        _case("d4_predict", _pyramid(128), [810, 36], batch=1, channels=224, **_predict),
    ),
    mutants={
        "kernel flipped": mutant(
            _reference, lambda a: {"dw_weight": [w.flip(2, 3) for w in a["dw_weight"]]}
        ),
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
    reduction=lambda dw_weight, **_: max(max(len(w), w.shape[2] ** 2) for w in dw_weight),
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
