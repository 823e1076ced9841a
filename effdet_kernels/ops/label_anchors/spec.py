"""OpSpec of ``label_anchors``: matches are exact (no near-ties here), codes meet the bound."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._cases import BENCH, BLOCKS, GPU, mutant, nbytes, uniform
from effdet_kernels.ops.label_anchors import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    batch: int,
    boxes: int,
    anchors: int,
    *,
    padding: float = 0.3,
    threshold: float = 0.5,
    tags: frozenset[str] = frozenset(),
) -> Case:
    """Boxes near anchors, and elsewhere; a share of ``padding`` among them."""

    def make(g) -> Inputs:
        corner = uniform(g, anchors, 2, low=-8, high=96)
        base = torch.cat([corner, corner + uniform(g, anchors, 2, low=8, high=48)], 1)
        return _labels(g, base, batch, boxes, padding, threshold)

    return Case(name, make, tags)


def _real(
    name: str, extent: int, *, batch: int = 2, padding: float = 0.9, tags=BENCH, times: int = 1
) -> Case:
    """The anchors of a model for images of ``extent`` pixels a side; room for 100 boxes an image."""

    def make(g) -> Inputs:
        return _labels(g, _pyramid(extent), batch, 100, padding, 0.5)

    return Case(name, make, tags, times=times)


def _labels(
    g: torch.Generator, anchors: Tensor, batch: int, boxes: int, padding: float, threshold: float
) -> Inputs:
    near = anchors[torch.randint(len(anchors), (batch, boxes), generator=g)]
    moved = near + uniform(g, batch, boxes, 4, low=-3, high=3)
    classes = torch.randint(1, 90, (batch, boxes), generator=g)
    absent = uniform(g, batch, boxes) < padding
    return {
        "gt_boxes": moved.masked_fill(absent[..., None], -1),
        "gt_classes": classes.masked_fill(absent, -1),
        "anchors": anchors,
        "match_threshold": threshold,
    }


def _pyramid(extent: int) -> Tensor:
    """Three scales of three shapes at every pixel of the levels with strides 8 to 128."""
    shapes = torch.tensor([[1.0, 1.0], [1.4, 0.7], [0.7, 1.4]], dtype=torch.float64)
    scales = 2 ** (torch.arange(3, dtype=torch.float64) / 3)
    sizes = (scales[:, None, None] * shapes).flatten(0, 1)
    levels = []
    for stride in (8, 16, 32, 64, 128):
        place = (torch.arange(extent // stride, dtype=torch.float64) + 0.5) * stride
        centre = torch.cartesian_prod(place, place).flip(1)[:, None]  # rows first, (x, y)
        half = 2 * stride * sizes
        levels.append(torch.cat([centre - half, centre + half], -1).flatten(0, 1))
    return torch.cat(levels)


def _rivals(_generator: torch.Generator) -> Inputs:
    """Exact in float32: equal IoUs, two boxes for one anchor, boxes that meet none or are empty."""
    grid = torch.arange(0, 64, 16, dtype=torch.float64)
    corner = torch.cartesian_prod(grid, grid)
    anchors = torch.cat([corner, corner + 16], 1)
    half = torch.tensor([[16, 16, 32, 24]], dtype=torch.float64)  # of an anchor
    anchors = torch.cat([anchors, half])
    boxes = [[4, 4, 12, 12], [8, 0, 24, 16], [16, 16, 32, 32], [17, 16, 33, 32], [16, 17, 32, 33],
             [16, 16, 32, 24], [200, 200, 220, 220], [40, 40, 40, 48], [34, 34, 46, 46],
             [48, 16, 64, 48], [48, 16, 64, 48]]  # fmt: skip
    return {
        "gt_boxes": torch.tensor([boxes, boxes[::-1], boxes], dtype=torch.float64),
        "gt_classes": torch.tensor(
            [
                [1, 2, 3, 4, 5, 9, 6, 7, 8, 10, 11],
                [11, 10, 1, -1, 3, 4, 5, 9, 6, -1, 8],
                [300, 1, 0, -2, -2, -1, -1, -1, -2, 200, 1],
            ]
        ),
        "anchors": anchors,
        "match_threshold": 0.5,
    }


def _nan_padding(generator: torch.Generator) -> Inputs:
    """What a padding box holds does not matter; the last of many boxes does."""
    corner = uniform(generator, 40, 2, low=-8, high=960)
    inputs = _labels(generator, torch.cat([corner, corner + 24], 1), 2, 130, 0.9, 0.5)
    inputs["gt_classes"][:, -1] = 7
    inputs["gt_boxes"][:, -1] = torch.tensor([990.0, 990, 999, 999])
    inputs["anchors"] = torch.cat([inputs["anchors"], inputs["gt_boxes"][0, -1:]])
    absent = (inputs["gt_classes"] < 0)[..., None]
    return {**inputs, "gt_boxes": inputs["gt_boxes"].masked_fill(absent, torch.nan)}


def _rivals_blocks(generator: torch.Generator) -> Inputs:
    """The same with every anchor and every box many times over: rivals of equal IoU are far apart."""
    inputs = _rivals(generator)
    classes = inputs["gt_classes"].repeat(1, 12)
    return {
        **inputs,
        "gt_boxes": inputs["gt_boxes"].repeat(1, 12, 1),
        "gt_classes": torch.where(classes > 0, torch.arange(1, classes.shape[1] + 1), classes),
        "anchors": inputs["anchors"].repeat(90, 1),
    }


def _magnitude(**a: Any) -> list[Tensor]:
    """Codes divide a difference of centres by the anchor's size, or take a logarithm of sizes."""
    _classes, codes, positives = reference.label_anchors(**a)
    size = (a["anchors"][:, 2:] - a["anchors"][:, :2])[:, [1, 0]]
    reach = a["anchors"].abs().sum(1)[:, None] / size
    widest = torch.cat([reach + codes[..., :2].abs(), 1 + codes[..., 2:].abs()], -1)
    # A narrow box magnifies the rounding of its own corners.
    narrow = reach * (-codes[..., 2:]).clamp(min=0, max=20).exp()
    widest[..., 2:] += narrow
    return [widest, positives]


