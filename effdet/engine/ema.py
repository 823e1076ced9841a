"""Exponential moving average of a model's weights, the one that is evaluated and shipped."""

from __future__ import annotations

import copy

import torch
from torch import nn


class ModelEma:
    """Keeps ``module``, a copy of a model whose floating-point state follows it slowly.

    After update ``t`` (from 0) the state is ``d * ema + (1 - d) * model`` with
    ``d = min(decay, (1 + t) / (10 + t))``, so that a short run is not dominated by its start.
    BN's running statistics are averaged like weights; integer buffers are copied.

    Args:
        model: the model to follow.
        decay: the decay that long runs end with, in [0, 1).
    """

    def __init__(self, model: nn.Module, decay: float = 0.9998) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay: got {decay}, takes a number in [0, 1)")
        self.decay = decay
        self.updates = 0
        self.module = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model``; call it once after every optimizer step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        average = self.module.state_dict()
        targets, sources = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                targets.append(average[name])
                sources.append(value.detach())
            else:
                average[name].copy_(value)
        torch._foreach_lerp_(targets, sources, 1.0 - decay)
