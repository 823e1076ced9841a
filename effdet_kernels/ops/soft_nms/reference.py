"""The definition of right for ``soft_nms``: plain PyTorch, one pick per image and step."""

from __future__ import annotations

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
    batch, count = scores.shape
    position = torch.arange(count, device=scores.device)
    exists = position < (num_valid[:, None] if num_valid is not None else count)
    finite = boxes.isfinite().all(-1) & scores.isfinite()
    dropped = (exists & ~finite).sum(1)
    # From here on a candidate that is gone has score -inf.
    score = scores.masked_fill(~(exists & finite & (scores > score_threshold)), -torch.inf)
    boxes = boxes.masked_fill(~finite[..., None], 0)

    index = torch.full((batch, max_det), -1, device=scores.device)
    value = scores.new_zeros((batch, max_det))
    found = torch.zeros(batch, dtype=torch.int64, device=scores.device)
    rows = torch.arange(batch, device=scores.device)
    taken = torch.zeros_like(score, dtype=torch.int64)  # picks of a candidate's class
    if classes is None:
        classes = torch.zeros_like(taken)
    for step in range(min(max_det, count)):
        best = score.amax(1)
        alive = best > -torch.inf
        if not alive.any():
            break
        # Equal scores: the lower index.
        pick = torch.where(score == best[:, None], position, count - 1).amin(1)
        index[:, step] = torch.where(alive, pick, -1)
        value[:, step] = torch.where(alive, best, 0)
        found += alive
        iou = _iou(boxes[rows, pick][:, None], boxes)
        other = classes != classes[rows, pick][:, None]
        iou = iou.masked_fill(other, 0)
        score = _decayed(score, iou, method, sigma, iou_threshold)
        score[rows, pick] = -torch.inf
        if max_per_class is not None:
            taken += ~other
            score = score.masked_fill(taken >= max_per_class, -torch.inf)
        score = score.masked_fill(~(score > score_threshold), -torch.inf)
    return index, value, found, dropped


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
