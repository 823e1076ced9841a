"""OpSpec of ``decode_topk``: the selection is exact (logits are compared), boxes meet the bound."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._cases import BENCH, BLOCKS, GPU, VECTORS, mutant, nbytes, normal, uniform
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
    strides: Sequence[tuple[float, float]] | None = None,
    ties: bool = False,
    spoilt: bool = False,
    code: float = 0.5,
    tags: frozenset[str] = frozenset(),
    times: int = 1,
) -> Case:
    """Levels of ``sizes`` (H, W), with anchors of a grid if ``strides`` (x, y) are given.

    ``ties``: few values; ``spoilt``: some NaN, some infinite.
    """

    def make(g) -> Inputs:
        logits = [normal(g, batch, per_location * classes, *size, std=2) for size in sizes]
        if ties:
            logits = [level.round() for level in logits]
        if spoilt:
            for place, value in enumerate((torch.inf, torch.nan, -torch.inf, torch.inf)):
                for level in logits:
                    level.view(-1)[place :: level.numel() // 3 + 1] = value
        if strides is None:
            given = [per_location * sum(height * width for height, width in sizes)]
            steps, image = None, torch.tensor(128.0)
            corner = uniform(g, *given, 2, low=-16, high=112)
        else:
            given = [len(sizes), per_location]
            steps = torch.tensor(strides, dtype=torch.float64)
            image = steps[0] * torch.tensor(sizes[0][::-1])
            corner = uniform(g, *given, 2, low=-32, high=16)
        extent = uniform(g, *given, 2, low=8, high=64)
        return {
            "cls_outputs": logits,
            "box_outputs": [normal(g, batch, per_location * 4, *size, std=code) for size in sizes],
            "anchors": torch.cat([corner, corner + extent], -1),
            "num_classes": classes,
            "k": k,
            "limits": uniform(g, batch, 2, low=0.5, high=0.75) * image if limits else None,
            "strides": steps,
        }

    if ties or spoilt:  # the smallest change of an equal logit exchanges whole boxes
        tags = tags | {"not_differentiable_here"}
    return Case(name, make, tags, times=times)


def _real(name: str, largest: int, *, batch: int = 2, tags=BENCH, times: int = 1) -> Case:
    """The five levels of a model for COCO, the largest of ``largest`` pixels a side; anchors of a grid."""
    sizes = [(largest >> level, largest >> level) for level in range(5)]
    strides = [(8.0 * 2**level, 8.0 * 2**level) for level in range(5)]
    options: Inputs = {"classes": 90, "per_location": 9, "tags": tags, "times": times}
    return _case(name, sizes, k=5000, batch=batch, strides=strides, **options)


def _picked(a: Inputs, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of anchors ``index``: codes (tx, ty, tw, th), and magnitudes of the sizes and the centres."""
    codes = reference.rows(a["box_outputs"], 4)
    code = codes.gather(1, index[:, :, None].expand(-1, -1, 4))[..., [1, 0, 3, 2]]
    anchors, strides = a["anchors"], a["strides"]
    if strides is None:
        corners = anchors[index]
        size = (corners[..., 2:] - corners[..., :2]).abs()
        return code, size, corners[..., :2].abs() + corners[..., 2:].abs()
    # A corner is a sum, and a size the difference of two.
    corners = reference.grid(anchors.abs(), strides.abs(), a["cls_outputs"])[index]
    centre = corners[..., :2] + corners[..., 2:]
    return code, centre, centre


def _magnitude(**a: Any) -> list[Tensor]:
    _boxes, logits, index, _classes = reference.decode_topk(**a)
    code, size, centre = _picked(a, index)
    offset, extent = code.split(2, -1)
    # exp magnifies the rounding of its argument
    side = centre + offset.abs() * size + (1 + extent.abs()) * extent.exp() * size
    return [torch.cat([side, side], -1), logits.abs()]


