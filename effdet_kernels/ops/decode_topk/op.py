"""The best (anchor, class) pairs of each image with their decoded boxes: what precedes NMS."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.decode_topk import reference


def decode_topk(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    *,
    num_classes: int,
    k: int,
    limits: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The K largest logits of each image, K = min(k, N * C), and the boxes of their anchors.

    With (ty, tx, th, tw) the code of an anchor of centre (xa, ya) and size (wa, ha): the box has
    centre (tx * wa + xa, ty * ha + ya) and size (exp(tw) * wa, exp(th) * ha). Source: the box
    coding of Faster R-CNN, arXiv:1506.01497, section 3.1.2; the heads of EfficientDet,
    arXiv:1911.09070, section 4.

    Args:
        cls_outputs: per level [B, A * C, H_l, W_l] logits, anchor-major in channels; any floating
            dtype and strides.
        box_outputs: per level [B, A * 4, H_l, W_l] codes (ty, tx, th, tw), dtype of
            ``cls_outputs``.
        anchors: [N, 4] float32 or float64, xyxy, in pixels, in level, row, column, anchor order;
            N = A * sum of H_l * W_l.
        num_classes: C, at least 1.
        k: pairs wanted, at least 0; an anchor may appear once for each class.
        limits: [B, 2] (width, height), any floating dtype: boxes are clipped to x in [0, width]
            and y in [0, height]; None: they are not.

    Returns:
        boxes: [B, K, 4] float32 (float64 with float64), xyxy, in the unit of ``anchors``.
        logits: [B, K], dtype of ``cls_outputs``, descending.
        anchor_index: [B, K] int64, row of ``anchors``.
        classes: [B, K] int64, 0-based.

    Equal logits: the lower (anchor, class) first. NaN ranks with +inf, so that it is seen and not
    hidden. There is no clamp before exp: a large code gives an infinite box. Under autocast all is
    float32. Differentiable in cls_outputs (through the logits) and box_outputs (through the boxes).
    Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message.
    """
    op = "decode_topk"
    cls_outputs = _arguments.tensor_list(op, "cls_outputs", cls_outputs)
    box_outputs = _arguments.tensor_list(op, "box_outputs", box_outputs, (len(cls_outputs),))
    _arguments.integer(op, "num_classes", num_classes, least=1)
    _arguments.integer(op, "k", k, least=0)
    first = cls_outputs[0]
    _arguments.feature_map(op, "cls_outputs[0]", first)
    batch, channels = first.shape[:2]
    per_location = _arguments.anchors_per_location(op, first, num_classes)
    total = 0
    for i, (cls, box) in enumerate(zip(cls_outputs, box_outputs, strict=True)):
        _arguments.dense(op, f"cls_outputs[{i}]", cls, (batch, channels, "H", "W"), first)
        height, width = cls.shape[2:]
        shape = (batch, 4 * per_location, height, width)
        _arguments.dense(op, f"box_outputs[{i}]", box, shape, first)
        total += per_location * height * width
    wide = (torch.float32, torch.float64)
    _checks.tensor(op, "anchors", anchors, (total, 4), dtypes=wide, device=first.device)
    if limits is not None:
        _checks.tensor(op, "limits", limits, (batch, 2), device=first.device)
    return _decode_topk(cls_outputs, box_outputs, anchors, num_classes, k, limits)


def _out_spec(cls_outputs, box_outputs, anchors, num_classes, k, limits) -> list[TensorSpec]:
    first = cls_outputs[0]
    batch, device = first.shape[0], first.device
    kept = min(k, anchors.shape[0] * num_classes)
    return [
        TensorSpec((batch, kept, 4), accumulation_dtype(first.dtype), device),
        TensorSpec((batch, kept), first.dtype, device),
        TensorSpec((batch, kept), torch.int64, device),
        TensorSpec((batch, kept), torch.int64, device),
    ]


_decode_topk = _library.define(
    "decode_topk(Tensor[] cls_outputs, Tensor[] box_outputs, Tensor anchors, SymInt num_classes,"
    " SymInt k, Tensor? limits) -> (Tensor, Tensor, Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "triton": _triton.deferred("effdet_kernels.ops.decode_topk.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.decode_topk.cuda"),
        "reference": reference.decode_topk,
    },
    backwards={"triton": _triton.deferred("effdet_kernels.ops.decode_topk.triton_bwd")},
    differentiable=("cls_outputs", "box_outputs"),
    nondifferentiable_outputs=(2, 3),
    saved_outputs=(2, 3),
)
