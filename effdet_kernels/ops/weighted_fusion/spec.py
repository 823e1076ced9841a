"""OpSpec of ``weighted_fusion``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.bound import envelope
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
)
from effdet_kernels.ops.weighted_fusion import op, reference
from effdet_kernels.ops.weighted_fusion.magnitude import fusion_magnitude
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *maps: tuple[int, int, str],
    batch: int = 2,
    channels: int = 3,
    weight: Sequence[float] = (0.9, 1.4, 0.3),
    offset: float = 0.0,
    std: float = 1.0,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
    **options: Any,
) -> Case:
    """``maps`` are (H, W, resampling), the first of the output's size, around ``offset``."""

    def make(g) -> Inputs:
        arguments = {
            "x": [normal(g, batch, channels, *size, std=std) + offset for *size, _ in maps],
            "weight": torch.tensor(weight[: len(maps)], dtype=torch.float64),
            "method": "fastattn",
            "resample": [how for *_, how in maps],
            "size": list(maps[0][:2]),
            "pool_padding": (0, 0, 0, 0),
            "act": "none",
        }
        if options.get("method") == "sum":
            arguments["weight"] = None
        return {**arguments, **options}

    return Case(name, make, tags, times=times)


def _magnitude(act, **fusion: Any) -> list[Tensor]:
    return [envelope(fusion_magnitude(**fusion), act)]


def _pixels(a: Inputs) -> int:
    """Elements of y."""
    return a["x"][0].shape[0] * a["x"][0].shape[1] * a["size"][0] * a["size"][1]


def _bytes(**a: Any) -> int:
    return nbytes(a["x"], a["weight"]) + _pixels(a) * a["x"][0].element_size()


def _backward_bytes(**a: Any) -> int:
    """Reads the gradient of y and what it needs of the inputs, writes a gradient for each."""
    fixed = a["weight"] is None and a["act"] == "none"  # then only a pool needs to see its map
    maps = zip(a["x"], a["resample"], strict=True)
    read = [x for x, how in maps if not fixed or how == "max"]
    return _bytes(**a) + nbytes(read, a["weight"])


def _flops(**a: Any) -> int:
    """Per element of y and map one addition, with weights a product too; the four taps of "bilinear"."""
    own = 1 if a["weight"] is None else 2
    return _pixels(a) * sum(own + (8 if how == "bilinear" else 0) for how in a["resample"])


def _backward_flops(**a: Any) -> int:
    """The gradients of the maps, with weights also of those; under an activation y before it, and act'."""
    times = 1 if a["weight"] is None else 2
    if a["act"] == "none":
        return times * _flops(**a)
    return (times + 1) * _flops(**a) + _pixels(a)


def _resampled(changed: str, function: Callable[[Tensor, Inputs], Tensor]) -> Callable[..., Any]:
    """The op with another resampling under the name ``changed``."""

    def change(a: Inputs) -> Inputs:
        pairs = list(zip(a["x"], a["resample"], strict=True))
        maps = [function(m, a) if how == changed else m for m, how in pairs]
        return {"x": maps, "resample": ["identity" if how == changed else how for _, how in pairs]}

    return mutant(_reference, change)


def _shared(share: Callable[[Tensor], Tensor]) -> Callable[..., Any]:
    """The op with other shares in place of "fastattn"."""

    def change(a: Inputs) -> Inputs:
        if a["method"] != "fastattn":
            return {}
        maps = [m * w for m, w in zip(a["x"], share(a["weight"]), strict=True)]
        return {"x": maps, "weight": None, "method": "sum"}

    return mutant(_reference, change)


_reference = reference.weighted_fusion
# No ratio of short numbers, as 0.9 : 1.4 is: 16-bit values could add up to exactly 0, relu's kink.
_UNEVEN = (0.9, 2**0.5)
_EVEN = (0, 1, 0, 1)  # padding of "max" on even sizes; on odd sizes all four sides have 1

_DOWN: dict[str, Any] = {"pool_padding": _EVEN, "act": "swish", "tags": BENCH}


def _top_down(name: str, extent: int, *, tags=BENCH, **options: Any) -> Case:
    """A node of a BiFPN with a map of half the size from above."""
    half = extent // 2
    maps = (extent, extent, "identity"), (half, half, "nearest")
    return _case(name, *maps, act="swish", tags=tags, **options)


def _bottom_up(name: str, extent: int, **options: Any) -> Case:
    """A node of a BiFPN with a map of twice the size from below."""
    same, twice = (extent, extent, "identity"), (2 * extent, 2 * extent, "max")
    return _case(name, same, same, twice, **{**_DOWN, **options})


def _vectors(name: str, *maps: tuple[int, int, str], channels: int = 8, **options: Any) -> Case:
    return _case(f"vectors_{name}", *maps, channels=channels, tags=VECTORS, **options)


