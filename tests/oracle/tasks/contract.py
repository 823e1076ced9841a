"""Weights of PyPI effdet's models and benches."""

from __future__ import annotations

import torch

from effdet import create_model
from effdet.config.model_config import efficientdet_model_param_dict

from . import task


@task
def state_of(name: str, bench_task: str, state: dict | None = None) -> dict[str, torch.Tensor]:
    """State of a new model, after loading `state` into it strictly."""
    torch.manual_seed(0)
    model = create_model(name, bench_task=bench_task, pretrained_backbone=False)
    if state is not None:
        model.load_state_dict(state, strict=True)
    return model.state_dict()


@task
def weight_urls() -> dict[str, str]:
    """Where the weights of each model are; empty for those that have none."""
    return {name: entry.get("url", "") for name, entry in efficientdet_model_param_dict.items()}
