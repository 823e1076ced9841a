"""How images enter a model: size, interpolation, normalisation, padding colour."""

from __future__ import annotations

from collections.abc import Mapping

from .constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD


def resolve_input_config(args: Mapping, model_config: Mapping | None = None, model=None) -> dict:
    """Input settings of a model, overridden by `args` (for instance `vars()` of parsed arguments).

    Args:
        args: `interpolation`, `fill_color`, `mean`, `std`; absent or empty ones are not overridden,
            one number for `mean` or `std` stands for all three channels.
        model_config: the model's config: `input_size` or `image_size` (height, width), and defaults
            of the settings above.
        model: gives its `config` where `model_config` is not given.

    Returns:
        {"input_size": (3, H, W), "interpolation", "mean", "std", "fill_color"}.
    """
    if model_config is None:
        model_config = getattr(model, "config", None) or {}

    def setting(name: str, default):
        for source in (args, model_config):
            value = source.get(name)
            if value is not None and value != "":
                return value
        return default

    input_size = model_config.get("input_size")
    if input_size is None:
        input_size = (3, *_pair(model_config.get("image_size", 512)))
    return {
        "input_size": tuple(input_size),
        "interpolation": setting("interpolation", "bicubic"),
        "mean": _triple("mean", setting("mean", IMAGENET_DEFAULT_MEAN)),
        "std": _triple("std", setting("std", IMAGENET_DEFAULT_STD)),
        "fill_color": setting("fill_color", "mean"),
    }


def _pair(size) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _triple(name: str, value) -> tuple[float, ...]:
    numbers = (value,) if isinstance(value, (int, float)) else tuple(value)
    if len(numbers) == 1:
        numbers *= 3
    if len(numbers) != 3:
        raise ValueError(f"{name}: got {value!r}; takes one number or one per channel (R, G, B)")
    return numbers
