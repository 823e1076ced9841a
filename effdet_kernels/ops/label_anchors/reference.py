"""The definition of right for ``label_anchors``: plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-7  # added to all widths and heights before they divide or enter a logarithm


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """[M, N] intersection over union of xyxy boxes [M, 4] and [N, 4]; 0 where they do not meet."""
    overlap = torch.minimum(a[:, None, 2:], b[None, :, 2:]) - torch.maximum(
        a[:, None, :2], b[None, :, :2]
    )
    inter = overlap.clamp(min=0).prod(-1)
    union = (a[:, 2:] - a[:, :2]).prod(-1)[:, None] + (b[:, 2:] - b[:, :2]).prod(-1) - inter
    return torch.where(inter > 0, inter / union, 0)


def _encode(boxes: Tensor, anchors: Tensor) -> Tensor:
    """(ty, tx, th, tw) [N, 4] of xyxy boxes [N, 4] against xyxy anchors [N, 4]."""
    size, base = boxes[:, 2:] - boxes[:, :2], anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + size / 2 - (anchors[:, :2] + base / 2)) / (base + EPS)
    scale = torch.log((size + EPS) / (base + EPS))
    return torch.cat([shift, scale], 1)[:, [1, 0, 3, 2]]


def _label(boxes: Tensor, classes: Tensor, anchors: Tensor, threshold: float) -> tuple[Tensor, ...]:
    """One image: anchors take their best box at IoU >= threshold, boxes claim their best anchor."""
    total = anchors.shape[0]
    cls_target = torch.full((total,), -1, dtype=torch.long, device=anchors.device)
    box_target = anchors.new_zeros((total, 4))
    if boxes.shape[0] == 0 or total == 0:
        return cls_target, box_target, anchors.new_zeros(())
    iou = _iou(boxes, anchors)
    best, match = iou.max(0)
    match = match.masked_fill(best < threshold, -1)
    rows = torch.arange(boxes.shape[0], device=anchors.device)
    claim = torch.full_like(match, boxes.shape[0])
    claim.scatter_reduce_(0, iou.argmax(1), rows, "amin")  # the first of two claims wins
    match = torch.where(claim < boxes.shape[0], claim, match)
    hit = match >= 0
    chosen = match.clamp(min=0)
    cls_target = torch.where(hit, classes.long()[chosen] - 1, cls_target)
    box_target = torch.where(hit[:, None], _encode(boxes[chosen], anchors), box_target)
    return cls_target, box_target, hit.sum().to(anchors.dtype)


def check_finite(boxes: Tensor) -> None:
    """Raises ValueError if a box has a coordinate that is none."""
    if not boxes.isfinite().all():
        raise ValueError(
            "label_anchors: gt_boxes: got a NaN or infinite coordinate, takes finite boxes"
        )


def label_anchors(
    gt_boxes: Tensor, gt_classes: Tensor, anchors: Tensor, match_threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Class targets (0-based, -1 background), box codes and number of positives of each image."""
    boxes = gt_boxes.to(anchors.dtype)
    real = gt_classes > -1
    if not boxes.is_cuda:  # there a check would wait for the device
        check_finite(boxes[real])
    rows = [
        _label(b[keep], c[keep], anchors, match_threshold)
        for b, c, keep in zip(boxes, gt_classes, real, strict=True)
    ]
    if not rows:
        count = anchors.shape[0]
        empty = torch.zeros((0, count), dtype=torch.long, device=anchors.device)
        return empty, anchors.new_zeros((0, count, 4)), anchors.new_zeros((0,))
    cls_target, box_target, positives = zip(*rows, strict=True)
    return torch.stack(cls_target), torch.stack(box_target), torch.stack(positives)
