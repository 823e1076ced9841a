"""Batched soft-NMS and NMS: every image and class in one call, fixed-size output, no host synchronisation."""

from __future__ import annotations

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops.soft_nms import reference

METHODS = ("gaussian", "linear", "hard")


def soft_nms(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor | None = None,
    num_valid: Tensor | None = None,
    max_det: int = 100,
    *,
    method: str = "gaussian",
    sigma: float = 0.5,
    iou_threshold: float = 0.3,
    score_threshold: float = 0.001,
    max_per_class: int | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Repeats per image: pick the best score s_i, then decay the others of its class, s_j <- s_j * f(IoU(i, j)).

    f is exp(-IoU^2 / sigma) ("gaussian"); 1 - IoU where IoU > iou_threshold, else 1 ("linear"); 0 where
    IoU > iou_threshold, else 1 ("hard", greedy NMS). Source: Soft-NMS, arXiv:1704.04503, section 3; used by
    EfficientDet, arXiv:1911.09070, section 5.

    Args:
        boxes: [B, N, 4] float32 or float64, (x_min, y_min, x_max, y_max), continuous coordinates (no +1), any unit.
            float16 and bfloat16 are computed in, and returned as, float32; so is everything under autocast.
        scores: [B, N], dtype of ``boxes``.
        classes: [B, N] integer, boxes of different classes leave each other alone; None: class-agnostic.
        num_valid: [B] integer, only the first ``num_valid[b]`` candidates of image b count; None: all N.
        max_det: picks per image at most; stopping there does not change the picks before.
        method: "gaussian", "linear" or "hard".
        sigma: width of the gaussian, > 0. (TensorFlow's ``soft_nms_sigma`` is half of it.)
        iou_threshold: of "linear" and "hard".
        score_threshold: a candidate exists while its score is > this; ``-inf`` keeps all.
        max_per_class: picks per class and image at most, >= 1; a class that has had them has no candidates left.
            None: no limit. Without ``classes`` all candidates are of one class.

    Returns:
        index: [B, max_det] int64, positions of the picks in order of their (decayed) score; -1 beyond ``count``.
        score: [B, max_det], the score of each pick when it was picked; 0 beyond ``count``.
        count: [B] int64, number of picks.
        dropped: [B] int64, candidates ignored for a non-finite coordinate or score.

    Equal scores: the lower index first. Degenerate boxes have IoU 0. Any strides; non-contiguous inputs are copied.
    Not differentiable. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "soft_nms"
    _checks.tensor(op, "boxes", boxes, ("B", "N", 4))
    batch, count = boxes.shape[:2]
    _checks.tensor(op, "scores", scores, (batch, count), device=boxes.device)
    integers = (torch.int64, torch.int32, torch.int16, torch.uint8)
    if classes is not None:
        _checks.tensor(op, "classes", classes, (batch, count), dtypes=integers, device=boxes.device)
        classes = _plain(classes, torch.int64)
    if num_valid is not None:
        _checks.tensor(op, "num_valid", num_valid, (batch,), dtypes=integers, device=boxes.device)
        num_valid = _plain(num_valid, torch.int64)
    _checks.number(op, "max_det", max_det, least=0)
    _checks.choice(op, "method", method, METHODS)
    _checks.number(op, "sigma", sigma, above=0)
    _checks.number(op, "iou_threshold", iou_threshold, least=0)
    _checks.number(op, "score_threshold", score_threshold, least=-float("inf"))
    if max_per_class is not None:
        _checks.number(op, "max_per_class", max_per_class, least=1)
    dtype = torch.float64 if boxes.dtype == torch.float64 else torch.float32
    return _soft_nms(
        _plain(boxes, dtype),
        _plain(scores, dtype),
        classes,
        num_valid,
        max_det,
        method,
        sigma,
        iou_threshold,
        score_threshold,
        max_per_class,
    )


def _plain(values: Tensor, dtype: torch.dtype) -> Tensor:
    """``values`` without gradients and in ``dtype``; calls that change nothing are left out."""
    values = values.detach() if values.requires_grad else values
    return values if values.dtype == dtype else values.to(dtype)


def _out_spec(boxes: Tensor, scores: Tensor, classes, num_valid, max_det, *_) -> list[TensorSpec]:
    batch, device = boxes.shape[0], boxes.device
    return [
        TensorSpec((batch, max_det), torch.int64, device),
        TensorSpec((batch, max_det), scores.dtype, device),
        TensorSpec((batch,), torch.int64, device),
        TensorSpec((batch,), torch.int64, device),
    ]


def _cpu(
    boxes,
    scores,
    classes,
    num_valid,
    max_det,
    method,
    sigma,
    iou_threshold,
    score_threshold,
    max_per_class,
):
    boxes, scores = boxes.contiguous(), scores.contiguous()
    classes = None if classes is None else classes.contiguous()
    num_valid = None if num_valid is None else num_valid.contiguous()
    outputs = [spec.empty() for spec in _out_spec(boxes, scores, classes, num_valid, max_det)]
    status = _native.module().soft_nms_cpu(
        _native.DTYPE_CODES[scores.dtype],
        boxes.data_ptr(),
        scores.data_ptr(),
        0 if classes is None else classes.data_ptr(),
        0 if num_valid is None else num_valid.data_ptr(),
        *[out.data_ptr() for out in outputs],
        *scores.shape,
        max_det,
        METHODS.index(method),
        sigma,
        iou_threshold,
        score_threshold,
        0 if max_per_class is None else max_per_class,
        torch.get_num_threads(),
    )
    _native.check(status, "soft_nms")
    return outputs


_soft_nms = _library.define(
    "soft_nms(Tensor boxes, Tensor scores, Tensor? classes, Tensor? num_valid, SymInt max_det, str method,"
    " float sigma, float iou_threshold, float score_threshold, SymInt? max_per_class)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "cpu": _cpu,
        "triton": _triton.deferred("effdet_kernels.ops.soft_nms.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.soft_nms.cuda"),
        "reference": reference.soft_nms,
    },
)