SPEC = OpSpec(
    name="weighted_fusion",
    op=op.weighted_fusion,
    reference=_reference,
    cases=(
        _case("top_down", (5, 6, "identity"), (3, 3, "nearest"), act="swish"),
        _case(
            "three", (3, 4, "identity"), (2, 2, "nearest"), (5, 8, "max"), pool_padding=(0, 1, 1, 1)
        ),
        _case(
            "pool_below_zero",
            (4, 6, "identity"),
            (7, 11, "max"),
            pool_padding=(1,) * 4,
            offset=-4.0,
        ),
        _case("bilinear_up", (3, 5, "identity"), (2, 2, "bilinear"), method="attn", act="mish"),
        _case("bilinear_down", (3, 2, "identity"), (7, 5, "bilinear"), method="sum"),
        _case("sum", *[(2, 3, "identity")] * 3, method="sum", act="relu6"),
        _case("negative_weight", *[(3, 3, "identity")] * 3, weight=(0.7, -0.4, 0.2)),
        _case("small_weights", *[(3, 3, "identity")] * 2, weight=(2e-4, 5e-5)),
        _case("one_pixel", (1, 1, "nearest"), (2, 2, "max"), pool_padding=_EVEN),
        _case("nearest_any_ratio", (7, 5, "identity"), (3, 2, "nearest"), (2, 7, "nearest")),
        _case("pool_uncovered", (2, 3, "identity"), (6, 8, "max")),
        _case("pool_twice_padded", (4, 3, "identity"), (6, 4, "max"), pool_padding=(2, 2, 2, 2)),
        _case(
            "bilinear_and_max",
            (3, 4, "identity"),
            (5, 8, "max"),
            (2, 2, "bilinear"),
            pool_padding=(0, 1, 1, 1),
        ),
        _case("large_weights", *[(2, 3, "identity")] * 3, method="attn", weight=(90, 100, 95)),
        *[
            _case(f"far_{act}", *[(3, 4, "identity")] * 2, weight=_UNEVEN, act=act, std=FAR)
            for act in ACTS
        ],
        _case("one_map", (2, 3, "identity"), batch=1, act="hard_swish"),
        _case("no_images", (2, 2, "identity"), (4, 4, "max"), pool_padding=_EVEN, batch=0),
        _case(
            "blocks_top_down",
            (18, 38, "identity"),
            (9, 19, "nearest"),
            channels=77,
            act="swish",
            tags=BLOCKS,
        ),
        _bottom_up("blocks_bottom_up", 20, channels=80, batch=2, tags=BLOCKS),
        _case(
            "blocks_bilinear",
            (19, 37, "identity"),
            (10, 19, "bilinear"),
            channels=77,
            method="attn",
            tags=BLOCKS,
        ),
        _vectors("top_down", (6, 10, "identity"), (3, 5, "nearest"), channels=24, act="swish"),
        _vectors(
            "halved_first", (4, 6, "nearest"), (8, 12, "identity"), method="attn", size=(8, 12)
        ),
        _vectors(
            "bottom_up",
            *[(5, 7, "identity")] * 2,
            (10, 14, "max"),
            channels=40,
            pool_padding=_EVEN,
            act="swish",
        ),
        _vectors(
            "last", (3, 4, "identity"), (5, 8, "max"), pool_padding=(0, 1, 1, 1), act="hard_swish"
        ),
        _vectors("pool_alone", (4, 3, "max"), method="sum", size=(3, 3), pool_padding=(2,) * 4),
        _vectors("pool_uncovered", (2, 3, "identity"), (6, 8, "max"), method="attn"),
        _vectors(
            "two_pools",
            (5, 8, "max"),
            (6, 9, "max"),
            size=(3, 4),
            pool_padding=(0, 1, 1, 1),
            act="mish",
        ),
        _vectors("nearest_any_ratio", (7, 5, "identity"), (3, 2, "nearest"), (2, 7, "nearest")),
        _vectors(
            "bilinear", (3, 5, "identity"), (2, 2, "bilinear"), (8, 8, "bilinear"), act="relu"
        ),
        _vectors(
            "all",
            (2, 4, "nearest"),
            (5, 8, "max"),
            (2, 2, "bilinear"),
            size=(3, 4),
            pool_padding=(0, 1, 1, 1),
            act="relu6",
        ),
        _vectors("no_images", (2, 2, "identity"), (4, 4, "max"), pool_padding=_EVEN, batch=0),
        _vectors("sum", *[(2, 3, "identity")] * 3, method="sum", act="leaky_relu"),
        _top_down("d0_top_down", 64, channels=64, batch=1),
        _bottom_up("d0_bottom_up_batch8", 32, channels=64, batch=8),
        _case("d0_last", (4, 4, "identity"), (8, 8, "max"), batch=1, channels=64, **_DOWN),
        _top_down("d0_top_down_batch128", 64, channels=64, tags=GPU, times=64),
        _top_down("d4_top_down", 128, channels=224, batch=1),
        _bottom_up("d4_bottom_up", 64, channels=224, batch=1),
        _top_down("d4_top_down_batch32", 128, channels=224, tags=GPU, times=16),
        _top_down("d7_top_down", 192, channels=384, batch=1, method="sum"),
        _bottom_up("d7_bottom_up", 96, channels=384, batch=1, method="sum"),
    ),
    mutants={
        "max-pool padded with zeros": _resampled(
            "max", lambda m, a: F.max_pool2d(F.pad(m, tuple(a["pool_padding"])), 3, 2)
        ),
        "bilinear with aligned corners": _resampled(
            "bilinear",
            lambda m, a: F.interpolate(m, a["size"], mode="bilinear", align_corners=True),
        ),
        "nearest from pixel centres": _resampled(
            "nearest", lambda m, a: F.interpolate(m, a["size"], mode="nearest-exact")
        ),
        "negative weights kept": _shared(lambda w: w / (w.sum() + reference.FASTATTN_EPS)),
        "no epsilon": _shared(lambda w: w.relu() / w.relu().sum()),
        "weights not normalised": _shared(lambda w: w.relu()),
        "no activation": mutant(_reference, lambda a: {"act": "none"}),
    },
    diff_args=("x", "weight"),
    keep_wide=("weight",),
    batched=("x",),
    nonfinite=("x", "weight"),
    magnitude=_magnitude,
    reduction=lambda **_: 12,  # three maps of four pixels
    gradient_reduction=lambda **a: max(1, _pixels(a)),
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
