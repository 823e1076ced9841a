"""Model and FPN configurations: tables, copies, checks."""

from __future__ import annotations

import pytest
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ReadonlyConfigError

from effdet import EfficientDet, create_model_from_config, get_efficientdet_config
from effdet.config import (
    default_detection_model_configs,
    get_fpn_config,
    set_config_readonly,
    set_config_writeable,
)
from effdet.config.config_utils import copy_config
from effdet.config.model_config import efficientdet_model_param_dict
from effdet.config.validate import check_config


def node_list(name: str, **levels: int) -> list[tuple[int, list[int]]]:
    nodes = get_fpn_config(name, **levels).nodes
    return [(node.feat_level, list(node.inputs_offsets)) for node in nodes]


def test_defaults_are_the_published_ones() -> None:
    config = default_detection_model_configs()
    assert tuple(config.image_size) == (640, 640)
    assert [tuple(pair) for pair in config.aspect_ratios] == [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
    assert dict(config.norm_kwargs) == {"eps": 0.001, "momentum": 0.01}
    assert config.backbone_args is None
    assert (config.max_detection_points, config.max_det_per_image) == (5000, 100)


@pytest.mark.parametrize("name", efficientdet_model_param_dict)
def test_every_config_is_fresh_writable_and_valid(name: str) -> None:
    config = get_efficientdet_config(name)
    assert isinstance(config, DictConfig) and config.name == name
    assert config.num_levels == config.max_level - config.min_level + 1
    check_config(config)
    config.num_classes = 7
    config.backbone_args.drop_path_rate = 0.9
    assert get_efficientdet_config(name).num_classes == 90
    assert get_efficientdet_config(name).backbone_args.drop_path_rate < 0.9
    if config.get("url"):
        assert config.url.startswith("https://") and config.url.endswith(".pth")


def test_compound_scaling_reaches_the_small_model() -> None:
    config, phi = get_efficientdet_config("efficientdet_nano"), -2
    assert tuple(config.image_size) == (512 + 128 * phi,) * 2
    assert config.fpn_channels == 32 <= 64 * 1.35**phi
    assert config.fpn_cell_repeats == 3 + phi
    assert config.box_class_repeats == 3 + phi // 3


def test_bifpn_nodes() -> None:
    top_down = [(6, [3, 4]), (5, [2, 5]), (4, [1, 6]), (3, [0, 7])]
    bottom_up = [(4, [1, 7, 8]), (5, [2, 6, 9]), (6, [3, 5, 10]), (7, [4, 11])]
    assert node_list("bifpn_fa") == top_down + bottom_up
    assert node_list("") == node_list("bifpn_fa")
    assert [n.weight_method for n in get_fpn_config("bifpn_attn").nodes] == ["attn"] * 8
    assert node_list("bifpn_sum", max_level=8)[-2:] == [(7, [4, 6, 13]), (8, [5, 14])]


def test_pan_nodes() -> None:
    top_down = [(7, [4]), (6, [3, 5]), (5, [2, 6]), (4, [1, 7]), (3, [0, 8])]
    bottom_up = [(3, [9]), (4, [8, 10]), (5, [7, 11]), (6, [6, 12]), (7, [5, 13])]
    assert node_list("pan_fa") == top_down + bottom_up


def test_quad_fpn_nodes() -> None:
    second = [(4, [1, 0]), (5, [2, 13]), (6, [3, 14]), (7, [4, 15]), (6, [3, 15, 16])]
    second += [(5, [2, 14, 17]), (4, [1, 13, 18]), (3, [0, 19])]
    joined = [(3, [8, 20]), (4, [9, 19]), (5, [10, 18]), (6, [11, 17]), (7, [12, 16])]
    nodes = node_list("qufpn_sum")
    assert nodes[:8] == node_list("bifpn_fa")
    assert nodes[8:] == second + joined
    methods = [n.weight_method for n in get_fpn_config("qufpn_sum").nodes]
    assert methods == ["sum"] * 16 + ["fastattn"] * 5


def test_top_down_fpn_gives_every_level_once_in_order() -> None:
    nodes = node_list("fpn_sum")
    assert [level for level, _ in nodes[-5:]] == [3, 4, 5, 6, 7]
    assert nodes[:3] == [(6, [3, 4]), (5, [2, 5]), (4, [1, 6])]
    assert nodes[3] == (3, [0, 7])
    assert nodes[4:] == [(4, [7]), (5, [6]), (6, [5]), (7, [4])]


def test_read_only_flag() -> None:
    config = get_efficientdet_config("tf_efficientdet_d0")
    set_config_readonly(config)
    with pytest.raises(ReadonlyConfigError):
        config.num_classes = 3
    copied = copy_config(config)
    copied.num_classes = 3
    assert config.num_classes == 90
    set_config_writeable(config)
    config.num_classes = 4


def test_the_callers_config_is_neither_changed_nor_frozen() -> None:
    config = get_efficientdet_config("efficientdet_nano")
    before = OmegaConf.to_container(config)
    for size in (128, 192):
        model = create_model_from_config(
            config, pretrained_backbone=False, image_size=(size, size), num_classes=2
        )
        assert tuple(model.config.image_size) == (size, size)
        assert model.config.num_classes == 2
        with pytest.raises(ReadonlyConfigError):
            model.config.num_classes = 5
    assert OmegaConf.to_container(config) == before
    config.num_classes = 5


@pytest.mark.parametrize(
    ("key", "value", "mentions"),
    [
        ("num_classes", 0, "num_classes"),
        ("num_classes", 2.5, "num_classes"),
        ("num_classes", True, "num_classes"),
        ("fpn_cell_repeats", -1, "fpn_cell_repeats"),
        ("image_size", (512,), "image_size"),
        ("image_size", (512, 0), "image_size"),
        ("num_levels", 4, "num_levels"),
        ("pad_type", "valid", "pad_type"),
        ("aspect_ratios", [], "aspect_ratios"),
        ("num_clases", 3, "num_classes"),
        ("box_class_repeat", 3, "box_class_repeats"),
        ("act_type", "swoosh", "act_type"),
        ("fpn_name", "bifpn", "fpn_name"),
        ("backbone_args", {"feature_location": "nowhere"}, "feature_location"),
        ("backbone_args", {"drop_path_rate": 1.5}, "drop_path_rate"),
        ("backbone_indices", (3, 4, 5), "out_indices"),
    ],
)
def test_wrong_entries_are_named(key: str, value: object, mentions: str) -> None:
    config = get_efficientdet_config("efficientdet_nano")
    config[key] = value
    with pytest.raises((ValueError, KeyError), match=mentions):
        EfficientDet(config, pretrained_backbone=False)


def test_own_entries_are_kept() -> None:
    config = get_efficientdet_config("efficientdet_nano")
    config.my_experiment = "a"
    assert EfficientDet(config, pretrained_backbone=False).config.my_experiment == "a"


def test_missing_entries_are_named() -> None:
    with pytest.raises(ValueError, match="anchor_scale"):
        config = get_efficientdet_config("efficientdet_nano")
        del config.anchor_scale
        EfficientDet(config, pretrained_backbone=False)


def test_something_else_than_a_config_is_refused() -> None:
    with pytest.raises(TypeError, match="config"):
        EfficientDet("tf_efficientdet_d0")
