"""Models by name, bare or inside a bench."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import nn

from . import hub
from .bench import DetBenchPredict, DetBenchTrain
from .config import get_efficientdet_config
from .config.config_utils import copy_config
from .efficientdet import EfficientDet, HeadNet
from .helpers import load_checkpoint, load_pretrained

__all__ = [
    "DetBenchPredict",
    "DetBenchTrain",
    "EfficientDet",
    "HeadNet",
    "create_model",
    "create_model_from_config",
    "get_efficientdet_config",
    "load_checkpoint",
    "load_pretrained",
]

# Keyword arguments of the factories that replace an entry of the config.
_CONFIG_OVERRIDES = (
    "redundant_bias",
    "label_smoothing",
    "legacy_focal",
    "jit_loss",
    "soft_nms",
    "max_det_per_image",
    "max_detection_points",
    "image_size",
)
_BENCHES = ("", "train", "predict")
_WEIGHT_FILES = (".pth", ".pt", ".tar", ".safetensors")


def create_model(
    model_name: str,
    bench_task: str = "",
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint_path: str = "",
    checkpoint_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """`create_model_from_config` of the config called `model_name`.

    Raises:
        KeyError: no such model; the message names the closest ones.
    """
    if hub.is_reference(model_name):
        raise KeyError(
            f"model_name: got {model_name!r}, takes the name of a configuration; weights on the Hub are"
            f" checkpoint_path={model_name!r} (effdet.Detector reads from them which model they are for)"
        )
    return create_model_from_config(
        get_efficientdet_config(model_name),
        bench_task=bench_task,
        num_classes=num_classes,
        pretrained=pretrained,
        checkpoint_path=checkpoint_path,
        checkpoint_ema=checkpoint_ema,
        **kwargs,
    )


def create_model_from_config(
    config: DictConfig,
    bench_task: str = "",
    num_classes: int | None = None,
    pretrained: bool = False,
    checkpoint_path: str = "",
    checkpoint_ema: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Build a model, load weights into it, wrap it for a task.

    Args:
        config: left as it is; the model gets a copy.
        bench_task: "train" wraps in `DetBenchTrain`, "predict" in `DetBenchPredict`, "" not.
        num_classes: classes of the result; pretrained weights are loaded before the class head is
            replaced, a checkpoint after.
        pretrained: load the detector weights of `config.url`. A file is no value of it, see `checkpoint_path`.
        checkpoint_path: a file to load, on this machine or the Hub (`hf://owner/name`).
        checkpoint_ema: load its averaged weights, where it has them.
        **kwargs: the config entries redundant_bias, label_smoothing, legacy_focal, jit_loss,
            soft_nms, max_det_per_image, max_detection_points, image_size; `bench_labeler` (labels
            are made in the training bench; default False); `pretrained_backbone` (ImageNet weights;
            default True unless other weights are loaded); `alternate_init`.

    Raises:
        TypeError: an unknown keyword argument.
        ValueError: an argument or a config entry out of range, named in the message.
    """
    if bench_task not in _BENCHES:
        raise ValueError(f"bench_task: got {bench_task!r}, expected '', 'train' or 'predict'")
    if _is_file(pretrained):
        raise ValueError(
            f"pretrained: got {str(pretrained)!r}, takes True (published weights) or False; a file, also on"
            f" the Hub, is checkpoint_path={str(pretrained)!r}, with num_classes as many as it has"
        )
    config = copy_config(config)
    pretrained_backbone = kwargs.pop("pretrained_backbone", True)
    if pretrained or checkpoint_path:
        pretrained_backbone = False
    for key in _CONFIG_OVERRIDES:
        value = kwargs.pop(key, None)
        if value is not None:
            is_square = key == "image_size" and isinstance(value, int)
            config[key] = (value, value) if is_square else value
    bench_labeler = kwargs.pop("bench_labeler", False)
    alternate_init = kwargs.pop("alternate_init", False)
    if kwargs:
        known = (*_CONFIG_OVERRIDES, "bench_labeler", "pretrained_backbone", "alternate_init")
        raise TypeError(
            f"create_model: unexpected keyword argument {', '.join(map(repr, kwargs))}; expected"
            f" {', '.join(known)}"
        )

    model = EfficientDet(
        config, pretrained_backbone=pretrained_backbone, alternate_init=alternate_init
    )
    if pretrained:
        load_pretrained(model, config.get("url", ""))
    if num_classes is not None and num_classes != config.num_classes:
        model.reset_head(num_classes=num_classes)
    if checkpoint_path:
        load_checkpoint(model, checkpoint_path, use_ema=checkpoint_ema)
    if bench_task == "train":
        return DetBenchTrain(model, create_labeler=bench_labeler)
    if bench_task == "predict":
        return DetBenchPredict(model)
    return model


def _is_file(value: object) -> bool:
    """Whether weights in a file are meant, or on the Hub or the web; "True", "coco" and the like are not."""
    if isinstance(value, str):
        return "/" in value or Path(value).suffix in _WEIGHT_FILES
    return isinstance(value, os.PathLike)
