"""The networks of PyPI effdet: outputs, gradients, initialisation, resampling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import effdet
from effdet import EfficientDet, create_model, get_efficientdet_config
from effdet.efficientdet import FpnCombine, ResampleFeatureMap

from . import task


def _build(name: str, options: dict[str, Any], state: dict[str, Tensor]) -> torch.nn.Module:
    model = create_model(name, pretrained_backbone=False, **options)
    model.load_state_dict(state)
    return model


@task
def model_outputs(name: str, options: dict, state: dict, x: Tensor) -> dict:
    model = _build(name, options, state).eval()
    with torch.no_grad():
        cls, box = model(x)
    return {"cls": cls, "box": box}


@task
def drawn_outputs(name: str, size: tuple[int, int], seed: int) -> dict:
    """Which effdet this is, its keys, and outputs in float64 of weights drawn in the order of the keys."""
    model = create_model(name, pretrained_backbone=False, image_size=size).double().eval()
    generator = torch.Generator().manual_seed(seed)
    state = model.state_dict()
    for value in state.values():
        if value.ndim > 1:  # so that a signal neither fades nor explodes
            drawn = torch.randn(value.shape, generator=generator)
            value.copy_(drawn * (2 / value[0].numel()) ** 0.5)
    with torch.no_grad():
        cls, box = model(torch.randn((1, 3, *size), generator=generator).double())
    return {"file": effdet.__file__, "keys": list(state), "cls": cls, "box": box}


@task
def model_outputs_of_pyramid(fpn_name: str, state: dict, x: Tensor) -> dict:
    config = get_efficientdet_config("tf_efficientdet_d0")
    config.fpn_name = fpn_name
    config.image_size = tuple(x.shape[2:])
    model = EfficientDet(config, pretrained_backbone=False).eval()
    model.load_state_dict(state)
    with torch.no_grad():
        cls, box = model(x)
    return {"cls": cls, "box": box}


@task
def model_training_step(
    name: str, options: dict, state: dict, x: Tensor, weights: dict, seed: int
) -> dict:
    """Gradients of the weighted sum of all outputs in training mode, and the state afterwards."""
    model = _build(name, options, state).to(x.dtype).train()
    torch.manual_seed(seed)
    cls, box = model(x)
    maps = zip([*cls, *box], [*weights["cls"], *weights["box"]], strict=True)
    sum((y * w).sum() for y, w in maps).backward()
    return {
        "gradients": {n: p.grad for n, p in model.named_parameters()},
        "state": model.state_dict(),
        "cls": [y.detach() for y in cls],
    }


@task
def parameter_statistics(name: str, alternate_init: bool) -> dict:
    torch.manual_seed(0)
    model = create_model(name, pretrained_backbone=False, alternate_init=alternate_init)
    return {
        n: (p.mean().item(), p.std().item(), p.abs().max().item())
        for n, p in model.named_parameters()
        if p.numel() > 1
    }


@task
def resample(arguments: dict, x: Tensor) -> dict:
    return {"y": ResampleFeatureMap(**arguments)(x)}


@task
def combine(arguments: dict, x: list[Tensor], edge_weights: Tensor | None) -> dict:
    module = FpnCombine(**arguments)
    if edge_weights is not None:
        module.edge_weights.data.copy_(edge_weights)
    with torch.no_grad():
        return {"y": module(x)}