def _gradient_magnitude(a: Inputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """|gradient| of each output times the slope of its code, added up where the pick came from."""
    boxes, logits, index, classes = reference.decode_topk(**a)
    g_boxes, g_logits = (
        torch.zeros_like(out) if grad is None else grad.abs()
        for out, grad in zip((boxes, logits), grads, strict=False)
    )
    code, size, _centre = _picked(a, index)
    both = g_boxes[..., :2] + g_boxes[..., 2:]
    extent = code[..., 2:]
    slopes = [both * size, both * (1 + extent.abs()) * extent.exp() * size / 2]
    terms = torch.cat(slopes, -1)[..., [1, 0, 3, 2]]
    leaves = [torch.zeros_like(t, requires_grad=True) for t in a["cls_outputs"] + a["box_outputs"]]
    levels = len(a["cls_outputs"])
    cls_rows = reference.rows(leaves[:levels], a["num_classes"]).flatten(1)
    box_rows = reference.rows(leaves[levels:], 4)
    picks = [
        cls_rows.gather(1, index * a["num_classes"] + classes),
        box_rows.gather(1, index[:, :, None].expand(-1, -1, 4)),
    ]
    return list(torch.autograd.grad(picks, leaves, [g_logits, terms]))


def _counts(a: Inputs) -> tuple[int, int, int]:
    """Images, candidates of an image, picks of an image."""
    images = len(a["cls_outputs"][0])
    candidates = sum(level.shape[1:].numel() for level in a["cls_outputs"])
    return images, candidates, min(a["k"], candidates)


def _bytes(**a: Any) -> int:
    """Every logit; a code per pick, and its anchor or, once, all those of a grid; the outputs."""
    images, candidates, picks = _counts(a)
    codes, anchors, strides = a["box_outputs"][0], a["anchors"], a["strides"]
    boxes = images * min(picks, candidates // a["num_classes"])
    read = nbytes(a["cls_outputs"], a["limits"]) + boxes * 4 * codes.element_size()
    if strides is None:
        read += boxes * 4 * anchors.element_size()
    else:
        read += nbytes(anchors, strides)
    return read + images * picks * _pick_bytes(a)


def _pick_bytes(a: Inputs) -> int:
    """Of an output row: box, logit, index, class."""
    logits, codes = a["cls_outputs"][0], a["box_outputs"][0]
    return 4 * accumulation_dtype(codes.dtype).itemsize + logits.element_size() + 16


def _backward_bytes(**a: Any) -> int:
    """Of the forward's all but the logits; in their place whole maps of gradients, which are written."""
    return _bytes(**a) + nbytes(a["box_outputs"])


def _flops(**a: Any) -> int:
    """One comparison per candidate, if any are picked; 16 per box."""
    images, candidates, picks = _counts(a)
    return images * (candidates + 16 * picks) if picks else 0


def _backward_flops(**a: Any) -> int:
    """16 per box."""
    images, _candidates, picks = _counts(a)
    return images * 16 * picks


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


def _strides_swapped(a: Inputs) -> Inputs:
    return {"strides": None if a["strides"] is None else a["strides"].flip(1)}


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
_vectors = functools.partial(_case, tags=VECTORS)
_STRIDES = ((100 / 13, 8.0), (100 / 7, 17.5))  # of two levels

SPEC = OpSpec(
    name="decode_topk",
    op=op.decode_topk,
    reference=_reference,
    cases=(
        _case("two_levels", [(3, 4), (2, 2)], k=20),
        _case("unclipped", [(3, 3), (1, 2)], k=7, limits=False),
        _case("more_than_all", [(2, 2), (1, 1)], k=1000, classes=1),
        _case("ties", [(3, 4), (2, 2)], k=31, ties=True),
        _case("spoilt", [(3, 2), (1, 1)], k=31, spoilt=True),
        _case("four_levels", [(4, 5), (3, 2), (2, 2), (1, 1)], k=90),
        _case("large_codes", [(3, 4)], k=40, code=1.8, limits=False),
        _case("one_pixel", [(1, 1)], k=2, batch=1, classes=1),
        _case("none_wanted", [(2, 2)], k=0),
        _case("no_images", [(2, 2), (1, 1)], k=5, batch=0),
        _case("grid", [(3, 4), (2, 2)], k=20, strides=_STRIDES),
        _case("grid_unclipped", [(5, 2), (2, 3)], k=25, limits=False, strides=_STRIDES),
        _case("grid_ties", [(3, 4), (2, 2)], k=31, ties=True, strides=_STRIDES),
        _case("grid_one_anchor", [(4, 3)], k=9, per_location=1, strides=[(8.0, 16.0)]),
        _case("grid_more_than_all", [(2, 3), (1, 1)], k=1000, batch=3, strides=_STRIDES),
        _case("blocks", [(16, 17), (8, 9)], k=300, classes=29, per_location=9, tags=BLOCKS),
        _case("blocks_ties", [(16, 17), (8, 9)], k=1500, classes=29, ties=True, tags=BLOCKS),
        _case("blocks_grid", [(13, 16), (7, 9)], k=300, classes=7, strides=_STRIDES, tags=BLOCKS),
        _vectors("odd_lengths", [(5, 7), (3, 3), (1, 1)], k=100, batch=3, classes=5),
        _vectors("few_of_many", [(9, 11), (4, 4)], k=3, classes=8),
        _vectors("few_of_many_tied", [(9, 11), (4, 4)], k=13, classes=9, ties=True),
        _vectors("few_of_many_spoilt", [(9, 11), (5, 4)], k=4, classes=7, spoilt=True),
        _vectors("grid_few_of_many", [(9, 13), (5, 7)], k=11, classes=8, strides=_STRIDES),
        _real("d0", 64, batch=1),
        _real("d0_batch8", 64, batch=8, tags=GPU),
        _real("d0_batch128", 64, tags=GPU, times=64),
        _real("d4", 128, batch=1),
        _real("d4_batch32", 128, tags=GPU, times=16),
        _real("d7", 192, batch=1, tags=GPU),
        _real("d7_batch8", 192, tags=GPU, times=4),
    ),
    mutants={
        "boxes in yxyx": _yxyx,
        "codes in xy order": mutant(_reference, _codes_swapped),
        "limits in (H, W)": mutant(_reference, _limits_swapped),
        "strides in (y, x)": mutant(_reference, _strides_swapped),
        "no clipping": mutant(_reference, lambda a: {"limits": None}),
        "class-major channels": mutant(_reference, _class_major),
        "higher index first on ties": _higher_index_first,
    },
    diff_args=("cls_outputs", "box_outputs"),
    keep_wide=("anchors", "limits", "strides"),
    batched=("cls_outputs", "box_outputs", "limits"),
    magnitude=_magnitude,
    reduction=lambda **_: 4,
    gradient_magnitude=_gradient_magnitude,
    gradient_reduction=lambda num_classes, **_: 4 * num_classes,  # all picks of one anchor
    bytes=_bytes,
    flops=_flops,
    backward_bytes=_backward_bytes,
    backward_flops=_backward_flops,
)
