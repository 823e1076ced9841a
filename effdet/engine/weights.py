"""From a model name and a weights file to a model that knows the names of its classes."""

from __future__ import annotations

import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from torch import nn

from effdet.config import get_efficientdet_config
from effdet.factory import create_model
from effdet.helpers import CheckpointError, load_checkpoint, local_path, state_dict_of

from . import checkpoint as checkpoints
from .coco_names import COCO_NAMES

_HEAD_PREFIX = "class_net.predict."


@dataclass(frozen=True)
class LoadedModel:
    """A bare EfficientDet with weights, and what its outputs mean.

    Attributes:
        model: the network.
        name: its configuration's name.
        class_names: name of label 1, 2, …
        category_ids: id of label 1, 2, … in the annotation files that it was trained on.
        source: where the weights came from, to print.
        bn_eps: epsilon of all its batch norms; 0: the configuration's.
    """

    model: nn.Module
    name: str
    class_names: list[str]
    category_ids: list[int]
    source: str
    bn_eps: float = 0.0


def bundled_checkpoint() -> Path:
    """The small checkpoint inside the package: efficientdet_nano trained on `effdet.scenes`.

    Raises:
        FileNotFoundError: the installation is incomplete.
    """
    folder = Path(str(resources.files("effdet"))) / "assets"
    found = sorted(folder.glob("efficientdet_nano_scenes-*.pth"))
    if not found:
        raise FileNotFoundError(f"{folder}: no bundled checkpoint efficientdet_nano_scenes-*.pth")
    return found[0]


def load_model(
    model: str = "", checkpoint: str | os.PathLike[str] = "", size: tuple[int, int] | None = None
) -> LoadedModel:
    """Make the model that ``model`` and ``checkpoint`` describe.

    Neither given: the bundled one. Only a checkpoint: the model that it names (files written by
    ``effdet train`` do). Only a model: its published COCO weights, downloaded once.

    Args:
        model: configuration name, or empty.
        checkpoint: weights file, on this machine or the Hub (``effdet.hub``), or empty.
        size: (height, width) of the input; None takes the checkpoint's, else the model's own.

    Raises:
        KeyError: no such model.
        CheckpointError: the file is unusable, does not fit the model, or says too little.
        ValueError: the model has no published weights.
        OSError: no such file, or weights cannot be downloaded.
    """
    if not model and not checkpoint:
        checkpoint = bundled_checkpoint()
    if not checkpoint:
        return _published(model, size)
    source, checkpoint = str(checkpoint), local_path(checkpoint)
    content = checkpoints.read(checkpoint)
    name = model or content.get("model", "")
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"{checkpoint}: does not say which model it is for; give the model's name"
        )
    config = get_efficientdet_config(name)
    weights = state_dict_of(content, checkpoint)
    num_classes = _class_count(weights, config, checkpoint)
    names = content.get("class_names") or default_class_names(num_classes)
    ids = content.get("category_ids") or list(range(1, num_classes + 1))
    if len(names) != num_classes or len(ids) != num_classes:
        raise CheckpointError(
            f"{checkpoint}: {len(names)} class names and {len(ids)} category ids for"
            f" weights of {num_classes} classes"
        )
    built = create_model(
        name,
        num_classes=num_classes,
        pretrained_backbone=False,
        image_size=size or tuple(content.get("image_size", ())) or None,
    )
    load_checkpoint(built, checkpoint)
    bn_eps = float(content.get("bn_eps", 0.0))
    set_norms(built, 0.0, bn_eps)
    return LoadedModel(built, name, list(names), [int(i) for i in ids], source, bn_eps)


def set_norms(model: nn.Module, momentum: float, eps: float) -> None:
    """Give every batch norm this momentum and epsilon; 0 leaves its own."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = momentum or module.momentum
            module.eps = eps or module.eps


def default_class_names(num_classes: int) -> list[str]:
    """COCO's names for the 90 labels of the published models, else "class 1", "class 2", …"""
    if num_classes == max(COCO_NAMES):
        return [COCO_NAMES.get(i, f"unused {i}") for i in range(1, num_classes + 1)]
    return [f"class {i}" for i in range(1, num_classes + 1)]


def _published(name: str, size: tuple[int, int] | None) -> LoadedModel:
    config = get_efficientdet_config(name)
    url = config.get("url", "")
    if not url:
        raise ValueError(f"model {name}: has no published weights; give a checkpoint")
    built = create_model(name, pretrained=True, image_size=size)
    names = default_class_names(config.num_classes)
    return LoadedModel(built, name, names, list(range(1, config.num_classes + 1)), url)


def _class_count(weights: dict[str, Any], config: Any, checkpoint: object) -> int:
    """Read the number of classes off the last bias of the class head."""
    anchors = config.num_scales * len(config.aspect_ratios)
    for key, value in weights.items():
        key = key.removeprefix("model.")  # of a bench
        is_last_bias = key.startswith(_HEAD_PREFIX) and key.endswith(".bias")
        if is_last_bias and value.ndim == 1 and value.numel() % anchors == 0:
            return value.numel() // anchors
    raise CheckpointError(
        f"{checkpoint}: has no EfficientDet class head ({_HEAD_PREFIX}*.bias);"
        f" first keys: {', '.join(list(map(str, weights))[:3]) or 'none'}"
    )
