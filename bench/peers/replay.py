"""Whether the picks of a suppression are right: a replay in intervals that hold the rounding of any float32 code.

Every candidate has a lower and an upper bound of its score and is surely alive, perhaps alive or gone. A pick is right
if it is perhaps alive, no candidate that is surely alive is surely better, and its score is inside its bounds. So near
ties and overlaps near the threshold may fall either way, and nothing else may.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

_ROUNDING = 1e-6  # relative, of one step: some 16 roundings of float32


@dataclasses.dataclass(frozen=True)
class Rule:
    """A suppression as in ``effdet_kernels.soft_nms``; ``hard`` is NMS, else gaussian decay."""

    hard: bool
    sigma: float
    iou_threshold: float
    score_threshold: float
    max_det: int
    pixel: float = 0.0  # coordinates may be off by this much


def worst_share(
    rule: Rule, boxes: Tensor, scores: Tensor, classes: Tensor, index: Tensor, score: Tensor
) -> float:
    """The largest deviation of a pick's score as a share of what is allowed; infinite for a wrong pick.

    Args:
        rule: what was to be computed.
        boxes: ``[N, 4]`` (x_min, y_min, x_max, y_max); ``scores`` ``[N]``, ``classes`` ``[N]``: of one image, exact.
        index: ``[max_det]`` picks, -1 after the last.
        score: ``[max_det]`` their scores.
    """
    boxes, scores = boxes.double(), scores.double()
    low, high = scores * (1 - _ROUNDING), scores * (1 + _ROUNDING)
    perhaps = high > rule.score_threshold
    surely = low > rule.score_threshold
    worst = 0.0
    for pick, value in zip(index.tolist(), score.double().tolist(), strict=True):
        if pick < 0:
            break
        best = float(low[surely].max()) if bool(surely.any()) else -math.inf
        if not perhaps[pick] or float(high[pick]) < best:
            return math.inf
        middle, half = (float(high[pick]) + side * float(low[pick]) for side in (1, -1))
        worst = max(worst, abs(2 * value - middle) / max(half, 1e-30))
        iou, slack = _overlap(boxes[pick], boxes, rule.pixel)
        same = classes == classes[pick]
        least = torch.where(same, (iou - slack).clamp(min=0), 0)
        most = torch.where(same, (iou + slack).clamp(max=1), 0)
        if rule.hard:
            perhaps &= least <= rule.iou_threshold
            surely &= most <= rule.iou_threshold
        else:
            high = high * torch.exp(-(least**2) / rule.sigma) * (1 + _ROUNDING)
            low = low * torch.exp(-(most**2) / rule.sigma) * (1 - _ROUNDING)
            perhaps &= high > rule.score_threshold
            surely &= low > rule.score_threshold
        perhaps[pick] = surely[pick] = False
    picked = int((index >= 0).sum())
    finished = picked == rule.max_det or not bool(surely.any())
    in_front = bool((index[:picked] >= 0).all())
    return worst if finished and in_front and worst == worst else math.inf


def _overlap(box: Tensor, boxes: Tensor, pixel: float) -> tuple[Tensor, Tensor]:
    """IoU of ``box`` with each of ``boxes``, and by how much it may be off."""
    sides = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(0)
    own, others = box[2:] - box[:2], boxes[:, 2:] - boxes[:, :2]
    common = sides.prod(1)
    union = own.prod() + others.prod(1) - common
    iou = torch.where(union > 0, common / union, 0)
    moved = 2 * pixel * (2 * (sides + 2 * pixel).sum(1) + own.sum() + others.sum(1))
    return iou, torch.where(union > 0, (moved / union).clamp(max=1), 0) + _ROUNDING * iou
