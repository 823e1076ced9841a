"""Training of PyPI effdet with timm's optimizer: gradients of one step, losses of many and the state after them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from steps import take_steps
from timm.models import register_model
from timm.models.efficientnet import _gen_efficientnet
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from effdet import DetBenchTrain, EfficientDet
from effdet.config import default_detection_model_configs

from . import task


@register_model
def efficientnet_nano(pretrained: bool = False, **arguments: Any) -> nn.Module:
    """tf_efficientnet_b0 at 0.45 of its width and 0.6 of its depth, which timm has no name for."""
    return _gen_efficientnet(
        "efficientnet_nano", 0.45, 0.6, bn_eps=1e-3, pad_type="same", **arguments
    )


def _bench(config: dict, state: dict, dtype: torch.dtype, create_labeler: bool) -> DetBenchTrain:
    own = default_detection_model_configs()
    own.update(config)
    model = EfficientDet(own, pretrained_backbone=False)
    model.load_state_dict(state)
    model.to(dtype)  # not the anchors: the labeler takes float32 only
    return DetBenchTrain(model, create_labeler).train()


@contextlib.contextmanager
def _loss_in(dtype: torch.dtype) -> Iterator[None]:
    """The peer's loss rounds maps to float32; here it takes float64 as it is."""
    if dtype == torch.float64:
        with mock.patch.object(Tensor, "float", Tensor.double):
            yield
    else:
        yield


@task
def train_gradients(config: dict, state: dict, x: Tensor, target: dict) -> dict:
    """Losses of one batch and the gradient of each parameter; labels come with ``target`` or are made here."""
    bench = _bench(config, state, x.dtype, create_labeler="bbox" in target)
    with _loss_in(x.dtype):
        found = bench(x, target)
    found["loss"].backward()
    return {
        "losses": {name: value.detach() for name, value in found.items()},
        "gradients": {name: p.grad for name, p in bench.model.named_parameters()},
    }


@task
def train(
    config: dict,
    state: dict,
    dtype: torch.dtype,
    batches: list[tuple[Tensor, dict]],
    rates: list[float],
    momentum: float,
    weight_decay: float,
    clip: float,
) -> dict:
    """`take_steps` on the model, its labels coming with the batches or made here: their losses, and the state then."""
    bench = _bench(config, state, dtype, create_labeler="bbox" in batches[0][1])
    optimizer = create_optimizer_v2(
        bench.model, "momentum", lr=0.0, weight_decay=weight_decay, momentum=momentum
    )
    with _loss_in(dtype):
        losses = take_steps(bench, optimizer, dtype, batches, rates, clip)
    return {"losses": losses, "state": bench.model.state_dict()}
