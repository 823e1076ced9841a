"""The definition of right for ``detection_loss``: plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from effdet_kernels.ops._activations import accumulation_dtype, widen


def check_range(least: int, most: int, num_classes: int) -> None:
    """Raises ValueError if the least or the largest target is no class, background or "ignored"."""
    if least < -2 or most >= num_classes:
        raise ValueError(
            f"detection_loss: cls_targets: got classes from {least} to {most},"
            f" takes -2 to {num_classes - 1}"
        )


def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    """Binary cross-entropy of logits, as a sum of two positive terms: nothing cancels for confident logits."""
    return -target * F.logsigmoid(x) - (1 - target) * F.logsigmoid(-x)


def _focal(x: Tensor, label: Tensor, alpha: float, gamma: float, smoothing: float) -> Tensor:
    """Sum of the focal loss of logits ``x`` [..., C] against classes ``label`` [...]."""
    positive = label[..., None] == torch.arange(x.shape[-1], device=x.device)
    target = positive.to(x.dtype)
    entropy = cross_entropy(x, target * (1 - smoothing) + smoothing / 2)
    # (1 - p_t) ** gamma in the log domain: no cancellation, a finite gradient for any logit.
    modulator = torch.exp(gamma * F.logsigmoid(torch.where(positive, -x, x)))
    balance = target * alpha + (1 - target) * (1 - alpha)
    return (balance * modulator * entropy * (label != -2)[..., None]).sum()


def _huber(code: Tensor, target: Tensor, delta: float) -> Tensor:
    """Sum of the huber loss over the elements whose target is not exactly 0."""
    error = (code - target).abs()
    quadratic = error.clamp(max=delta)
    loss = 0.5 * quadratic**2 + delta * (error - quadratic)
    return (loss * (target != 0)).sum()


def detection_loss(
    cls_outputs: Sequence[Tensor],
    box_outputs: Sequence[Tensor],
    cls_targets: Sequence[Tensor],
    box_targets: Sequence[Tensor],
    num_positives: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    delta: float,
    label_smoothing: float,
    legacy_focal: bool,
) -> tuple[Tensor, Tensor]:
    """Focal loss of the classes and huber loss of the boxes, each over (positives + 1)."""
    dtype = accumulation_dtype(cls_outputs[0].dtype)
    smoothing = 0.0 if legacy_focal else label_smoothing
    positives = num_positives.to(dtype).sum() + 1
    cls_loss = box_loss = torch.zeros((), dtype=dtype, device=num_positives.device)
    for x, code, label, target in zip(
        cls_outputs, box_outputs, cls_targets, box_targets, strict=True
    ):
        if not x.is_cuda and label.numel():  # on a GPU the check would wait for the device
            check_range(int(label.min()), int(label.max()), num_classes)
        rows = widen(x).permute(0, 2, 3, 1).reshape(*label.shape, num_classes)
        cls_loss = cls_loss + _focal(rows, label, alpha, gamma, smoothing)
        codes = widen(code).permute(0, 2, 3, 1)
        box_loss = box_loss + _huber(codes, target.to(dtype), delta)
    return cls_loss / positives, box_loss / (4 * positives)
