"""The definition of right for ``soft_nms``: plain PyTorch, one pick per image and step."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    num_valid: Tensor | None,
    max_det: int,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float,
    max_per_class: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``effdet_kernels.soft_nms``; same arguments, all given."""
    state, dropped = start(boxes, scores, classes, num_valid, score_threshold)
    how: tuple[Any, ...] = method, sigma, iou_threshold, score_threshold, max_per_class
    batch, count = scores.shape
    index = torch.full((batch, max_det), -1, device=scores.device)
    value = scores.new_zeros((batch, max_det))
    for step in range(min(max_det, count)):
        pick, best, alive, state = pick_best(*state, *how)
        if not alive.any():
            break
        index[:, step] = torch.where(alive, pick, -1)
        value[:, step] = torch.where(alive, best, 0)
    return index, value, (index >= 0).sum(1), dropped


State = tuple[Tensor, Tensor, Tensor, Tensor]


def start(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    num_valid: Tensor | None,
    score_threshold: float,
) -> tuple[State, Tensor]:
    """The state before the first pick, and how many candidates of each image [B] are not finite.

    A state is scores [B, N], -inf of a candidate that is gone; picks of its class [B, N]; boxes and classes.
    """
    count = scores.shape[1]
    position = torch.arange(count, device=scores.device)
    exists = position < (num_valid[:, None] if num_valid is not None else count)
    finite = boxes.isfinite().all(-1) & scores.isfinite()
    dropped = (exists & ~finite).sum(1)
    score = scores.masked_fill(~(exists & finite & (scores > score_threshold)), -torch.inf)
    boxes = boxes.masked_fill(~finite[..., None], 0)
    taken = torch.zeros_like(score, dtype=torch.int64)
    return (score, taken, boxes, torch.zeros_like(taken) if classes is None else classes), dropped


def pick_best(
    score: Tensor,
    taken: Tensor,
    boxes: Tensor,
    classes: Tensor,
    method: str,
    sigma: float,
    iou_threshold: float,
    score_threshold: float,
    max_per_class: int | None,
) -> tuple[Tensor, Tensor, Tensor, State]:
    """The best candidate of each image: its position, score, whether there is one, all [B]; and the state after it."""
    count = score.shape[1]
    position = torch.arange(count, device=score.device)
    best = score.amax(1, keepdim=True)
    # Equal scores: the lower index.
    pick = torch.where(score == best, position, count - 1).amin(1, keepdim=True)
    box = boxes.gather(1, pick[..., None].expand(-1, -1, 4))
    other = classes != classes.gather(1, pick)
    left = _decayed(score, _iou(box, boxes).masked_fill(other, 0), method, sigma, iou_threshold)
    left = left.masked_fill(position == pick, -torch.inf)
    if max_per_class is not None:
        taken = taken + ~other
        left = left.masked_fill(taken >= max_per_class, -torch.inf)
    left = left.masked_fill(~(left > score_threshold), -torch.inf)
    best = best[:, 0]
    return pick[:, 0], best, best > -torch.inf, (left, taken, boxes, classes)


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of xyxy boxes [..., 4] by broadcasting; 0 where the union is empty."""
    size = (torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])).clamp(
        min=0
    )
    intersection = size[..., 0] * size[..., 1]
    area_a, area_b = ((x[..., 2] - x[..., 0]) * (x[..., 3] - x[..., 1]) for x in (a, b))
    union = area_a + area_b - intersection
    return torch.where(union > 0, intersection / union, 0)


def _decayed(score: Tensor, iou: Tensor, method: str, sigma: float, iou_threshold: float) -> Tensor:
    """Scores after a pick that overlaps the candidates by ``iou``; a factor of 0 removes a candidate (-inf)."""
    if method == "gaussian":
        factor = torch.exp(-(iou * iou) / sigma)
    else:
        kept = 1 - iou if method == "linear" else torch.zeros_like(iou)
        factor = torch.where(iou > iou_threshold, kept, 1)
    return torch.where(factor == 0, -torch.inf, score * factor)
