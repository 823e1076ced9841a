"""Backbones: the EfficientNet family here, anything else through the optional timm package."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

from torch import nn

from . import timm_models
from .network import EfficientNetFeatures
from .specs import SPECS

__all__ = ["SPECS", "EfficientNetFeatures", "create_backbone"]


def create_backbone(
    name: str,
    out_indices: Sequence[int] = (2, 3, 4),
    pretrained: bool = False,
    **backbone_args: Any,
) -> nn.Module:
    """The backbone called `name`, returning the maps of `out_indices` (stride 2^(index + 1)).

    It has `feature_info` with one entry per map, and its state-dict keys are those of timm's
    feature extractor of the same name. `backbone_args` go to its constructor. `pretrained` loads
    ImageNet weights, which only timm can fetch; without timm it warns and goes on with random ones.

    Raises:
        ValueError: no backbone of this name here, and timm, if installed, has none either.
        ImportError: no backbone of this name here, and timm is not installed.
    """
    if name in SPECS:
        backbone = EfficientNetFeatures(SPECS[name], out_indices, **backbone_args)
        if pretrained:
            timm_models.load_imagenet_weights(backbone, name)
        return backbone
    close = difflib.get_close_matches(str(name), SPECS, n=3)
    hint = f"; the closest of its own are {', '.join(close)}" if close else ""
    return timm_models.create(name, out_indices, pretrained, hint, **backbone_args)
