"""OpSpec of ``decode_topk``: the selection is exact (logits are compared), boxes meet the bound."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal, uniform
from effdet_kernels.ops.decode_topk import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    sizes: Sequence[tuple[int, int]],
    *,
    k: int,
    batch: int = 2,
    classes: int = 3,
    per_location: int = 3,
    limits: bool = True,
    ties: bool = False,
    spoilt: bool = False,
) -> Case:
    """Levels of ``sizes`` (H, W); ``ties``: few values; ``spoilt``: some NaN, some infinite."""

    def make(g) -> Inputs:
        logits = [normal(g, batch, per_location * classes, *size, std=2) for size in sizes]
        if ties:
            logits = [level.round() for level in logits]
        if spoilt:
            for value, level in zip((torch.nan, torch.inf, -torch.inf), logits, strict=False):
                level.view(-1)[:: level.numel() // 3 + 1] = value
        total = per_location * sum(height * width for height, width in sizes)
        corner = uniform(g, total, 2, low=-16, high=112)
        extent = uniform(g, total, 2, low=8, high=64)
        return {
            "cls_outputs": logits,
            "box_outputs": [normal(g, batch, per_location * 4, *size, std=0.5) for size in sizes],
            "anchors": torch.cat([corner, corner + extent], 1),
            "num_classes": classes,
            "k": k,
            "limits": uniform(g, batch, 2, low=64, high=96) if limits else None,
        }

    if max(max(size) for size in sizes) >= 16:
        return Case(name, make, BENCH)
    # Among equal logits the smallest change of one exchanges whole boxes.
    return Case(name, make, frozenset({"not_differentiable_here"} if ties else ()))


def _magnitude(**a: Any) -> list[Tensor]:
    codes = reference._rows(a["box_outputs"], 4)
    _boxes, logits, index, _classes = reference.decode_topk(**a)
    code = codes.gather(1, index[:, :, None].expand(-1, -1, 4))
    corners = a["anchors"][index]
    size = (corners[..., 2:] - corners[..., :2]).abs()
    reach = corners[..., :2].abs() + corners[..., 2:].abs() + code[..., [1, 0]].abs() * size
    extent = code[..., [3, 2]]
    side = (
        reach + (1 + extent.abs()) * extent.exp() * size
    )  # exp magnifies the rounding of its argument
    return [torch.cat([side, side], -1), logits.abs()]


def _yxyx(**a: Any) -> tuple[Tensor, ...]:
    boxes, *rest = reference.decode_topk(**a)
    return boxes[..., [1, 0, 3, 2]], *rest


def _codes_swapped(a: Inputs) -> Inputs:
    """Codes taken as (tx, ty, tw, th)."""
    order = [1, 0, 3, 2]
    return {
        "box_outputs": [
            b.unflatten(1, (-1, 4))[:, :, order].flatten(1, 2) for b in a["box_outputs"]
        ]
    }


def _limits_swapped(a: Inputs) -> Inputs:
    return {"limits": None if a["limits"] is None else a["limits"].flip(1)}


def _class_major(a: Inputs) -> Inputs:
    """Channels read as [C, A] in place of [A, C]."""
    shape = (a["num_classes"], -1)
    return {
        "cls_outputs": [
            c.unflatten(1, shape).transpose(1, 2).flatten(1, 2) for c in a["cls_outputs"]
        ]
    }


def _higher_index_first(**a: Any) -> tuple[Tensor, ...]:
    """Reversed order among equal logits."""
    boxes, logits, index, classes = reference.decode_topk(**a)
    pair = index * a["num_classes"] + classes
    by_pair = pair.argsort(dim=1, descending=True)
    order = by_pair.gather(
        1, logits.gather(1, by_pair).argsort(dim=1, descending=True, stable=True)
    )
    rows = torch.arange(len(order))[:, None]
    return (
        boxes[rows, order],
        logits.gather(1, order),
        index.gather(1, order),
        classes.gather(1, order),
    )


_reference = reference.decode_topk
_PYRAMID = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))

SPEC = OpSpec(
    name="decode_topk",
    op=op.decode_topk,
    reference=_reference,
    cases=(
        _case("two_levels", [(3, 4), (2, 2)], k=20),
        _case("unclipped", [(3, 3), (1, 2)], k=7, limits=False),
        _case("more_than_all", [(2, 2), (1, 1)], k=1000, classes=1),
        _case("ties", [(3, 4), (2, 2)], k=31, ties=True),
        _case("none_wanted", [(2, 2)], k=0),
        _case("no_images", [(2, 2), (1, 1)], k=5, batch=0),
        _case("d0", _PYRAMID, k=5000, batch=1, classes=90, per_location=9),
        _case("d0_batch8", _PYRAMID, k=5000, batch=8, classes=90, per_location=9),
    ),
    mutants={
        "boxes in yxyx": _yxyx,
        "codes in xy order": mutant(_reference, _codes_swapped),
        "limits in (H, W)": mutant(_reference, _limits_swapped),
        "no clipping": mutant(_reference, lambda a: {"limits": None}),
        "class-major channels": mutant(_reference, _class_major),
        "higher index first on ties": _higher_index_first,
    },
    diff_args=("cls_outputs", "box_outputs"),
    keep_wide=("anchors", "limits"),
    magnitude=_magnitude,
    reduction=lambda **_: 4,
    bytes=lambda cls_outputs, box_outputs, anchors, limits, k, **_: (
        nbytes(cls_outputs, limits)
        + len(cls_outputs[0]) * k * (32 + 16 + 4 + cls_outputs[0].element_size() + 16)
    ),
    flops=lambda cls_outputs, **_: sum(level.numel() for level in cls_outputs),
)
