"""The op `soft_nms` in ONNX, where it is hard NMS: by the standard's own operator, NonMaxSuppression."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onnxscript import opset18

op: Any = opset18  # its types are ONNX's
_GONE = -1.0  # of scores, which are at least 0


def hard_nms(num_classes: int) -> Callable[..., Any]:
    """A translation of `effdet_kernels::soft_nms` with method "hard" for `torch.onnx.export`.

    Args:
        num_classes: classes are 0 to this number - 1.
    """

    def soft_nms(
        boxes: Any,
        scores: Any,
        classes: Any,
        num_valid: Any,
        max_det: int,
        method: str,
        sigma: float,
        iou_threshold: float,
        score_threshold: float,
        max_per_class: int | None,
    ) -> Any:
        if method != "hard" or num_valid is not None:
            raise ValueError("only hard NMS of all candidates becomes NonMaxSuppression")
        # A box that is not finite minus itself is NaN.
        strange = op.ReduceMax(
            op.Cast(op.IsNaN(op.Sub(boxes, boxes)), to=1), op.Constant(value_ints=[-1]), keepdims=0
        )
        finite = op.Equal(strange, op.Constant(value_float=0.0))
        threshold = op.Constant(value_float=float(score_threshold))
        usable = op.And(finite, op.Greater(scores, threshold))
        gone = op.Constant(value_float=_GONE)
        scores = op.Where(usable, scores, gone)
        boxes = op.Where(
            op.Unsqueeze(finite, op.Constant(value_ints=[-1])),
            boxes,
            op.Constant(value_float=0.0),
        )
        by_class = op.Unsqueeze(scores, op.Constant(value_ints=[1]))  # [B, C, N]
        if classes is not None:
            numbers = op.Constant(value_ints=list(range(num_classes)))
            mine = op.Equal(
                op.Unsqueeze(classes, op.Constant(value_ints=[1])),
                op.Unsqueeze(numbers, op.Constant(value_ints=[0, 2])),
            )
            by_class = op.Where(mine, by_class, gone)
        most = max_det if max_per_class is None else min(max_det, max_per_class)
        picked = op.NonMaxSuppression(  # [M, 3]: image, class, box
            boxes,
            by_class,
            op.Constant(value_ints=[most]),
            op.Constant(value_floats=[float(iou_threshold)]),
            op.Constant(value_floats=[float(score_threshold)]),
        )
        place = op.Gather(picked, op.Constant(value_ints=[0, 2]), axis=1)
        nothing = op.Expand(gone, op.Shape(scores))
        kept = op.ScatterND(nothing, place, op.GatherND(scores, place))
        batch = op.Shape(scores, start=0, end=1)
        filler = op.Expand(gone, op.Concat(batch, op.Constant(value_ints=[max_det]), axis=0))
        best, index = op.TopK(op.Concat(kept, filler, axis=1), op.Constant(value_ints=[max_det]))
        found = op.Greater(best, threshold)
        index = op.Where(found, index, op.Constant(value_int=-1))
        value = op.Where(found, best, op.Constant(value_float=0.0))
        last = op.Constant(value_ints=[1])
        count = op.ReduceSum(op.Cast(found, to=7), last, keepdims=0)
        dropped = op.ReduceSum(op.Cast(op.Not(finite), to=7), last, keepdims=0)
        return index, value, count, dropped

    return soft_nms
