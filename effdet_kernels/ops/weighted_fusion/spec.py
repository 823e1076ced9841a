"""OpSpec of ``weighted_fusion``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import ACTIVATIONS
from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal
from effdet_kernels.ops.weighted_fusion import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec

_SAME = (1, 1, 1, 1)


def _case(
    name: str,
    sizes: Sequence[tuple[int, int]],
    resample: Sequence[str],
    *,
    size: tuple[int, int],
    batch: int = 2,
    channels: int = 3,
    method: str = "fastattn",
    weight: Sequence[float] | None = (0.9, 1.4, 0.3),
    pool_padding: tuple[int, ...] = (0, 0, 0, 0),
    act: str = "none",
    offset: float = 0.0,
) -> Case:
    """Maps of ``sizes`` (H, W), each moved by ``offset``, fused to one of ``size``."""

    def make(g) -> Inputs:
        maps = [normal(g, batch, channels, *hw) + offset for hw in sizes]
        used = None if weight is None else torch.tensor(weight[: len(maps)], dtype=torch.float64)
        return {
            "x": maps,
            "weight": used,
            "method": method,
            "resample": list(resample),
            "size": list(size),
            "pool_padding": pool_padding,
            "act": act,
        }

    return Case(name, make, BENCH if max(size) >= 16 else frozenset())


def _size(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    """Magnitude of one resampled map; bilinear coordinates round in proportion to its extent."""
    if how != "bilinear":
        return reference._resample(x, how, size, padding).abs()
    largest = x.abs().amax((2, 3), keepdim=True)
    return reference._resample(x.abs(), how, size, padding) + max(x.shape[2:]) * largest


def _magnitude(x, weight, method, resample, size, pool_padding, **_) -> list[Tensor]:
    maps = [_size(m, how, size, pool_padding) for m, how in zip(x, resample, strict=True)]
    if method == "sum":
        return [sum(maps[1:], maps[0])]
    share = weight.softmax(0)
    if method == "fastattn":
        share = weight.relu() / (weight.relu().sum() + reference.FASTATTN_EPS)
    return [sum(m * w for m, w in zip(maps, share, strict=True))]


def _bytes(x, weight, size, **_) -> int:
    out = x[0].shape[0] * x[0].shape[1] * size[0] * size[1] * x[0].element_size()
    return nbytes(x, weight) + out


def _with(resample=None, share=None):
    """The op with another resampling, or other shares of the weights."""

    def mutated(x, weight, method, resample_names, size, pool_padding, act) -> Tensor:
        how = resample or reference._resample
        maps = [how(m, name, size, pool_padding) for m, name in zip(x, resample_names, strict=True)]
        if method == "sum":
            y = sum(maps[1:], maps[0])
        else:
            normal_share = weight.relu() / (weight.relu().sum() + reference.FASTATTN_EPS)
            used = (
                weight.softmax(0)
                if method == "attn"
                else (share or (lambda w: normal_share))(weight)
            )
            y = sum(m * w for m, w in zip(maps, used, strict=True))
        return ACTIVATIONS[act](y)

    return lambda **a: mutated(
        **{("resample_names" if k == "resample" else k): v for k, v in a.items()}
    )


def _pool_zero_padded(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    if how == "max":
        return F.max_pool2d(F.pad(x, tuple(padding)), 3, 2)
    return reference._resample(x, how, size, padding)


def _corners_aligned(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    if how == "bilinear":
        return F.interpolate(x, tuple(size), mode=how, align_corners=True)
    return reference._resample(x, how, size, padding)


def _nearest_centred(x: Tensor, how: str, size: Sequence[int], padding: Sequence[int]) -> Tensor:
    if how == "nearest":
        return F.interpolate(x, tuple(size), mode="nearest-exact")
    return reference._resample(x, how, size, padding)


_reference = reference.weighted_fusion

SPEC = OpSpec(
    name="weighted_fusion",
    op=op.weighted_fusion,
    reference=_reference,
    cases=(
        _case("top_down", [(5, 6), (3, 3)], ["identity", "nearest"], size=(5, 6), act="swish"),
        _case(
            "three",
            [(3, 4), (2, 2), (5, 8)],
            ["identity", "nearest", "max"],
            size=(3, 4),
            pool_padding=(0, 1, 1, 1),
        ),
        _case(
            "pool_below_zero",
            [(4, 6), (7, 11)],
            ["identity", "max"],
            size=(4, 6),
            pool_padding=_SAME,
            offset=-4.0,
        ),
        _case(
            "bilinear_up",
            [(3, 5), (2, 2)],
            ["identity", "bilinear"],
            size=(3, 5),
            method="attn",
            act="mish",
        ),
        _case("bilinear_down", [(7, 5)], ["bilinear"], size=(3, 2), weight=None, method="sum"),
        _case(
            "sum",
            [(2, 3)] * 3,
            ["identity"] * 3,
            size=(2, 3),
            weight=None,
            method="sum",
            act="relu6",
        ),
        _case(
            "negative_weight", [(3, 3)] * 3, ["identity"] * 3, size=(3, 3), weight=(0.7, -0.4, 0.2)
        ),
        _case("small_weights", [(3, 3)] * 2, ["identity"] * 2, size=(3, 3), weight=(2e-4, 5e-5)),
        _case(
            "one_pixel",
            [(1, 1), (2, 2)],
            ["nearest", "max"],
            size=(1, 1),
            pool_padding=(0, 1, 0, 1),
        ),
        _case(
            "no_images",
            [(2, 2), (4, 4)],
            ["identity", "max"],
            size=(2, 2),
            pool_padding=(0, 1, 0, 1),
            batch=0,
        ),
        _case(
            "d0_top_down",
            [(64, 64), (32, 32)],
            ["identity", "nearest"],
            size=(64, 64),
            batch=1,
            channels=64,
            act="swish",
        ),
        _case(
            "d0_bottom_up",
            [(32, 32), (32, 32), (64, 64)],
            ["identity", "identity", "max"],
            size=(32, 32),
            batch=8,
            channels=64,
            pool_padding=(0, 1, 0, 1),
            act="swish",
        ),
    ),
    mutants={
        "max-pool padded with zeros": _with(resample=_pool_zero_padded),
        "bilinear with aligned corners": _with(resample=_corners_aligned),
        "nearest from pixel centres": _with(resample=_nearest_centred),
        "negative weights kept": _with(share=lambda w: w / (w.sum() + reference.FASTATTN_EPS)),
        "no epsilon": _with(share=lambda w: w.relu() / w.relu().sum()),
        "weights not normalised": _with(share=lambda w: w.relu()),
        "no activation": mutant(_reference, lambda a: {"act": "none"}),
    },
    diff_args=("x", "weight"),
    keep_wide=("weight",),
    magnitude=_magnitude,
    reduction=lambda **_: 12,  # three maps of four pixels
    bytes=_bytes,
    flops=lambda x, size, **_: 2 * len(x) * x[0].shape[0] * x[0].shape[1] * size[0] * size[1],
)
