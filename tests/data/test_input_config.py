"""Input settings of a model and their overrides."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from effdet.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_config


def test_defaults():
    assert resolve_input_config({}) == {
        "input_size": (3, 512, 512),
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "fill_color": "mean",
    }


def test_arguments_go_before_the_model():
    config = {"image_size": (128, 256), "mean": (0.5, 0.5, 0.5), "interpolation": "bilinear"}
    args = {"mean": [0.1], "std": None, "interpolation": "", "fill_color": 0}
    for given in ({"model_config": config}, {"model": SimpleNamespace(config=config)}):
        settings = resolve_input_config(args, **given)
        assert settings["input_size"] == (3, 128, 256)
        assert settings["mean"] == (0.1, 0.1, 0.1)
        assert settings["std"] == IMAGENET_DEFAULT_STD
        assert settings["interpolation"] == "bilinear"
        assert settings["fill_color"] == 0


def test_one_number_for_the_image_size():
    assert resolve_input_config({}, {"image_size": 96})["input_size"] == (3, 96, 96)


def test_wrong_number_of_channels():
    with pytest.raises(ValueError, match=r"std: got \[1, 2\]; takes one number or one per channel"):
        resolve_input_config({"std": [1, 2]})
