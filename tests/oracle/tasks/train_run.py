"""A whole training run of PyPI effdet: its model, loss and benches, timm's optimizer and averaged weights."""

from __future__ import annotations

from pathlib import Path

import torch
from runs import Batches, detections
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV2
from torch import Tensor, nn

from effdet import DetBenchPredict, DetBenchTrain, EfficientDet
from effdet.config import default_detection_model_configs

from . import task


def _model(config: dict, state: dict) -> EfficientDet:
    own = default_detection_model_configs()
    own.update(config)
    model = EfficientDet(own, pretrained_backbone=False)
    model.load_state_dict(state)
    return model


@task
def train_run(
    config: dict,
    state: dict,
    folder: Path,
    mean: list[float],
    std: list[float],
    rates: list[float],
    momentum: float,
    weight_decay: float,
    clip: float,
    ema_decay: float,
    eval_size: tuple[int, int],
    threads: int,
) -> dict:
    """AdamW steps on the batches of ``folder/train``, each with its rate; then detections on those of ``folder/val``.

    Returns:
        "losses": total loss of each step; "rows": detections of the averaged weights.
    """
    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bench = DetBenchTrain(_model(config, state)).train()
        optimizer = create_optimizer_v2(
            bench.model, "adamw", lr=0.0, weight_decay=weight_decay, betas=(momentum, 0.999)
        )
        average = ModelEmaV2(bench.model)
        losses = []
        batches = Batches(folder / "train", mean, std)
        for step, (rate, (images, target)) in enumerate(zip(rates, batches, strict=True)):
            losses.append(_step(bench, optimizer, rate, clip, images, target))
            average.decay = min(ema_decay, (1 + step) / (10 + step))
            average.update(bench.model)
        model = _model({**config, "image_size": eval_size}, average.module.state_dict())
        rows = detections(DetBenchPredict(model), Batches(folder / "val", mean, std))
    finally:
        torch.set_num_threads(usual)
    return {"losses": losses, "rows": rows}


def _step(
    bench: nn.Module,
    optimizer: torch.optim.Optimizer,
    rate: float,
    clip: float,
    images: Tensor,
    target: dict[str, Tensor],
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.zero_grad()
    loss = bench(images, target)["loss"]
    loss.backward()
    nn.utils.clip_grad_norm_(bench.model.parameters(), clip)
    optimizer.step()
    return loss.item()
