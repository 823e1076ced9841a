"""Batch norm on the statistics that convolutions take of their own results, as the model trains on a GPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from effdet import create_model, fused
from effdet_kernels import _library, use_backend

from .accuracy import take_statistics_ahead


def step(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs, gradients and running statistics after a step in training mode."""
    classes, boxes = model(x)
    maps = [*classes, *boxes]
    torch.stack([y.square().mean() for y in maps]).sum().backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*maps, *grads, *(b for b in model.buffers() if b.is_floating_point())]


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_a_step_is_that_of_statistics_taken_by_the_norm(monkeypatch, backend):
    torch.manual_seed(0)
    model = create_model("efficientdet_nano", pretrained_backbone=False, num_classes=3)
    model = model.double().train()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    other = copy.deepcopy(model)
    given = []
    op = _library.OPS["batch_norm_act"]
    monkeypatch.setitem(op.impls, backend, noting(op.impls[backend], given))
    with use_backend(backend):
        expected = step(model, x)
        assert given and not any(given)
        given.clear()
        take_statistics_ahead(monkeypatch)
        found = step(other, x)
    assert given and all(given)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-9 * b.abs().max() + 1e-12  # a bias before a norm has none


def noting(run, given):
    """``run``, which notes whether statistics were given to it."""

    def call(*args):
        given.append(args[5] is not None)
        return run(*args)

    return call


def test_a_cpu_leaves_statistics_to_the_norm():
    norm = nn.BatchNorm2d(3)
    assert not fused._gives_statistics(torch.zeros(1, 3, 2, 2), [norm])
