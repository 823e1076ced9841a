"""The ops as plain PyTorch, for programs that have to run where this package is not."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels import _library
from effdet_kernels.ops.decode_topk import reference as decode_topk
from effdet_kernels.ops.soft_nms import reference as soft_nms

__all__ = ["decompositions"]


# References of these look at values, or write in place.
_OF_TRAINING = {"batch_norm_act", "batch_norm_grad", "detection_loss", "label_anchors"}


def decompositions() -> dict[Any, Callable[..., Any]]:
    """What an op of inference is in ops of torch, for ``torch.export.ExportedProgram.run_decompositions``.

    The kernels are not in a program after that: it computes what the references do. Two, whose steps depend on values,
    have others: ``decode_topk`` takes equal logits in any order, ``soft_nms`` is a ``while_loop``.
    """
    special: dict[str, Callable[..., Any]] = {"decode_topk": _decode_topk, "soft_nms": _soft_nms}
    return {
        op.overload: _as_op(op, special.get(name, op.impls["reference"]))
        for name, op in _library.OPS.items()
        if name not in _OF_TRAINING
    }


def _as_op(op: _library.Op, function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, returning a list, a tuple or a tensor, and in the dtypes, as ``op`` does."""

    def call(*args: Any) -> Any:
        outputs = function(*args)
        flat = [outputs] if isinstance(outputs, Tensor) else outputs
        specs = op.out_spec(*args)
        return op.pack([out.to(spec.dtype) for out, spec in zip(flat, specs, strict=True)])

    return call


def _decode_topk(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    anchors: Tensor,
    num_classes: int,
    k: int,
    limits: Tensor | None,
    strides: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    every = decode_topk.rows(cls_outputs, num_classes).flatten(1)
    logits, flat = every.topk(min(k, every.shape[1]), 1)
    index = flat // num_classes
    boxes = decode_topk.decode(cls_outputs, box_outputs, anchors, index, limits, strides)
    return boxes, logits, index, flat % num_classes


def _soft_nms(
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    state, dropped = soft_nms.start(boxes, scores, classes, num_valid, score_threshold)
    how: tuple[Any, ...] = method, sigma, iou_threshold, score_threshold, max_per_class
    batch = scores.shape[0]
    index = torch.full((batch, max_det), -1, dtype=torch.int64, device=scores.device)
    value = scores.new_zeros((batch, max_det))

    def goes_on(step: Tensor, *_: Tensor) -> Tensor:
        return step < max_det

    # What it reads must be its arguments: a tensor of the function around it would become a constant.
    def pick(
        step: Tensor,
        index: Tensor,
        value: Tensor,
        score: Tensor,
        taken: Tensor,
        boxes: Tensor,
        classes: Tensor,
    ) -> tuple[Tensor, ...]:
        best, its_score, alive, (score, taken, *_) = soft_nms.pick_best(
            score, taken, boxes, classes, *how
        )
        here = (torch.arange(max_det, device=step.device) == step) & alive[:, None]
        index = torch.where(here, best[:, None], index)
        value = torch.where(here, its_score[:, None], value)
        return step + 1, index, value, score, taken.clone()

    step = torch.zeros((), dtype=torch.int64, device=scores.device)
    _, index, value, *_ = torch.ops.higher_order.while_loop(
        goes_on, pick, (step, index, value, *state[:2]), state[2:]
    )
    return index, value, (index >= 0).sum(1), dropped
