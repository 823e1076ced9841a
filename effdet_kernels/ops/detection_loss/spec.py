"""OpSpec of ``detection_loss``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from effdet_kernels.ops._cases import BENCH, mutant, nbytes, normal, uniform
from effdet_kernels.ops.detection_loss import op, reference
from effdet_kernels.spec import Case, Inputs, OpSpec


def _case(
    name: str,
    sizes: Sequence[tuple[int, int]],
    *,
    batch: int = 2,
    classes: int = 3,
    per_location: int = 2,
    positives: float = 0.2,
    spread: float = 2.0,
    **options: Any,
) -> Case:
    """Levels of ``sizes`` (H, W), a share of ``positives``, logits ``spread`` wide."""

    def make(g) -> Inputs:
        cls_targets, box_targets, count = [], [], torch.zeros(batch, dtype=torch.float64)
        for size in sizes:
            shape = (batch, *size, per_location)
            hit = uniform(g, *shape) < positives
            ignored = uniform(g, *shape) < 0.1
            label = torch.randint(classes, shape, generator=g)
            cls_targets.append(torch.where(hit, label, torch.where(ignored, -2, -1)))
            code = normal(g, *shape, 4, std=0.3) * (uniform(g, *shape, 4) > 0.2)
            box_targets.append((code * hit[..., None]).flatten(-2))
            count += hit.sum((1, 2, 3))
        arguments = {
            "cls_outputs": [
                normal(g, batch, per_location * classes, *hw, std=spread) for hw in sizes
            ],
            "box_outputs": [normal(g, batch, per_location * 4, *hw, std=0.3) for hw in sizes],
            "cls_targets": cls_targets,
            "box_targets": box_targets,
            "num_positives": count,
            "num_classes": classes,
            "alpha": 0.25,
            "gamma": 1.5,
            "delta": 0.1,
            "label_smoothing": 0.0,
            "legacy_focal": False,
        }
        return {**arguments, **options}

    real = max(max(size) for size in sizes) >= 16
    return Case(name, make, BENCH if real else frozenset())


def _magnitude(**a: Any) -> list[Tensor]:
    """Terms are positive: their sum is M, magnified where exp and a difference magnify."""
    cls_loss, box_loss = reference.detection_loss(**a)
    steepest = max((float(x.abs().max()) for x in a["cls_outputs"] if x.numel()), default=0.0)
    cancelled = sum(
        ((code.permute(0, 2, 3, 1).abs() + target.abs()) * (target != 0)).sum() * a["delta"]
        for code, target in zip(a["box_outputs"], a["box_targets"], strict=True)
    )
    positives = a["num_positives"].sum() + 1
    return [cls_loss * (1 + a["gamma"] * steepest), box_loss + cancelled / (4 * positives)]


def _count(num_positives: Tensor, change: float) -> Inputs:
    """``num_positives`` with its sum changed."""
    extra = torch.zeros_like(num_positives)
    extra[:1] = change
    return {"num_positives": num_positives + extra}


def _box_over_n(**a: Any) -> tuple[Tensor, Tensor]:
    cls_loss, box_loss = reference.detection_loss(**a)
    return cls_loss, 4 * box_loss


def _zero_targets_trained(a: Inputs) -> Inputs:
    return {"box_targets": [torch.where(t == 0, 1e-30, t) for t in a["box_targets"]]}


_reference = reference.detection_loss
_PYRAMID = ((64, 64), (32, 32), (16, 16), (8, 8), (4, 4))
_D0: dict[str, Any] = {"classes": 90, "per_location": 9, "positives": 0.001}

SPEC = OpSpec(
    name="detection_loss",
    op=op.detection_loss,
    reference=_reference,
    cases=(
        _case("two_levels", [(3, 4), (2, 1)]),
        _case("smoothed", [(3, 2), (1, 1)], label_smoothing=0.1, gamma=2.0),
        _case("legacy", [(2, 3)], legacy_focal=True, label_smoothing=0.1),
        _case("cross_entropy", [(2, 3)], gamma=0.0, alpha=0.5, delta=1.0),
        _case("extreme_logits", [(2, 2)], spread=200.0, gamma=0.5),
        _case("no_positives", [(2, 2), (1, 2)], positives=0.0),
        _case("no_images", [(2, 2)], batch=0),
        _case("d0", _PYRAMID, batch=1, **_D0),
        _case("d0_batch8", _PYRAMID, batch=8, **_D0),
    ),
    mutants={
        "alpha on the negatives": mutant(_reference, lambda a: {"alpha": 1 - a["alpha"]}),
        "gamma + 0.5": mutant(_reference, lambda a: {"gamma": a["gamma"] + 0.5}),
        "ignored anchors trained as background": mutant(
            _reference, lambda a: {"cls_targets": [t.clamp(min=-1) for t in a["cls_targets"]]}
        ),
        "not plus one": mutant(_reference, lambda a: _count(a["num_positives"], -1)),
        "boxes over n in place of 4n": _box_over_n,
        "zero box targets trained": mutant(_reference, _zero_targets_trained),
        "smoothing not halved": mutant(
            _reference, lambda a: {"label_smoothing": 2 * a["label_smoothing"]}
        ),
    },
    diff_args=("cls_outputs", "box_outputs"),
    keep_wide=("box_targets", "num_positives"),
    magnitude=_magnitude,
    reduction=lambda cls_outputs, **_: max(1, sum(x.numel() for x in cls_outputs)),
    bytes=lambda cls_outputs, box_outputs, cls_targets, box_targets, num_positives, **_: nbytes(
        cls_outputs, box_outputs, cls_targets, box_targets, num_positives
    ),
    flops=lambda cls_outputs, **_: 20 * sum(x.numel() for x in cls_outputs),
)
