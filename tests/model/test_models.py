"""All models: keys, shapes, parameter and anchor counts against recorded, published values."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from pathlib import Path

import pytest
import torch

from effdet import EfficientDet, get_efficientdet_config
from effdet.anchors import Anchors
from effdet.backbone import SPECS
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.efficientdet import get_feature_info

TABLE = json.loads((Path(__file__).parent / "data" / "models_47.json").read_text())

# efficientdet_arch_test.py of google/automl
PUBLISHED_PARAMS = {
    "tf_efficientdet_d0": 3_880_067,
    "tf_efficientdet_d1": 6_625_898,
    "tf_efficientdet_d2": 8_097_039,
    "tf_efficientdet_d3": 12_032_296,
    "tf_efficientdet_d4": 20_723_675,
    "tf_efficientdet_d5": 33_653_315,
    "tf_efficientdet_d6": 51_871_782,
    "tf_efficientdet_d7": 51_871_782,
    "tf_efficientdet_d7x": 77_147_166,
    "tf_efficientdet_lite0": 3_243_470,
    "tf_efficientdet_lite1": 4_248_318,
    "tf_efficientdet_lite2": 5_252_334,
    "tf_efficientdet_lite3": 8_350_862,
    "tf_efficientdet_lite3x": 9_280_862,
    "tf_efficientdet_lite4": 15_130_894,
}


def build_on_meta(name: str) -> EfficientDet:
    config = get_efficientdet_config(name)
    if config.backbone_name not in SPECS and importlib.util.find_spec("timm") is None:
        pytest.skip(f"{config.backbone_name} needs timm")
    with torch.device("meta"):
        return EfficientDet(config, pretrained_backbone=False)


def count_params(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_the_table_has_every_model_but_our_own() -> None:
    assert set(efficientdet_model_param_dict) - set(TABLE) == {"efficientdet_nano"}
    assert len(TABLE) == 47


@pytest.mark.parametrize("name", TABLE)
def test_keys_shapes_and_parameters_are_those_of_the_table(name: str) -> None:
    model = build_on_meta(name)
    state = model.state_dict()
    lines = sorted(f"{key} {tuple(value.shape)}" for key, value in state.items())
    assert len(lines) == TABLE[name]["keys"]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest() == TABLE[name]["keys_sha256"]
    assert count_params(model) == TABLE[name]["params"]
    info = get_feature_info(model.backbone)
    assert [i["num_chs"] for i in info] == TABLE[name]["feature_channels"]
    assert [i["reduction"] for i in info] == TABLE[name]["feature_reductions"]


@pytest.mark.parametrize("name", PUBLISHED_PARAMS)
def test_parameters_are_the_published_number(name: str) -> None:
    assert TABLE[name]["params"] == PUBLISHED_PARAMS[name]
    assert count_params(build_on_meta(name)) == PUBLISHED_PARAMS[name]


@pytest.mark.parametrize("name", TABLE)
def test_anchor_count_is_that_of_the_table(name: str) -> None:
    boxes = Anchors.from_config(get_efficientdet_config(name)).boxes
    assert boxes.shape == (TABLE[name]["anchors"], 4)


def test_keys_of_d0_keep_the_published_order() -> None:
    keys = list(build_on_meta("tf_efficientdet_d0").state_dict())
    assert keys[0] == "backbone.conv_stem.weight"
    assert keys[-1] == "box_net.predict.conv_pw.bias"
    prefix = "backbone.blocks.1.0."
    block = [k.removeprefix(prefix) for k in keys if k.startswith(prefix) and "num_" not in k]
    modules = list(dict.fromkeys(key.rpartition(".")[0] for key in block))
    convs_and_norms = ["conv_pw", "bn1", "conv_dw", "bn2"]
    expected = [*convs_and_norms, "se.conv_reduce", "se.conv_expand", "conv_pwl", "bn3"]
    assert modules == expected


def test_nano_is_small_and_of_the_same_family() -> None:
    nano, d0 = build_on_meta("efficientdet_nano"), build_on_meta("tf_efficientdet_d0")
    assert 500_000 <= count_params(nano) <= 900_000
    assert {type(m) for m in nano.modules()} <= {type(m) for m in d0.modules()}
    assert tuple(nano.config.image_size) == (256, 256)
