"""OpSpec of ``weighted_fusion``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal
from effdet_kernels.ops.weighted_fusion import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    *maps: tuple[int, int, str],
    batch: int = 2,
    channels: int = 3,
    weight: Sequence[float] = (0.9, 1.4, 0.3),
    offset: float = 0.0,
    **options: Any,
) -> Case:
    """``maps`` are (H, W, resampling), the first of the output's size, around ``offset``."""

    def make(g) -> Inputs:
        arguments = {
            "x": [normal(g, batch, channels, *size) + offset for *size, _ in maps],
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

    return Case(name, make, BENCH if maps[0][0] >= 16 else frozenset())


def _size(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Magnitude of one resampled map; bilinear coordinates round in proportion to its extent."""
    if how != "bilinear":
        return reference.resampled(x, how, size, padding).abs()
    largest = x.abs().amax((2, 3), keepdim=True)
    return reference.resampled(x.abs(), how, size, padding) + max(x.shape[2:]) * largest


def _magnitude(x, weight, method, resample, size, pool_padding, **_) -> list[Tensor]:
    maps = [_size(m, how, size, pool_padding) for m, how in zip(x, resample, strict=True)]
    share = torch.ones(len(x)) if weight is None else weight.softmax(0)
    if method == "fastattn":
        share = weight.relu() / (weight.relu().sum() + reference.FASTATTN_EPS)
    return [sum(m * w for m, w in zip(maps, share, strict=True))]


def _bytes(x, weight, size, **_) -> int:
    out = x[0].shape[0] * x[0].shape[1] * size[0] * size[1] * x[0].element_size()
    return nbytes(x, weight) + out


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
_EVEN = (0, 1, 0, 1)  # padding of "max" on even sizes; on odd sizes all four sides have 1

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
        _case("one_map", (2, 3, "identity"), act="hard_swish"),
        _case("no_images", (2, 2, "identity"), (4, 4, "max"), pool_padding=_EVEN, batch=0),
        _case(
            "d0_top_down",
            (64, 64, "identity"),
            (32, 32, "nearest"),
            batch=1,
            channels=64,
            act="swish",
        ),
        _case(
            "d0_bottom_up_batch8",
            *[(32, 32, "identity")] * 2,
            (64, 64, "max"),
            batch=8,
            channels=64,
            pool_padding=_EVEN,
            act="swish",
        ),
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
    magnitude=_magnitude,
    reduction=lambda **_: 12,  # three maps of four pixels
    bytes=_bytes,
    flops=lambda x, size, **_: 2 * len(x) * x[0].shape[0] * x[0].shape[1] * size[0] * size[1],
)
