"""From class logits and box codes to detection rows.

Boxes are (x_min, y_min, x_max, y_max) in model-input pixels until ``detection_rows`` scales them.
"""

from __future__ import annotations

import dataclasses
import math
import numbers

import torch
from torch import Tensor

from effdet_kernels import soft_nms as _soft_nms_op

from .errors import check_number


@dataclasses.dataclass(frozen=True)
class Suppression:
    """Which candidates of an image become detections.

    Attributes:
        soft_nms: candidates that overlap a better one by IoU have their scores multiplied by
            ``exp(-IoU ** 2 / sigma)`` (gaussian soft-NMS); otherwise they are removed (NMS).
        max_det: detections per image at most, >= 0.
        score_threshold: in [0, 1]; a candidate is gone when its score is at or below it. ``None``:
            0.001 for soft-NMS, 0 for NMS.
        iou_threshold: in [0, 1], of NMS, which removes at an IoU above it.
        sigma: above 0, of soft-NMS.
        class_agnostic: candidates suppress those of other classes too.
        max_per_class: detections per image and class at most, >= 1; ``None``: no limit. Not with
            ``class_agnostic``.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of its range, named in the message.
    """

    soft_nms: bool = False
    max_det: int = 100
    score_threshold: float | None = None
    iou_threshold: float = 0.5
    sigma: float = 0.5
    class_agnostic: bool = False
    max_per_class: int | None = None

    def __post_init__(self) -> None:
        share = "a number in [0, 1]", numbers.Real, 0, 1
        check_number("max_det", self.max_det, "an integer >= 0", numbers.Integral, 0)
        if self.score_threshold is not None:
            check_number("score_threshold", self.score_threshold, *share)
        check_number("iou_threshold", self.iou_threshold, *share)
        check_number("sigma", self.sigma, "a number above 0", numbers.Real, math.ulp(0.0))
        if self.max_per_class is not None:
            check_number(
                "max_per_class", self.max_per_class, "an integer >= 1", numbers.Integral, 1
            )
            if self.class_agnostic:
                got = f"got {self.max_per_class} with class_agnostic"
                raise ValueError(f"max_per_class: {got}, takes None")

    @property
    def least_score(self) -> float:
        """``score_threshold``, or its default."""
        if self.score_threshold is not None:
            return self.score_threshold
        return 0.001 if self.soft_nms else 0.0


def swap_xy(boxes: Tensor) -> Tensor:
    """(y, x, y, x) as (x, y, x, y), or back."""
    # Not by a list of indices: it would be copied to the device at each call.
    return boxes.unflatten(-1, (2, 2)).flip(-1).flatten(-2)


def decode_box_outputs(rel_codes: Tensor, anchors: Tensor, output_xyxy: bool = False) -> Tensor:
    """The boxes that codes relative to anchors stand for.

    Args:
        rel_codes: ``[..., 4]`` (ty, tx, th, tw).
        anchors: ``[..., 4]`` (y_min, x_min, y_max, x_max), broadcast against ``rel_codes``.
        output_xyxy: return (x_min, y_min, x_max, y_max) instead of (y_min, x_min, y_max, x_max).

    Returns:
        ``[..., 4]`` in the wider dtype of the two. Neither clipped nor limited: a large th or tw
        gives an infinite box.
    """
    size = anchors[..., 2:] - anchors[..., :2]
    center = (anchors[..., :2] + anchors[..., 2:]) / 2
    half = rel_codes[..., 2:].exp() * size / 2
    center = rel_codes[..., :2] * size + center
    boxes = torch.cat([center - half, center + half], dim=-1)
    return swap_xy(boxes) if output_xyxy else boxes


def clip_boxes_xyxy(boxes: Tensor, size: Tensor) -> Tensor:
    """Clip boxes ``[..., N, 4]`` (x, y, x, y) to 0 and to ``size`` ``[..., 2]`` (W, H)."""
    limits = torch.cat([size, size], dim=-1)
    return boxes.clamp(min=0).minimum(limits[..., None, :].to(boxes.dtype))


def clip_limits(img_size: Tensor | None, img_scale: Tensor | None, batch: int) -> Tensor | None:
    """``img_size / img_scale``, the image's (W, H) in model-input pixels, ``[batch, 2]`` float32.

    ``None``, for no clipping, unless both are given.

    Raises:
        ValueError: ``img_size`` is not ``[batch, 2]`` or ``img_scale`` is not ``[batch]``.
    """
    if img_size is None or img_scale is None:
        return None
    if img_size.shape != (batch, 2):
        raise ValueError(
            f"img_size must be [{batch}, 2] (width, height), got {list(img_size.shape)}"
        )
    return img_size.float() / _per_image(img_scale, batch)


