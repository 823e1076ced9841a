"""Training targets: matches the boxes of a whole batch to anchors."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _cpu
from effdet_kernels.ops.label_anchors import reference


def label_anchors(
    gt_boxes: Tensor, gt_classes: Tensor, anchors: Tensor, *, match_threshold: float = 0.5
) -> tuple[Tensor, Tensor, Tensor]:
    """An anchor is positive for its box of largest IoU >= match_threshold, or for one claiming it.

    Every box claims the anchor of its largest IoU, over any other match; of several boxes that
    claim one anchor the first wins, and of several anchors or boxes at equal IoU the first counts
    (a box that meets no anchor claims anchor 0). The code of a positive is ty = (yc - ya) / ha,
    tx = (xc - xa) / wa, th = log(h / ha), tw = log(w / wa), with 1e-7 added to h, w, ha and wa.
    Source: the matching of SSD, arXiv:1512.02325, section 2.2; the box coding of Faster R-CNN,
    arXiv:1506.01497, section 3.1.2.

    Args:
        gt_boxes: [B, M, 4] any floating dtype, xyxy in pixels, continuous coordinates (no +1),
            finite where not padding.
        gt_classes: [B, M] any floating or integer dtype, 1-based; a class <= -1 marks padding.
        anchors: [N, 4] float32 or float64, xyxy, in pixels.
        match_threshold: 0 or more.

    Returns:
        cls_target: [B, N] int64, class - 1 of positives, -1 elsewhere.
        box_target: [B, N, 4] dtype of ``anchors``, (ty, tx, th, tw) of positives, 0 elsewhere.
        num_positives: [B] dtype of ``anchors``.

    Computed in the dtype of ``anchors``, also under autocast. Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message;
            on CPU also a non-finite box.
    """
    op = "label_anchors"
    _checks.tensor(op, "gt_boxes", gt_boxes, ("B", "M", 4))
    batch, count = gt_boxes.shape[:2]
    device = gt_boxes.device
    numbers = (*_checks.FLOATING, torch.int64, torch.int32)
    _checks.tensor(op, "gt_classes", gt_classes, (batch, count), dtypes=numbers, device=device)
    wide = (torch.float32, torch.float64)
    _checks.tensor(op, "anchors", anchors, ("N", 4), dtypes=wide, device=device)
    _checks.number(op, "match_threshold", match_threshold, least=0)
    return _label_anchors(gt_boxes.detach(), gt_classes.detach(), anchors.detach(), match_threshold)


def _out_spec(gt_boxes, gt_classes, anchors, match_threshold) -> list[TensorSpec]:
    batch, total, device = gt_boxes.shape[0], anchors.shape[0], anchors.device
    return [
        TensorSpec((batch, total), torch.int64, device),
        TensorSpec((batch, total, 4), anchors.dtype, device),
        TensorSpec((batch,), anchors.dtype, device),
    ]


def _run_cpu(gt_boxes, gt_classes, anchors, match_threshold) -> tuple[Tensor, Tensor, Tensor]:
    batch, count = gt_classes.shape
    total = anchors.shape[0]
    if not (batch and count and total):
        return reference.label_anchors(gt_boxes, gt_classes, anchors, match_threshold)
    boxes = gt_boxes.to(anchors.dtype).contiguous()
    classes = gt_classes
    if classes.is_floating_point():  # a NaN has no integer
        classes = classes.masked_fill(~(classes > -1), -1)
    labels, codes, positives = (spec.empty() for spec in _out_spec(boxes, classes, anchors, None))
    infinite = torch.empty(1, dtype=torch.int64)
    module, dtype = _native.module(), _cpu.code(anchors.dtype)
    parts = module.label_anchors_parts(batch, total, torch.get_num_threads())
    size = module.label_anchors_workspace(dtype, batch, count, total, parts)
    _native.launch(
        "label_anchors",
        dtype=dtype,
        batch=batch,
        count=count,
        total=total,
        parts=parts,
        threshold=match_threshold,
        boxes=boxes,
        classes=classes.long().contiguous(),
        anchors=anchors.contiguous(),
        labels=labels,
        codes=codes,
        positives=positives,
        infinite=infinite,
        workspace=torch.empty(size, dtype=torch.uint8),
    )
    if infinite.item():
        reference.check_finite(boxes[classes > -1])
    return labels, codes, positives


_label_anchors = _library.define(
    "label_anchors(Tensor gt_boxes, Tensor gt_classes, Tensor anchors, float match_threshold)"
    " -> (Tensor, Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.label_anchors.triton_fwd"),
        "reference": reference.label_anchors,
    },
)
