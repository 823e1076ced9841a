"""From class logits and box codes to detection rows.

Boxes are (x_min, y_min, x_max, y_max) in model-input pixels until ``detection_rows`` scales them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effdet_kernels import soft_nms as _soft_nms_op

HARD_NMS: dict[str, Any] = {"method": "hard", "iou_threshold": 0.5, "score_threshold": 0.0}
SOFT_NMS: dict[str, Any] = {
    "method": "gaussian",
    "sigma": 0.5,
    "iou_threshold": 0.3,
    "score_threshold": 0.001,
}


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
    max_det_per_image: int,
    soft_nms: bool,
) -> Tensor:
    """Suppress overlapping candidates of B images at once; no synchronisation with the device.

    Args:
        boxes: ``[B, K, 4]`` float32, decoded and clipped. Non-finite ones are left out.
        logits: ``[B, K]``; of equal scores the lower position comes first.
        classes: ``[B, K]`` int64, 0-based.
        img_scale: ``[B]``, multiplies the boxes at the end; ``None`` leaves them.
        max_det_per_image: rows per image.
        soft_nms: gaussian soft-NMS (sigma 0.5, scores above 0.001) instead of NMS at IoU 0.5.

    Returns:
        ``[B, max_det_per_image, 6]`` float32: x_min, y_min, x_max, y_max, score, class from 1.
        In descending order of score, then rows of zeros.
    """
    batch, candidates = logits.shape
    if candidates == 0:
        return boxes.new_zeros(batch, max_det_per_image, 6)
    scores = logits.float().sigmoid()
    index, score, _, _ = _soft_nms_op(
        boxes, scores, classes, None, max_det_per_image, **(SOFT_NMS if soft_nms else HARD_NMS)
    )
    picked = index.clamp(min=0)
    picked_boxes = boxes.gather(1, picked[..., None].expand(-1, -1, 4))
    if img_scale is not None:
        picked_boxes = picked_boxes * _per_image(img_scale, batch)[..., None]
    if not soft_nms:
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
        max_det_per_image,
        soft_nms,
    )[0]


def batch_rows(
    class_out: Tensor,
    box_out: Tensor,
    anchor_boxes: Tensor,
    indices: Tensor,
    classes: Tensor,
    img_scale: Tensor | None,
    img_size: Tensor | None,
    max_det_per_image: int,
    soft_nms: bool,
) -> Tensor:
    """``generate_detections`` of B images: every argument but ``anchor_boxes`` has B in front."""
    boxes = decode_box_outputs(box_out.float(), anchor_boxes.float()[indices], output_xyxy=True)
    limits = clip_limits(img_size, img_scale, class_out.shape[0])
    if limits is not None:
        boxes = clip_boxes_xyxy(boxes, limits)
    logits = class_out.squeeze(-1)
    return detection_rows(boxes, logits, classes, img_scale, max_det_per_image, soft_nms)


def _per_image(img_scale: Tensor, batch: int) -> Tensor:
    if img_scale.numel() != batch:
        raise ValueError(f"img_scale must be [{batch}], got {list(img_scale.shape)}")
    return img_scale.float().reshape(batch, 1)
