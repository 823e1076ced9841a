"""Checks that turn a misspelt or impossible config into an error that names the entry."""

from __future__ import annotations

import difflib
from numbers import Real
from typing import Any

from omegaconf import DictConfig, OmegaConf

from .model_config import default_detection_model_configs

# Entries that configs have beyond the defaults.
_EXTRA_KEYS = ("url", "mean", "std", "fill_color", "interpolation")
_POSITIVE_INTS = (
    "num_classes",
    "num_levels",
    "num_scales",
    "box_class_repeats",
    "fpn_cell_repeats",
    "fpn_channels",
    "max_detection_points",
    "max_det_per_image",
)
_SIMILAR = 0.85


def check_config(config: DictConfig) -> DictConfig:
    """Validate a model config and return it with `image_size` as a (height, width) pair.

    Keys that no model reads are kept, since programs store their own values in configs, unless
    they look like a misspelling of a key that is read.

    Raises:
        TypeError, ValueError: naming the entry, what it is and what it may be.
    """
    defaults = default_detection_model_configs()
    known = [*defaults, *_EXTRA_KEYS]
    for key in config:
        close = difflib.get_close_matches(str(key), known, n=1, cutoff=_SIMILAR)
        if key not in known and close:
            raise ValueError(f"config: unknown entry {key!r}; did you mean {close[0]!r}?")
    missing = [str(key) for key in defaults if key not in config]
    if missing:
        raise ValueError(
            f"config: the entries {', '.join(missing)} are missing; start from"
            " get_efficientdet_config(name)"
        )
    for key in _POSITIVE_INTS:
        value = config[key]
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"config.{key}: got {value!r}, expected an integer of at least 1")
    config.image_size = _image_size(config.image_size)
    levels = config.max_level - config.min_level + 1
    if config.num_levels != levels:
        raise ValueError(
            f"config.num_levels: got {config.num_levels}, expected {levels} for the levels"
            f" {config.min_level} to {config.max_level}"
        )
    _check_choice("pad_type", config.pad_type, ("same", "SAME", "", None))
    if not config.aspect_ratios:
        raise ValueError("config.aspect_ratios: got none, expected at least one")
    return config


def _image_size(value: Any) -> tuple[int, int]:
    """`value` as (height, width); a single number stands for a square."""
    pair = [value, value] if isinstance(value, int) else value
    is_pair = isinstance(pair, list | tuple) or OmegaConf.is_config(pair)
    if is_pair and len(pair) == 2 and all(_is_length(side) for side in pair):
        return int(pair[0]), int(pair[1])
    raise ValueError(
        f"config.image_size: got {value!r}, expected (height, width) in pixels, both positive"
    )


def _is_length(side: Any) -> bool:
    return isinstance(side, Real) and float(side).is_integer() and float(side) > 0


def _check_choice(key: str, value: Any, choices: tuple[Any, ...]) -> None:
    if value not in choices:
        names = ", ".join(repr(choice) for choice in choices)
        raise ValueError(f"config.{key}: got {value!r}, expected one of {names}")