def _with_matches(change) -> Any:
    """The op with its class targets, codes and counts changed."""
    return lambda **a: change(*reference.label_anchors(**a))


def _bytes(gt_boxes, gt_classes, anchors, **_) -> int:
    per_image = len(anchors) * (8 + 4 * anchors.element_size()) + anchors.element_size()
    return nbytes(gt_boxes, gt_classes, anchors) + len(gt_boxes) * per_image


_reference = reference.label_anchors

SPEC = OpSpec(
    name="label_anchors",
    op=op.label_anchors,
    reference=_reference,
    dtypes=(torch.float32, torch.float64),
    cases=(
        _case("batch", 3, 7, 53),
        _case("strict", 2, 5, 40, threshold=0.8),
        _case("all_padding", 2, 3, 20, padding=1.0),
        _case("no_boxes", 2, 0, 10),
        _case("one", 1, 1, 1, padding=0.0),
        _case("no_images", 0, 2, 5),
        Case("rivals", _rivals),
        Case("nan_padding", _nan_padding),
        Case("rivals_blocks", _rivals_blocks, BLOCKS),
        _case("blocks", 3, 37, 2999, tags=BLOCKS),
        _real("d0", 512, batch=1, padding=0.0),
        _real("d0_batch8", 512, batch=8),
        _real("d0_batch128", 512, tags=GPU, times=64),
        _real("d4", 1024, batch=1, padding=0.0),
        _real("d4_batch8", 1024, batch=8),
        _real("d7", 1536, batch=1, padding=0.0),
        _real("d7_batch32", 1536, tags=GPU, times=16),
    ),
    mutants={
        "threshold 0.6": mutant(
            _reference, lambda a: {"match_threshold": a["match_threshold"] + 0.1}
        ),
        "padding used": mutant(
            _reference,
            lambda a: {
                "gt_classes": a["gt_classes"].abs(),
                "gt_boxes": a["gt_boxes"].nan_to_num(-1),
            },
        ),
        "classes stay 1-based": _with_matches(
            lambda c, b, n: (torch.where(c >= 0, c + 1, c), b, n)
        ),
        "codes in xy order": _with_matches(lambda c, b, n: (c, b[..., [1, 0, 3, 2]], n)),
        "later box wins": mutant(
            _reference,
            lambda a: {"gt_boxes": a["gt_boxes"].flip(1), "gt_classes": a["gt_classes"].flip(1)},
        ),
        "boxes claim nothing": mutant(
            _reference, lambda a: {"gt_boxes": a["gt_boxes"], "match_threshold": 2.0}
        ),
    },
    batched=("gt_boxes", "gt_classes"),
    magnitude=_magnitude,
    reduction=lambda **_: 4,
    bytes=_bytes,
    flops=lambda gt_boxes, anchors, **_: 12 * gt_boxes.shape[0] * gt_boxes.shape[1] * len(anchors),
)