def detection_rows(
    boxes: Tensor,
    logits: Tensor,
    classes: Tensor,
    img_scale: Tensor | None,
    suppression: Suppression,
) -> Tensor:
    """Suppress overlapping candidates of B images at once; no synchronisation with the device.

    Args:
        boxes: ``[B, K, 4]`` float32, decoded and clipped. Non-finite ones are left out.
        logits: ``[B, K]``; of equal scores the lower position comes first.
        classes: ``[B, K]`` int64, 0-based.
        img_scale: ``[B]``, multiplies the boxes at the end; ``None`` leaves them.
        suppression: which of them become rows.

    Returns:
        ``[B, max_det, 6]`` float32: x_min, y_min, x_max, y_max, score, class from 1.
        In descending order of score, then rows of zeros.
    """
    batch, candidates = logits.shape
    if candidates == 0:
        return boxes.new_zeros(batch, suppression.max_det, 6)
    scores = logits.float().sigmoid()
    index, score, _, _ = _soft_nms_op(
        boxes,
        scores,
        None if suppression.class_agnostic else classes,
        None,
        suppression.max_det,
        method="gaussian" if suppression.soft_nms else "hard",
        sigma=suppression.sigma,
        iou_threshold=suppression.iou_threshold,
        score_threshold=suppression.least_score,
        max_per_class=suppression.max_per_class,
    )
    picked = index.clamp(min=0)
    picked_boxes = boxes.gather(1, picked[..., None].expand(-1, -1, 4))
    if img_scale is not None:
        picked_boxes = picked_boxes * _per_image(img_scale, batch)[..., None]
    if not suppression.soft_nms:
        score = scores.gather(1, picked)  # the same numbers, differentiable
    label = classes.gather(1, picked).float() + 1  # 0 is background
    rows = torch.cat([picked_boxes, score[..., None], label[..., None]], dim=-1)
    return rows.masked_fill((index < 0)[..., None], 0)


def generate_detections(
    cls_outputs: Tensor,
    box_outputs: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None,
    img_size: Tensor | None,
    max_det_per_image: int = 100,
    soft_nms: bool = False,
) -> Tensor:
    """Detections of one image from its best candidates.

    Args:
        cls_outputs: ``[K, 1]`` logits, in descending order.
        box_outputs: ``[K, 4]`` codes (ty, tx, th, tw).
        anchor_boxes: ``[N, 4]`` (y_min, x_min, y_max, x_max).
        indices: ``[K]`` int64, anchor of each candidate.
        classes: ``[K]`` int64, 0-based class of each candidate.
        img_scale: 0-d, original size / model-input size; ``None`` for no scaling.
        img_size: ``[2]`` (W, H) of the original image; boxes are clipped to it where
            ``img_scale`` is given too.
        max_det_per_image: rows to return.
        soft_nms: gaussian soft-NMS instead of NMS at IoU 0.5.

    Returns:
        ``[max_det_per_image, 6]``, rows as in ``detection_rows``.
    """
    return batch_rows(
        cls_outputs[None],
        box_outputs[None],
        anchor_boxes,
        indices[None],
        classes[None],
        None if img_scale is None else torch.as_tensor(img_scale).reshape(1),
        None if img_size is None else img_size[None],
        Suppression(soft_nms, max_det_per_image),
    )[0]


def batch_rows(
    class_out: Tensor,
    box_out: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None,
    img_size: Tensor | None,
    suppression: Suppression,
) -> Tensor:
    """``generate_detections`` of B images: every tensor but ``anchor_boxes`` has B in front."""
    boxes = decode_box_outputs(box_out.float(), anchor_boxes.float()[indices], output_xyxy=True)
    limits = clip_limits(img_size, img_scale, class_out.shape[0])
    if limits is not None:
        boxes = clip_boxes_xyxy(boxes, limits)
    logits = class_out.squeeze(-1)
    return detection_rows(boxes, logits, classes, img_scale, suppression)


def _per_image(img_scale: Tensor, batch: int) -> Tensor:
    if img_scale.numel() != batch:
        raise ValueError(f"img_scale must be [{batch}], got {list(img_scale.shape)}")
    return img_scale.float().reshape(batch, 1)
