"""Overlap of two sets of boxes."""

from __future__ import annotations

import torch
from torch import Tensor

from .box_list import BoxList


def area(boxlist: BoxList) -> Tensor:
    """Area of each box, ``[N]``."""
    y_min, x_min, y_max, x_max = boxlist.boxes().unbind(dim=1)
    return (y_max - y_min) * (x_max - x_min)


def intersection(boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
    """Area common to each pair of boxes, ``[N, M]``."""
    boxes1, boxes2 = boxlist1.boxes()[:, None], boxlist2.boxes()[None]
    low = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    high = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    return (high - low).clamp(min=0).prod(dim=-1)


def iou(boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
    """Intersection over union of each pair, ``[N, M]``; 0 where the boxes do not meet."""
    common = intersection(boxlist1, boxlist2)
    union = area(boxlist1)[:, None] + area(boxlist2)[None] - common
    return torch.where(common == 0, torch.zeros_like(common), common / union)


class IouSimilarity:
    """Intersection over union as the similarity of a ``TargetAssigner``."""

    def compare(self, boxlist1: BoxList, boxlist2: BoxList) -> Tensor:
        """``[N, M]`` matrix of ``iou``."""
        return iou(boxlist1, boxlist2)
