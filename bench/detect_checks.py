"""Whether detections are right: what the suite ``detect`` compares rows and candidates with before it times."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

import effdet
from bench.peers.replay import Rule, worst_share
from effdet.postprocess import swap_xy
from effdet_kernels import decode_topk, use_backend

COMPARED = 50  # best rows of an image
STRAY = 1  # of them, that may have no partner: rounding of the network decides near ties
# A row's box is its candidate's to this many pixels, beyond 4096 of them in proportion: of untrained networks some
# boxes are as wide as 20,000.
_MATCH, _FAR = 0.05, 4096.0

Maps = tuple[list[Tensor], list[Tensor]]


def exact_candidates(
    config: Any, maps: Maps, limits: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes, scores and classes of the best candidates of head ``maps`` (classes, codes), in float64.

    ``limits`` ``[B, 2]`` (width, height): boxes are clipped to it.
    """
    anchors = effdet.anchors.Anchors.from_config(config).boxes
    classes, codes = ([m.double() for m in part] for part in maps)
    with use_backend("reference"):
        boxes, logits, _, labels = decode_topk(
            classes,
            codes,
            swap_xy(anchors).double(),
            num_classes=config.num_classes,
            k=config.max_detection_points,
            limits=None if limits is None else limits.double(),
        )
    return boxes, logits.sigmoid(), labels


def rows_share(rule: Rule, rows: Tensor, boxes: Tensor, scores: Tensor, labels: Tensor) -> float:
    """``worst_share`` of detection rows ``[B, max_det, 6]``, whose candidates are found by class and box."""
    worst = 0.0
    for image, found in enumerate(rows.double()):
        far = (found[:, None, :4] - boxes[image]).abs().amax(-1)
        allowed = _MATCH * (boxes[image].abs().amax(-1) / _FAR).clamp(min=1)
        match = (far <= allowed) & (found[:, 5:] - 1 == labels[image])
        index = torch.full((len(found),), -1)
        for row in range(int((found[:, 5] > 0).sum())):
            if not bool(match[row].any()):
                return math.inf
            index[row] = (
                match[row].int().argmax()
            )  # the best of equal boxes: candidates are in order
            match[:, index[row]] = False
        share = worst_share(rule, boxes[image], scores[image], labels[image], index, found[:, 4])
        worst = max(worst, share)
    return worst


def strays(rows: Tensor, expected: Tensor) -> float:
    """How many of the best ``rows`` ``[max_det, 6]`` have no partner among those ``expected``."""
    far = (rows[:COMPARED, None] - expected).abs()
    partner = (far[..., :4].amax(-1) < 0.5) & (far[..., 4] < 1e-3) & (far[..., 5] == 0)
    return float((~partner.any(1)).sum())
