"""Optimizer and learning rate of the EfficientDet paper (arXiv:1911.09070, section 5.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then a half cosine down to zero; one value a step.

    Attributes:
        peak: highest learning rate, reached when the warm-up ends.
        warmup_steps: length of the warm-up; 0 starts at the peak.
        total_steps: length of the whole run, warm-up included.
        start: where the warm-up begins, as a fraction of the peak.
    """

    peak: float
    warmup_steps: int
    total_steps: int
    start: float = 0.1

    def __call__(self, step: int) -> float:
        """The learning rate for optimizer step ``step``, counted from 0."""
        if step < self.warmup_steps:
            return self.peak * (self.start + (1 - self.start) * step / self.warmup_steps)
        decay_steps = max(1, self.total_steps - self.warmup_steps)
        progress = min(1.0, (step - self.warmup_steps) / decay_steps)
        return self.peak * 0.5 * (1.0 + math.cos(math.pi * progress))


def default_learning_rate(optimizer: str, batch_size: int) -> float:
    """Peak learning rate when none is given: 0.08 (SGD) or 0.002 (AdamW) per 64 images."""
    return {"sgd": 0.08, "adamw": 0.002}[optimizer] * batch_size / 64


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Trainable parameters: kernels decay; biases, BN and fusion weights do not."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]


def build_optimizer(
    model: nn.Module, name: str, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """SGD with momentum (the paper's) or AdamW; ``name`` is "sgd" or "adamw".

    AdamW takes ``momentum`` as its beta1. Its decay is decoupled, so it wants a larger one.
    """
    groups = parameter_groups(model, weight_decay)
    # One pass over parameters in place of several. On a GPU torch's own choice stays: it and loss scaling go together.
    fused = True if all(p.device.type == "cpu" for p in model.parameters()) else None
    if name == "sgd":
        return torch.optim.SGD(groups, lr=lr, momentum=momentum, fused=fused)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused)
    raise ValueError(f"optimizer: got {name!r}, takes 'sgd' or 'adamw'")
