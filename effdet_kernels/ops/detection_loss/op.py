"""Focal and huber loss of a detector straight from integer targets: no one-hot tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _checks, _library, _native, _triton
from effdet_kernels._library import TensorSpec
from effdet_kernels.ops import _arguments, _cpu
from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops.detection_loss import reference


def detection_loss(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Sequence[Tensor],
    box_targets: Sequence[Tensor],
    num_positives: Tensor,
    *,
    num_classes: int,
    alpha: float = 0.25,
    gamma: float = 1.5,
    delta: float = 0.1,
    label_smoothing: float = 0.0,
    legacy_focal: bool = False,
) -> tuple[Tensor, Tensor]:
    """cls = sum a_t (1 - p_t)^gamma ce / n; box = sum huber(box - target) / 4n over targets != 0.

    n = sum(num_positives) + 1. Per logit x, with t = 1 for the target's class and else 0:
    p_t = sigmoid(x) or 1 - sigmoid(x), a_t = alpha or 1 - alpha,
    ce = softplus(x) - x * (t * (1 - s) + s / 2) with s = label_smoothing.
    huber(e) = e^2 / 2 up to |e| = delta, then delta * (|e| - delta / 2). Source: focal
    loss, arXiv:1708.02002, section 3; EfficientDet, arXiv:1911.09070, section 5.1.

    Args:
        cls_outputs: per level [B, A * C, H_l, W_l] logits, anchor-major; any floating dtype and
            strides.
        box_outputs: per level [B, A * 4, H_l, W_l] codes, dtype of ``cls_outputs``.
        cls_targets: per level [B, H_l, W_l, A] int64: class 0 to C - 1, -1 background, -2 ignored.
        box_targets: per level [B, H_l, W_l, A * 4], any floating dtype; an element of exactly 0 is
            not trained.
        num_positives: [B], any floating or integer dtype, positives of each image.
        num_classes: C, at least 1.
        alpha: balance of the focal loss, at least 0.
        gamma: its focus, at least 0.
        delta: knee of the huber loss, above 0.
        label_smoothing: s, 0 to 1.
        legacy_focal: ignore label_smoothing (in exact arithmetic that is all that the older form
            differs in).

    Returns:
        cls_loss, box_loss: 0-d, float32 (float64 with float64).

    Accumulates in float32 (float64 with float64); under autocast all is float32. The power of
    1 - p_t is taken in the log domain, so that loss and gradient are finite for every finite logit
    and gamma. Differentiable in cls_outputs and box_outputs. Deterministic.

    Raises:
        TypeError, ValueError: an argument of the wrong type, shape or range, named in the message;
            on CPU also a target class outside -2 to C - 1.
    """
    op = "detection_loss"
    cls_outputs = _arguments.tensor_list(op, "cls_outputs", cls_outputs)
    levels = (len(cls_outputs),)
    box_outputs = _arguments.tensor_list(op, "box_outputs", box_outputs, levels)
    cls_targets = _arguments.tensor_list(op, "cls_targets", cls_targets, levels)
    box_targets = _arguments.tensor_list(op, "box_targets", box_targets, levels)
    _arguments.integer(op, "num_classes", num_classes, least=1)
    first = cls_outputs[0]
    _arguments.feature_map(op, "cls_outputs[0]", first)
    batch, channels = first.shape[:2]
    per_location = _arguments.anchors_per_location(op, first, num_classes)
    for i, (cls, box, label, code) in enumerate(
        zip(cls_outputs, box_outputs, cls_targets, box_targets, strict=True)
    ):
        _arguments.dense(op, f"cls_outputs[{i}]", cls, (batch, channels, "H", "W"), first)
        size = tuple(cls.shape[2:])
        _arguments.dense(op, f"box_outputs[{i}]", box, (batch, 4 * per_location, *size), first)
        shape = (batch, *size, per_location)
        integers = (torch.int64,)
        _checks.tensor(op, f"cls_targets[{i}]", label, shape, dtypes=integers, device=first.device)
        shape = (batch, *size, 4 * per_location)
        _checks.tensor(op, f"box_targets[{i}]", code, shape, device=first.device)
    numbers = (*_checks.FLOATING, torch.int64, torch.int32)
    _checks.tensor(
        op, "num_positives", num_positives, (batch,), dtypes=numbers, device=first.device
    )
    _checks.number(op, "alpha", alpha, least=0)
    _checks.number(op, "gamma", gamma, least=0)
    _checks.number(op, "delta", delta, above=0)
    _checks.number(op, "label_smoothing", label_smoothing, least=0)
    if label_smoothing > 1:
        raise ValueError(
            f"{op}: label_smoothing: got {label_smoothing!r}, takes a number from 0 to 1"
        )
    return _detection_loss(
        cls_outputs,
        box_outputs,
        cls_targets,
        box_targets,
        num_positives,
        num_classes,
        alpha,
        gamma,
        delta,
        label_smoothing,
        legacy_focal,
    )


def _out_spec(cls_outputs, *_) -> list[TensorSpec]:
    first = cls_outputs[0]
    loss = TensorSpec((), accumulation_dtype(first.dtype), first.device)
    return [loss, loss]


def _levels(cls_outputs, box_outputs, cls_targets, box_targets) -> Iterator[dict[str, Any]]:
    """Per level the fields that the C++ kernels of both directions take."""
    accumulator = accumulation_dtype(cls_outputs[0].dtype)
    for logits, codes, labels, targets in zip(
        cls_outputs, box_outputs, cls_targets, box_targets, strict=True
    ):
        logits, codes = _cpu.pixels_inner(logits), _cpu.pixels_inner(codes)
        labels, targets = _dense_images(labels), _dense_images(targets.to(accumulator))
        yield {
            "dtype": _cpu.code(logits.dtype),
            "batch": labels.shape[0],
            "pixels": labels.shape[1] * labels.shape[2],
            "anchors": labels.shape[3],
            "classes": logits.shape[1] // labels.shape[3],
            "logits": logits,
            "logit_batch_stride": logits.stride(0),
            "logit_pixel_stride": _cpu.pixel_stride(logits),
            "codes": codes,
            "code_batch_stride": codes.stride(0),
            "code_pixel_stride": _cpu.pixel_stride(codes),
            "labels": labels,
            "label_batch_stride": labels.stride(0),
            "targets": targets,
            "target_batch_stride": targets.stride(0),
        }


def _dense_images(t: Tensor) -> Tensor:
    """``t`` if each of its images is dense, else a copy."""
    return t if t[:1].is_contiguous() else t.contiguous()


def _settings(alpha, gamma, delta, label_smoothing, legacy_focal) -> dict[str, float]:
    smoothing = 0.0 if legacy_focal else label_smoothing
    return {"alpha": alpha, "gamma": gamma, "delta": delta, "smoothing": smoothing}


def _run_cpu(*args) -> tuple[Tensor, Tensor]:
    num_positives, num_classes = args[4:6]
    tensors = _cpu.widened(args[:4])
    levels = len(tensors[0])
    sums = torch.zeros(levels, 2, dtype=torch.float64)
    ranges = torch.full((levels, 2), -1)
    for fields, level, labels in zip(_levels(*tensors), sums, ranges, strict=True):
        if fields["batch"]:
            blocks = _native.module().loss_blocks(fields["batch"], fields["pixels"])
            _native.launch(
                "detection_loss",
                sums=level,
                range=labels,
                partial=torch.empty(blocks, 2, dtype=torch.float64),
                **fields,
                **_settings(*args[6:]),
            )
    reference.check_range(int(ranges.min()), int(ranges.max()), num_classes)
    cls_loss, box_loss = sums.sum(0)
    positives = _positives(num_positives)
    dtype = accumulation_dtype(args[0][0].dtype)
    return (cls_loss / positives).to(dtype), (box_loss / (4 * positives)).to(dtype)


def _positives(num_positives: Tensor) -> Tensor:
    """What the losses are divided by."""
    return num_positives.double().sum() + 1


def _backward_cpu(grads, *rest) -> list[Tensor]:
    *args, needs = rest
    tensors = _cpu.widened(args[:4])
    positives = _positives(args[4])
    of_classes, of_boxes = (
        torch.zeros((), dtype=torch.float64) if g is None else g.double() for g in grads
    )
    factors = torch.stack([of_classes / positives, of_boxes / (4 * positives)]).to(
        accumulation_dtype(args[0][0].dtype)
    )
    levels = len(tensors[0])
    found: list[list[Tensor | None]] = [
        [
            torch.empty_like(t, memory_format=torch.channels_last) if need else None
            for t, need in part
        ]
        for part in (
            zip(tensors[0], needs[:levels], strict=True),
            zip(tensors[1], needs[levels:], strict=True),
        )
    ]
    for fields, of_logits, of_codes in zip(_levels(*tensors), *found, strict=True):
        if fields["batch"]:
            _native.launch(
                "detection_loss_backward",
                factors=factors,
                grad_logits=of_logits,
                grad_codes=of_codes,
                **fields,
                **_settings(*args[6:]),
            )
    return [grad for part in found for grad in part if grad is not None]


_detection_loss = _library.define(
    "detection_loss(Tensor[] cls_outputs, Tensor[] box_outputs, Tensor[] cls_targets,"
    " Tensor[] box_targets, Tensor num_positives, SymInt num_classes, float alpha, float gamma,"
    " float delta, float label_smoothing, bool legacy_focal) -> (Tensor, Tensor)",
    out_spec=_out_spec,
    impls={
        "cpu": _run_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.detection_loss.triton_fwd"),
        "reference": reference.detection_loss,
    },
    backwards={
        "cpu": _backward_cpu,
        "triton": _triton.deferred("effdet_kernels.ops.detection_loss.triton_bwd"),
    },
    differentiable=("cls_outputs", "box_outputs"),
)
