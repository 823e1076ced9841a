"""Whole networks on the Triton kernels, interpreted: a forward of D0 and a training step, against the reference.

The measure is the reference itself: in float32 the kernels may be off the float64 result twice as far as the reference
in float32 is, and as near to it in float64 as float64's roundoff allows the reference to be to float32's.
"""

from __future__ import annotations

import copy

import pytest
import torch

from effdet import create_model
from effdet.plan import use_plan
from effdet_kernels import use_backend

SIZE = 128


def off(found, exact):
    """The largest error of a list of tensors, each relative to its largest entry."""
    return max(
        float((a.double() - b).abs().max() / b.abs().max().clamp(min=1e-30))
        for a, b in zip(found, exact, strict=True)
    )


def images(batch, size):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def settled(model):
    """Random running statistics, so that folding them is seen."""
    generator = torch.Generator().manual_seed(1)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.copy_(torch.randn(module.num_features, generator=generator) * 0.1)
            module.running_var.copy_(torch.rand(module.num_features, generator=generator) + 0.5)
    return model


@torch.no_grad()
def forward(model, x, backend):
    with use_backend(backend), use_plan(False):
        classes, boxes = model(x)
    return [*classes, *boxes]


@pytest.mark.parametrize("name", ["tf_efficientdet_d0"])
def test_forward_equals_the_reference(name):
    torch.manual_seed(0)
    model = settled(create_model(name, pretrained_backbone=False)).eval()
    x = images(1, SIZE)
    exact = forward(copy.deepcopy(model).double(), x.double(), "reference")
    reference = forward(model, x, "reference")
    assert off(forward(model, x, "triton"), exact) <= 2 * off(reference, exact)


def training_step(bench, x, target, backend):
    """The loss and the gradients of all parameters."""
    with use_backend(backend):
        loss = bench(x, target)["loss"]
        loss.backward()
    return [loss.detach(), *(p.grad for p in bench.parameters() if p.grad is not None)]


def test_training_step_equals_the_reference():
    torch.manual_seed(0)
    options = {"pretrained_backbone": False, "num_classes": 3, "bench_labeler": True}
    bench = create_model("efficientdet_nano", "train", **options)
    bench = bench.train()
    target = {
        "bbox": torch.tensor([[[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0]]] * 2),
        "cls": torch.tensor([[1, 3]] * 2),
        "img_scale": torch.ones(2),
        "img_size": torch.full((2, 2), 64),
    }
    x = images(2, 64)
    exact = training_step(copy.deepcopy(bench).double(), x.double(), target, "reference")
    reference = training_step(copy.deepcopy(bench), x, target, "reference")
    found = training_step(copy.deepcopy(bench), x, target, "triton")
    assert off(found, exact) <= 2 * off(reference, exact)
