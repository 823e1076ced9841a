"""OpSpec of ``detection_loss``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import accumulation_dtype
from effdet_kernels.ops._cases import BENCH, BLOCKS, GPU, mutant, nbytes, normal, uniform
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
    forced: int = 0,
    stray: bool = False,
    ignored_last: bool = False,
    tags: frozenset[str] = frozenset(),
    **options: Any,
) -> Case:
    """Levels of ``sizes`` (H, W), a share of ``positives``, logits ``spread`` wide.

    ``forced`` more positives an image and level are counted than there are targets.
    """

    def make(g) -> Inputs:
        cls_targets, box_targets, count = [], [], torch.zeros(batch, dtype=torch.float64)
        for size in sizes:
            shape = (batch, *size, per_location)
            hit = uniform(g, *shape) < positives
            hit[-1:, -1, -1, -1] = positives > 0  # where a kernel's last block ends
            ignored = uniform(g, *shape) < 0.1
            label = torch.randint(classes, shape, generator=g)
            cls_targets.append(torch.where(hit, label, torch.where(ignored, -2, -1)))
            code = normal(g, *shape, 4, std=0.3) * (uniform(g, *shape, 4) > 0.2)
            box_targets.append((code * (hit[..., None] | stray)).flatten(-2))
            count += hit.sum((1, 2, 3)) + forced
        if ignored_last:
            cls_targets[-1].fill_(-2)
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

    return Case(name, make, tags)


def _real(name: str, largest: int, *, batch: int, tags=BENCH) -> Case:
    """The five levels of a model for COCO, the largest of ``largest`` pixels a side."""
    sizes = [(largest >> level, largest >> level) for level in range(5)]
    options: Inputs = {"classes": 90, "per_location": 9, "positives": 0.001}
    return _case(name, sizes, batch=batch, tags=tags, **options)


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


def _gradient_magnitude(a: Inputs, grads: Sequence[Tensor | None]) -> list[Tensor]:
    """Derived in the README."""
    count = a["num_positives"].sum() + 1
    cls_grad, box_grad = (torch.zeros(()) if g is None else g.abs() for g in grads)
    of_logits = [
        _focal_slope(a, x, label) * cls_grad / count
        for x, label in zip(a["cls_outputs"], a["cls_targets"], strict=True)
    ]
    of_codes = [
        (target != 0).permute(0, 3, 1, 2) * a["delta"] * box_grad / (4 * count)
        for target in a["box_targets"]
    ]
    return of_logits + of_codes


def _focal_slope(a: Inputs, x: Tensor, label: Tensor) -> Tensor:
    """Magnitudes in the derivative of the focal loss of logits ``x`` [B, A * C, H, W]."""
    classes, gamma = torch.arange(a["num_classes"], device=x.device), a["gamma"]
    label = label[..., None].expand(*label.shape, len(classes)).flatten(3).permute(0, 3, 1, 2)
    positive = label == classes.repeat(x.shape[1] // len(classes))[:, None, None]
    away = torch.where(positive, -x, x)  # 1 - p_t is its sigmoid
    modulator = torch.exp(gamma * F.logsigmoid(away)) * (1 + gamma * away.abs())
    balance = torch.where(positive, a["alpha"], 1 - a["alpha"]) * (label != -2)
    smoothing = 0.0 if a["legacy_focal"] else a["label_smoothing"]
    target = positive * (1 - smoothing) + smoothing / 2
    slope = gamma * (-away).sigmoid() * reference.cross_entropy(x, target)
    return balance * modulator * (slope + target * (-x).sigmoid() + (1 - target) * x.sigmoid())


def _inputs(a: Inputs) -> int:
    names = ("cls_outputs", "box_outputs", "cls_targets", "box_targets", "num_positives")
    return nbytes(*(a[name] for name in names))


def _bytes(**a: Any) -> int:
    return _inputs(a) + 2 * accumulation_dtype(a["cls_outputs"][0].dtype).itemsize


def _backward_bytes(**a: Any) -> int:
    """Reads what the forward reads and two numbers, writes a gradient of every logit and code."""
    return _bytes(**a) + nbytes(a["cls_outputs"], a["box_outputs"])


def _per_element(logit: int, code: int) -> Callable[..., int]:
    """FLOPs, exp and log counted as one."""
    return lambda cls_outputs, box_outputs, **_: (
        logit * sum(x.numel() for x in cls_outputs) + code * sum(x.numel() for x in box_outputs)
    )


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
        _case("four_levels", [(4, 5), (3, 2), (2, 2), (1, 1)], forced=3),
        _case("stray_boxes", [(3, 2), (1, 1)], stray=True, ignored_last=True),
        _case("no_images", [(2, 2)], batch=0),
        _case("one_pixel", [(1, 1)], batch=1, positives=0.5),
        _case("blocks", [(17, 19), (9, 10)], classes=19, per_location=9, tags=BLOCKS),
        _real("d0", 64, batch=1),
        _real("d0_batch8", 64, batch=8, tags=GPU),
        _real("d0_batch32", 64, batch=32, tags=GPU),
        _real("d4", 128, batch=1),
        _real("d4_batch8", 128, batch=8, tags=GPU),
        _real("d7", 192, batch=1, tags=GPU),
        _real("d7_batch4", 192, batch=4, tags=GPU),
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
    nonfinite=("cls_outputs", "box_outputs"),
    magnitude=_magnitude,
    reduction=lambda cls_outputs, **_: max(1, sum(x.numel() for x in cls_outputs)),
    gradient_magnitude=_gradient_magnitude,
    gradient_reduction=lambda **_: 16,  # a chain of roundings, not a sum
    bytes=_bytes,
    flops=_per_element(13, 8),
    backward_bytes=_backward_bytes,
    backward_flops=_per_element(18, 4),
)
