"""How far whole networks are off the float64 result: a forward and a training step on a backend, device and dtype."""

from __future__ import annotations

import contextlib
import copy

import torch
from torch import Tensor, nn

from effdet import create_model, fused
from effdet.plan import use_plan
from effdet_kernels import use_backend

TARGET = {
    "bbox": torch.tensor([[[4.0, 6.0, 40.0, 50.0], [20.0, 8.0, 60.0, 30.0]]] * 2),
    "cls": torch.tensor([[1, 3]] * 2),
    "img_scale": torch.ones(2),
    "img_size": torch.full((2, 2), 64),
}


def off(found: list[Tensor], exact: list[Tensor]) -> float:
    """The largest error of a list of tensors, each relative to its largest entry.

    But to no less than a thousandth of the largest of all: a gradient that is 0 but for rounding is no scale.
    """
    scales = [float(b.abs().max()) for b in exact]
    least = max(scales) / 1000
    return max(
        float((a.cpu().double() - b).abs().max()) / max(scale, least)
        for a, b, scale in zip(found, exact, scales, strict=True)
    )


def images(batch: int, size: int) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def norms(model: nn.Module) -> list[nn.BatchNorm2d]:
    return [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def settled(model: nn.Module) -> nn.Module:
    """With random running statistics, so that folding them is seen."""
    generator = torch.Generator().manual_seed(1)
    for norm in norms(model):
        norm.running_mean.copy_(torch.randn(norm.num_features, generator=generator) * 0.1)
        norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    return model


def detector() -> nn.Module:
    """D0 in eval mode."""
    torch.manual_seed(0)
    return settled(create_model("tf_efficientdet_d0", pretrained_backbone=False)).eval()


def trainer(frozen: bool = False) -> nn.Module:
    """A small network with its loss, in training mode; ``frozen``: its norms on running statistics."""
    torch.manual_seed(0)
    options = {"pretrained_backbone": False, "num_classes": 3, "bench_labeler": True}
    bench = settled(create_model("efficientdet_nano", "train", **options)).train()
    for norm in norms(bench) if frozen else ():
        norm.eval()
    return bench


@torch.no_grad()
def forward(
    model: nn.Module,
    x: Tensor,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    plan: bool = False,
) -> list[Tensor]:
    """The heads' maps, of a copy of the model."""
    with use_backend(backend), use_plan(plan):
        classes, boxes = copy.deepcopy(model).to(device, dtype)(x.to(device, dtype))
    return [*classes, *boxes]


def training_step(
    bench: nn.Module,
    x: Tensor,
    backend: str | None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> list[Tensor]:
    """The loss and the gradients of all parameters, of a copy; bfloat16 and float16 by autocast."""
    short = dtype in (torch.bfloat16, torch.float16)
    kept = torch.float32 if short else dtype
    bench = copy.deepcopy(bench).to(device, kept)
    target = {name: value.to(device) for name, value in TARGET.items()}
    with use_backend(backend):
        with torch.autocast(device, dtype) if short else contextlib.nullcontext():
            loss = bench(x.to(device, kept), target)["loss"]
        loss.backward()
    return [loss.detach(), *(p.grad for p in bench.parameters() if p.grad is not None)]


def take_statistics_ahead(monkeypatch):
    """Convolutions take the statistics of the batch norms that follow them, as they do on a GPU."""
    monkeypatch.setattr(fused, "_statistics_are_free", lambda x: True)
