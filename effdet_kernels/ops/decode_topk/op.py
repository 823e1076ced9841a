"""The best (anchor, class) pairs of each image with their decoded boxes: what precedes NMS."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from effdet_kernels import _checks, _cuda, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu
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
    strides: Tensor | None = None,
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
            N = A * sum of H_l * W_l. With ``strides`` [L, A, 4]: those of row 0 and column 0 of
            each of the L levels.
        num_classes: C, at least 1.
        k: pairs wanted, at least 0; an anchor may appear once for each class.
        limits: [B, 2] (width, height), any floating dtype: boxes are clipped to x in [0, width]
            and y in [0, height]; None: they are not.
        strides: [L, 2] (x, y), in pixels, dtype of ``anchors``: an anchor of (row, column) is that
            of (0, 0) moved by (column * x, row * y). None: ``anchors`` has all of them.

    Returns:
        boxes: [B, K, 4] float32 (float64 with float64), xyxy, in the unit of ``anchors``.
        logits: [B, K], dtype of ``cls_outputs``, descending.
        anchor_index: [B, K] int64, 0 to N - 1 in the order of level, row, column, anchor.
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
    levels, dtypes = len(cls_outputs), [torch.float32, torch.float64]
    given = [total, 4]
    if strides is not None:
        _checks.tensor(op, "strides", strides, (levels, 2), dtypes=dtypes, device=first.device)
        given, dtypes = [levels, per_location, 4], [strides.dtype]
    _checks.tensor(op, "anchors", anchors, given, dtypes=dtypes, device=first.device)
    if limits is not None:
        _checks.tensor(op, "limits", limits, (batch, 2), device=first.device)
    return _decode_topk(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides)


def _out_spec(
    cls_outputs, box_outputs, anchors, num_classes, k, limits, strides
) -> list[TensorSpec]:
    first = cls_outputs[0]
    batch, device = first.shape[0], first.device
    kept = min(k, sum(math.prod(level.shape[1:]) for level in cls_outputs))
    return [
        TensorSpec((batch, kept, 4), accumulation_dtype(first.dtype), device),
        TensorSpec((batch, kept), first.dtype, device),
        TensorSpec((batch, kept), torch.int64, device),
        TensorSpec((batch, kept), torch.int64, device),
    ]


def _dense(x: Tensor) -> tuple[Tensor, bool]:
    """``x``, or a copy where it is not dense, and whether pixels are inside, not channels."""
    if x.is_contiguous() and not x.is_contiguous(memory_format=torch.channels_last):
        return x, True
    return x.contiguous(memory_format=torch.channels_last), False


def _run_cpu(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides):
    dtype = cls_outputs[0].dtype
    cls_outputs, box_outputs = _cpu.widened((cls_outputs, box_outputs))
    specs = _out_spec(cls_outputs, box_outputs, anchors, num_classes, k, limits, strides)
    boxes, logits, anchor_index, classes = outputs = [spec.empty() for spec in specs]
    if logits.numel() == 0:
        return outputs
    levels = []
    for cls, box in zip(cls_outputs, box_outputs, strict=True):
        (cls, planar), (box, box_planar) = _dense(cls), _dense(box)
        levels.append((cls, box, *cls.shape[2:], planar, box_planar))
    _native.launch(
        "decode_topk",
        dtype=_native.DTYPE_CODES[logits.dtype],
        batch=len(logits),
        anchors=_arguments.anchors_per_location("decode_topk", cls_outputs[0], num_classes),
        classes=num_classes,
        levels=levels,
        kept=logits.shape[1],
        anchor_boxes=anchors.to(boxes.dtype if strides is None else torch.float64).contiguous(),
        strides=None if strides is None else strides.to(torch.float64).contiguous(),
        limits=None if limits is None else limits.to(boxes.dtype).contiguous(),
        boxes=boxes,
        logits=logits,
        anchor_index=anchor_index,
        classes_of=classes,
    )
    return boxes, logits.to(dtype), anchor_index, classes


_decode_topk = _library.define(
    "decode_topk(Tensor[] cls_outputs, Tensor[] box_outputs, Tensor anchors, SymInt num_classes,"
    " SymInt k, Tensor? limits, Tensor? strides) -> (Tensor, Tensor, Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.decode_topk.triton_fwd"),
        "cuda": _cuda.Implementation("effdet_kernels.ops.decode_topk.cuda"),
        "reference": reference.decode_topk,
    },
    backwards={"triton": _triton.deferred("effdet_kernels.ops.decode_topk.triton_bwd")},
    differentiable=("cls_outputs", "box_outputs"),
    nondifferentiable_outputs=(2, 3),
    saved_outputs=(2, 3),
)
