"""What comes from timm when it is installed: other backbones, and ImageNet weights for ours."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from torch import nn

INSTALL = 'pip install "effdet-kernels[timm]"'


def import_timm() -> ModuleType | None:
    """timm, or None if it is not installed."""
    try:
        return importlib.import_module("timm")
    except ModuleNotFoundError as error:
        if error.name != "timm":
            raise
        return None


def create(
    name: str, out_indices: Sequence[int], pretrained: bool, hint: str, **backbone_args: Any
) -> nn.Module:
    """timm's feature extractor `name`; `hint` ends the message when there is none."""
    timm = import_timm()
    if timm is None:
        raise ImportError(
            f"backbone_name: {name!r} is built by timm, which is not installed: {INSTALL}{hint}"
        )
    if not timm.is_model(name):
        raise ValueError(f"backbone_name: got {name!r}, which neither effdet nor timm has{hint}")
    return timm.create_model(
        name,
        features_only=True,
        out_indices=tuple(out_indices),
        pretrained=pretrained,
        **backbone_args,
    )


def load_imagenet_weights(backbone: nn.Module, name: str) -> None:
    """Copy timm's ImageNet weights of `name` into our backbone of the same name, or warn."""
    timm = import_timm()
    if timm is None or not timm.is_model(name):
        needs = f"needs timm ({INSTALL})" if timm is None else f"finds no {name!r} in timm"
        warnings.warn(
            f"pretrained_backbone=True {needs} to fetch ImageNet weights; starting from random"
            " weights; pass pretrained_backbone=False to silence",
            stacklevel=2,
        )
        return
    published = timm.create_model(name, pretrained=True).state_dict()
    missing = backbone.state_dict().keys() - published.keys()
    if missing:
        raise RuntimeError(
            f"backbone_name: timm's weights of {name!r} lack {len(missing)} keys that this backbone"
            f" has, such as {sorted(missing)[:3]}"
        )
    backbone.load_state_dict({key: published[key] for key in backbone.state_dict()})
