"""Focal classification loss and huber box loss (EfficientDet, arXiv:1911.09070, section 5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effdet_kernels import detection_loss


def focal_loss_legacy(
    logits: Tensor, targets: Tensor, alpha: float, gamma: float, normalizer: Tensor | float
) -> Tensor:
    """Elementwise focal loss (arXiv:1708.02002) in its first EfficientDet form.

    Args:
        logits: any shape.
        targets: same shape, one-hot 0 or 1.
        alpha: weight of positives; negatives weigh ``1 - alpha``.
        gamma: focusing exponent.
        normalizer: divides the result.

    Returns:
        the loss of each element. Finite, with a finite gradient, for every finite logit.
    """
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    modulator = (-gamma * (targets * logits + F.softplus(-logits))).exp()
    balance = torch.where(targets == 1.0, alpha, 1.0 - alpha)
    return balance * modulator * cross_entropy / normalizer


def new_focal_loss(
    logits: Tensor,
    targets: Tensor,
    alpha: float,
    gamma: float,
    normalizer: Tensor | float,
    label_smoothing: float = 0.01,
) -> Tensor:
    """Elementwise focal loss with label smoothing in the cross-entropy only.

    Same arguments and result as ``focal_loss_legacy``; ``label_smoothing`` s moves the targets of
    the cross-entropy to ``t (1 - s) + s / 2``, not those of the modulator.
    """
    # 1 - p_t, from the complement of p itself: no cancellation where p rounds to 1.
    miss = targets * (-logits).sigmoid() + (1.0 - targets) * logits.sigmoid()
    # The derivative of a power below 1 has no value at 0.
    modulator = miss.clamp(min=torch.finfo(miss.dtype).tiny) ** gamma
    balance = targets * alpha + (1.0 - targets) * (1.0 - alpha)
    smoothed = targets * (1.0 - label_smoothing) + 0.5 * label_smoothing
    cross_entropy = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none")
    return (1.0 / normalizer) * balance * modulator * cross_entropy


def huber_loss(
    input: Tensor,
    target: Tensor,
    delta: float = 1.0,
    weights: Tensor | None = None,
    size_average: bool = True,
) -> Tensor:
    """Huber loss, quadratic within ``delta`` of the target and linear beyond.

    Args:
        input: any shape.
        target: same shape.
        delta: where the loss turns linear, > 0.
        weights: same shape, multiplied in; ``None`` for ones.
        size_average: return the mean over all elements, else the sum.

    Returns:
        0-d tensor.
    """
    return _reduce(
        F.huber_loss(input, target, reduction="none", delta=delta), weights, size_average
    )


def smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    beta: float = 1.0 / 9,
    weights: Tensor | None = None,
    size_average: bool = True,
) -> Tensor:
    """``huber_loss`` divided by its threshold ``beta``; absolute error for ``beta`` below 1e-5."""
    beta = beta if beta >= 1e-5 else 0.0
    loss = F.smooth_l1_loss(input, target, reduction="none", beta=beta)
    return _reduce(loss, weights, size_average)


def one_hot(x: Tensor, num_classes: int) -> Tensor:
    """Class indices ``[...]`` int64 as float32 ``[..., num_classes]``; negative: a row of zeros."""
    known = x >= 0
    return F.one_hot(x.clamp(min=0), num_classes).float() * known[..., None]


def loss_fn(
    cls_outputs: list[Tensor],
    box_outputs: list[Tensor],
    cls_targets: list[Tensor],
    box_targets: list[Tensor],
    num_positives: Tensor,
    num_classes: int,
    alpha: float,
    gamma: float,
    delta: float,
    box_loss_weight: float,
    label_smoothing: float = 0.0,
    legacy_focal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """The training loss of a batch, summed over all levels.

    Args:
        cls_outputs: per level ``[B, A * num_classes, H, W]`` logits.
        box_outputs: per level ``[B, A * 4, H, W]`` codes.
        cls_targets: per level ``[B, H, W, A]`` int64, 0-based; -1 background, -2 ignored.
        box_targets: per level ``[B, H, W, A * 4]`` codes. An element that is exactly 0 is not
            trained, which is how background anchors are left out.
        num_positives: ``[B]`` positive anchors per image. Both losses are divided by its sum + 1.
        num_classes: number of classes.
        alpha: balance of the focal loss.
        gamma: focus of the focal loss.
        delta: of the huber loss.
        box_loss_weight: weight of the box loss in the total.
        label_smoothing: of the focal loss; the legacy form has none.
        legacy_focal: use the form of ``focal_loss_legacy``.

    Returns:
        total, class and box loss, 0-d float32, differentiable in the outputs.
    """
    cls_loss, box_loss = detection_loss(
        cls_outputs,
        box_outputs,
        cls_targets,
        box_targets,
        num_positives,
        num_classes=num_classes,
        alpha=alpha,
        gamma=gamma,
        delta=delta,
        label_smoothing=label_smoothing,
        legacy_focal=legacy_focal,
    )
    return cls_loss + box_loss_weight * box_loss, cls_loss, box_loss


# The kernel needs no scripted variant; the name is kept for programs that import it.
loss_jit = loss_fn


class DetectionLoss(nn.Module):
    """``loss_fn`` with the settings of a model config.

    Args:
        config: has ``num_classes, alpha, gamma, delta, box_loss_weight, label_smoothing,
            legacy_focal, jit_loss``.
    """

    def __init__(self, config) -> None:
        super().__init__()
        self.config = config
        self.num_classes = config.num_classes
        self.alpha = config.alpha
        self.gamma = config.gamma
        self.delta = config.delta
        self.box_loss_weight = config.box_loss_weight
        self.label_smoothing = config.label_smoothing
        self.legacy_focal = config.legacy_focal
        self.use_jit = config.jit_loss

    def forward(
        self,
        cls_outputs: list[Tensor],
        box_outputs: list[Tensor],
        cls_targets: list[Tensor],
        box_targets: list[Tensor],
        num_positives: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Total, class and box loss; shapes as in ``loss_fn``."""
        return (loss_jit if self.use_jit else loss_fn)(
            cls_outputs,
            box_outputs,
            cls_targets,
            box_targets,
            num_positives,
            num_classes=self.num_classes,
            alpha=self.alpha,
            gamma=self.gamma,
            delta=self.delta,
            box_loss_weight=self.box_loss_weight,
            label_smoothing=self.label_smoothing,
            legacy_focal=self.legacy_focal,
        )


def _box_loss(
    box_outputs: Tensor, box_targets: Tensor, num_positives: Tensor | float, delta: float = 0.1
) -> Tensor:
    """Huber loss of one level over the elements whose target is not 0, per 4 ``num_positives``."""
    trained = (box_targets != 0.0).to(box_outputs.dtype)
    total = huber_loss(box_outputs, box_targets, delta, weights=trained, size_average=False)
    return total / (num_positives * 4.0)


def _reduce(loss: Tensor, weights: Tensor | None, size_average: bool) -> Tensor:
    if weights is not None:
        loss = loss * weights
    return loss.mean() if size_average else loss.sum()
