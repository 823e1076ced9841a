"""Non-maximum suppression of one image's boxes, hard and soft, on ``effdet_kernels.soft_nms``."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels import soft_nms as _soft_nms_op


def pairwise_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Intersection over union of every pair.

    Args:
        boxes1: ``[N, 4]`` (x_min, y_min, x_max, y_max), any unit, no +1 convention.
        boxes2: ``[M, 4]``.

    Returns:
        ``[N, M]``; 0 where the boxes do not meet.
    """
    a, b = boxes1[:, None], boxes2[None]
    extent = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    common = extent.clamp(min=0).prod(dim=-1)
    union = _area(a) + _area(b) - common
    return torch.where(common > 0, common / union, torch.zeros_like(common))


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    method_gaussian: bool = True,
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.005,
) -> tuple[Tensor, Tensor]:
    """Soft-NMS (arXiv:1704.04503) of the boxes of one class.

    Repeatedly picks the highest score and decays the scores of the boxes that overlap the pick.

    Args:
        boxes: ``[N, 4]`` (x_min, y_min, x_max, y_max).
        scores: ``[N]``.
        method_gaussian: decay by ``exp(-iou ** 2 / sigma)``; otherwise linearly, by ``1 - iou``
            where ``iou > iou_threshold``.
        sigma: width of the gaussian.
        iou_threshold: used by the linear decay only.
        score_threshold: a box whose score is at or below it is gone. This holds for every pick,
            the first included: PyPI effdet 0.4.1 emits the first pick whatever its score.

    Returns:
        indices ``[K]`` int64 of the kept boxes and their decayed scores ``[K]`` float32, in
        descending order of score. Boxes with a non-finite coordinate or score are not kept.
    """
    return _one_image(boxes, scores, None, method_gaussian, sigma, iou_threshold, score_threshold)


def batched_soft_nms(
    boxes: Tensor,
    scores: Tensor,
    idxs: Tensor,
    method_gaussian: bool = True,
    sigma: float = 0.5,
    iou_threshold: float = 0.5,
    score_threshold: float = 0.001,
) -> tuple[Tensor, Tensor]:
    """``soft_nms`` in which only boxes of the same class, ``idxs`` ``[N]``, decay one another.

    Classes are compared as numbers; coordinates are not shifted to keep classes apart, so that
    no precision is lost.
    """
    return _one_image(boxes, scores, idxs, method_gaussian, sigma, iou_threshold, score_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS in which only boxes of the same class suppress one another.

    Args:
        boxes: ``[N, 4]`` (x_min, y_min, x_max, y_max).
        scores: ``[N]``, any finite values.
        idxs: ``[N]`` class of each box.
        iou_threshold: a box that overlaps a kept one by more than this is removed.

    Returns:
        indices ``[K]`` int64 of the kept boxes in descending order of score; of equal scores the
        lower index first.
    """
    index, _, count, _ = _soft_nms_op(
        boxes[None],
        scores[None].to(boxes.dtype),
        idxs.long()[None],
        None,
        scores.numel(),
        method="hard",
        iou_threshold=iou_threshold,
        score_threshold=-torch.inf,
    )
    return index[0, : int(count)]


def remove_small_boxes(boxes: Tensor, min_size: float) -> Tensor:
    """Indices ``[K]`` of the boxes whose two sides are at least ``min_size``."""
    sides = boxes[:, 2:] - boxes[:, :2]
    return (sides >= min_size).all(dim=1).nonzero().squeeze(1)


def _area(boxes: Tensor) -> Tensor:
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def _one_image(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None,
    method_gaussian: bool,
    sigma: float,
    iou_threshold: float,
    score_threshold: float,
) -> tuple[Tensor, Tensor]:
    index, score, count, _ = _soft_nms_op(
        boxes[None],
        scores[None],
        None if classes is None else classes.long()[None],
        None,
        scores.numel(),
        method="gaussian" if method_gaussian else "linear",
        sigma=sigma,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    kept = int(count)
    return index[0, :kept], score[0, :kept].float()
