"""Optimizer steps as both sides take them: the oracle in its process, this project in the test's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

LOSSES = ("loss", "class_loss", "box_loss")


def take_steps(
    bench: nn.Module,
    optimizer: torch.optim.Optimizer,
    dtype: torch.dtype,
    batches: list[tuple[Tensor, dict[str, Tensor]]],
    rates: list[float],
    clip: float,
) -> Tensor:
    """A step for each of ``rates``, on one batch after the other, again from the first after the last.

    Returns:
        ``LOSSES`` of each step ``[steps, 3]`` float64.
    """
    losses = []
    for step, rate in enumerate(rates):
        x, target = batches[step % len(batches)]
        for group in optimizer.param_groups:
            group["lr"] = rate
        found = bench(x.to(dtype), target)
        optimizer.zero_grad()
        found["loss"].backward()
        nn.utils.clip_grad_norm_(bench.parameters(), clip)
        optimizer.step()
        losses.append([found[name].item() for name in LOSSES])
    return torch.tensor(losses, dtype=torch.float64)
