"""A small network, its outputs, and what changes it, for the tests of plans that are graphs."""

from __future__ import annotations

import threading

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import effdet
from effdet.plan import use_plan


def tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def build(name="efficientdet_nano") -> nn.Module:
    """A small network whose norms have statistics that are not 0 and 1."""
    torch.manual_seed(0)
    model = effdet.create_model(name, num_classes=3, pretrained_backbone=False).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
    return model


@torch.no_grad()
def flat(model, x) -> list[Tensor]:
    return tensors(model(x))


def unplanned(model, x) -> list[Tensor]:
    with use_plan(False):
        return flat(model, x)


def same(a, b) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def image(batch=2, height=64, width=64) -> Tensor:
    return torch.randn(batch, 3, height, width)


def in_threads(work, count):
    """Calls ``work`` with 0 to count - 1, each in a thread of its own; waits for all."""
    threads = [threading.Thread(target=work, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@torch.no_grad()
def plan_reason(model, x):
    return model.plan_reason(x)


def load_others(model):
    model.load_state_dict({k: v * 0.9 for k, v in model.state_dict().items()})


class Reads(nn.Module):
    """An activation that looks at its input on the host."""

    def forward(self, x):
        return x * (2 if x.sum() > 0 else 3)
