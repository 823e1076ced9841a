"""Launcher of the CUDA kernel of ``soft_nms``."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels import _cuda
from effdet_kernels.ops.soft_nms import op

# As in csrc/soft_nms/cuda_params.h.
_MOST_CANDIDATES = 8192


def refusal(
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
) -> str | None:
    """Why the kernel does not take a call, or None."""
    if boxes.dtype != torch.float32:
        return f"boxes: is {_cuda.dtype_name(boxes.dtype)}, takes float32"
    if boxes.shape[1] > _MOST_CANDIDATES:
        return f"boxes: has {boxes.shape[1]} candidates, takes at most {_MOST_CANDIDATES}"
    if max_det >= 1 << 30:
        return f"max_det: got {max_det}, takes less than {1 << 30}"
    if max_per_class is not None:
        return f"max_per_class: got {max_per_class}, takes None"
    return _cuda.misaligned("boxes", boxes) if boxes.is_contiguous() else None


def run(
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
) -> list[Tensor]:
    """Indices and scores [B, max_det], counts and dropped [B]."""
    boxes, scores = boxes.contiguous(), scores.contiguous()
    classes, num_valid = _cuda.dense(classes), _cuda.dense(num_valid)
    batch, count = scores.shape
    specs = op._out_spec(boxes, scores, classes, num_valid, max_det)
    outputs = [spec.empty() for spec in specs]
    index, score, found, dropped = outputs
    _cuda.launch(
        "soft_nms",
        scores,
        batch=batch,
        count=count,
        max_det=max_det,
        boxes=boxes,
        scores=scores,
        classes=classes,
        num_valid=num_valid,
        index=index,
        score=score,
        found=found,
        dropped=dropped,
        method=op.METHODS.index(method),
        sigma=sigma,
        iou_threshold=iou_threshold,
        score_threshold=score_threshold,
    )
    return outputs
