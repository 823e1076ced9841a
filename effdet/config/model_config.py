"""The table of models: what each name changes of the defaults."""

from __future__ import annotations

import copy
import difflib
from typing import Any

from omegaconf import DictConfig, OmegaConf

_WEIGHTS = "https://github.com/rwightman/efficientdet-pytorch/releases/download/v0.1/"
_WEIGHT_FILES = {
    "efficientdet_d0": "efficientdet_d0-f3276ba8.pth",
    "efficientdet_d1": "efficientdet_d1-bb7e98fe.pth",
    "efficientdetv2_dt": "efficientdetv2_rw_dt_agc-ad8b8c96.pth",
    "efficientdetv2_ds": "efficientnetv2_rw_ds_agc-cf589293.pth",
    "resdet50": "resdet50_416-08676892.pth",
    "cspresdet50": "cspresdet50b-386da277.pth",
    "cspresdext50pan": "cspresdext50pan-92fdd094.pth",
    "cspdarkdet53m": "cspdarkdet53m-79062b2d.pth",
    "efficientdet_q0": "efficientdet_q0-bdf1bdb5.pth",
    "efficientdet_q1": "efficientdet_q1b-d0612140.pth",
    "efficientdet_q2": "efficientdet_q2-0f7564e5.pth",
    "tf_efficientdet_d0": "tf_efficientdet_d0_34-f153e0cf.pth",
    "tf_efficientdet_d1": "tf_efficientdet_d1_40-a30f94af.pth",
    "tf_efficientdet_d2": "tf_efficientdet_d2_43-8107aa99.pth",
    "tf_efficientdet_d3": "tf_efficientdet_d3_47-0b525f35.pth",
    "tf_efficientdet_d4": "tf_efficientdet_d4_49-f56376d9.pth",
    "tf_efficientdet_d5": "tf_efficientdet_d5_51-c79f9be6.pth",
    "tf_efficientdet_d6": "tf_efficientdet_d6_52-4eda3773.pth",
    "tf_efficientdet_d7": "tf_efficientdet_d7_53-6d1d7a95.pth",
    "tf_efficientdet_d7x": "tf_efficientdet_d7x-f390b87c.pth",
    "tf_efficientdet_d0_ap": "tf_efficientdet_d0_ap-d0cdbd0a.pth",
    "tf_efficientdet_d1_ap": "tf_efficientdet_d1_ap-7721d075.pth",
    "tf_efficientdet_d2_ap": "tf_efficientdet_d2_ap-a2995c19.pth",
    "tf_efficientdet_d3_ap": "tf_efficientdet_d3_ap-e4a2feab.pth",
    "tf_efficientdet_d4_ap": "tf_efficientdet_d4_ap-f601a5fc.pth",
    "tf_efficientdet_d5_ap": "tf_efficientdet_d5_ap-3673ae5d.pth",
    "tf_efficientdet_lite0": "tf_efficientdet_lite0-dfacfc78.pth",
    "tf_efficientdet_lite1": "tf_efficientdet_lite1-6dc7ab30.pth",
    "tf_efficientdet_lite2": "tf_efficientdet_lite2-86c5d55b.pth",
    "tf_efficientdet_lite3": "tf_efficientdet_lite3-506852cb.pth",
    "tf_efficientdet_lite3x": "tf_efficientdet_lite3x-8404c57b.pth",
    "tf_efficientdet_lite4": "tf_efficientdet_lite4-391ddabc.pth",
}
# Anchors as ratios whose product is 1, instead of the paper's rounded (1.4, 0.7) pairs.
_RATIOS = [1.0, 2.0, 0.5]
_BILINEAR: dict[str, Any] = {"downsample_type": "bilinear", "upsample_type": "bilinear"}
_INCEPTION: dict[str, Any] = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

tf_efficientdet_lite_common: dict[str, Any] = dict(
    fpn_name="bifpn_sum", act_type="relu6", **_INCEPTION
)


def default_detection_model_configs() -> DictConfig:
    """The values that a model's entry starts from.

    `image_size` is (height, width) in pixels; `anchor_scale` is in strides of the level;
    `norm_kwargs` are those of the FPN and the heads (the backbone has its own).
    """
    return OmegaConf.create(
        {
            "name": "tf_efficientdet_d1",
            "backbone_name": "tf_efficientnet_b1",
            "backbone_args": None,
            "backbone_indices": None,
            "image_size": (640, 640),
            "num_classes": 90,
            "min_level": 3,
            "max_level": 7,
            "num_levels": 5,
            "num_scales": 3,
            "aspect_ratios": [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)],
            "anchor_scale": 4.0,
            "pad_type": "same",
            "act_type": "swish",
            "norm_layer": None,
            "norm_kwargs": {"eps": 0.001, "momentum": 0.01},
            "box_class_repeats": 3,
            "fpn_cell_repeats": 3,
            "fpn_channels": 88,
            "separable_conv": True,
            "apply_resample_bn": True,
            "conv_bn_relu_pattern": False,
            "downsample_type": "max",
            "upsample_type": "nearest",
            "redundant_bias": True,
            "head_bn_level_first": False,
            "head_act_type": None,
            "fpn_name": None,
            "fpn_config": None,
            "fpn_drop_path_rate": 0.0,
            "alpha": 0.25,
            "gamma": 1.5,
            "label_smoothing": 0.0,
            "legacy_focal": False,
            "jit_loss": False,
            "delta": 0.1,
            "box_loss_weight": 50.0,
            "soft_nms": False,
            "max_detection_points": 5000,
            "max_det_per_image": 100,
        }
    )


def _entry(
    name: str,
    backbone: str,
    size: int,
    channels: int,
    cells: int,
    head: int,
    drop_path: float,
    **changes: Any,
) -> dict[str, Any]:
    """One row of the table: the compound-scaled numbers by position, deviations by name."""
    return dict(
        name=name,
        backbone_name=backbone,
        image_size=(size, size),
        fpn_channels=channels,
        fpn_cell_repeats=cells,
        box_class_repeats=head,
        backbone_args={"drop_path_rate": drop_path},
        url=_WEIGHTS + _WEIGHT_FILES[name] if name in _WEIGHT_FILES else "",
        **changes,
    )


def _timm(*row: Any, **changes: Any) -> dict[str, Any]:
    """A model trained in PyTorch: symmetric padding and no bias in front of batch norm."""
    return _entry(*row, **{"pad_type": "", "redundant_bias": False, **changes})


def _level_first(*row: Any, **changes: Any) -> dict[str, Any]:
    return _timm(*row, head_bn_level_first=True, **changes)


def _lite(*row: Any, **changes: Any) -> dict[str, Any]:
    return _entry(*row, **(tf_efficientdet_lite_common | changes))


def _adv(*row: Any) -> dict[str, Any]:
    """Trained with AdvProp (arXiv:1911.09665): other input statistics, black padding."""
    return _entry(*row, fill_color=0, **_INCEPTION)


def _dense(*row: Any, act: str, **changes: Any) -> dict[str, Any]:
    return _level_first(*row, act_type=act, aspect_ratios=_RATIOS, separable_conv=False, **changes)


# name, backbone, size, FPN channels, FPN cells, head depth, drop path rate
_ENTRIES = [
    _timm("efficientdet_d0", "efficientnet_b0", 512, 64, 3, 3, 0.1),
    _timm("efficientdet_d1", "efficientnet_b1", 640, 88, 4, 3, 0.2),
    _timm("efficientdet_d2", "efficientnet_b2", 768, 112, 5, 3, 0.2),
    _timm("efficientdet_d3", "efficientnet_b3", 896, 160, 6, 4, 0.2),
    _entry("efficientdet_d4", "efficientnet_b4", 1024, 224, 7, 4, 0.2),
    _entry("efficientdet_d5", "efficientnet_b5", 1280, 288, 7, 4, 0.2),
    _level_first(
        "efficientdetv2_dt",
        "efficientnetv2_rw_t",
        768,
        128,
        5,
        3,
        0.2,
        aspect_ratios=_RATIOS,
        **_BILINEAR,
    ),
    _level_first(
        "efficientdetv2_ds",
        "efficientnetv2_rw_s",
        1024,
        256,
        7,
        4,
        0.2,
        aspect_ratios=_RATIOS,
        **_BILINEAR,
    ),
    _timm("resdet50", "resnet50", 640, 88, 4, 3, 0.2, act_type="relu", separable_conv=False),
    _dense(
        "cspresdet50",
        "cspresnet50",
        768,
        88,
        4,
        3,
        0.2,
        act="leaky_relu",
        head_act_type="silu",
        **_BILINEAR,
    ),
    _dense("cspresdext50", "cspresnext50", 640, 88, 4, 3, 0.2, act="leaky_relu"),
    _dense(
        "cspresdext50pan", "cspresnext50", 640, 88, 3, 3, 0.2, act="leaky_relu", fpn_name="pan_fa"
    ),
    _dense(
        "cspdarkdet53",
        "cspdarknet53",
        640,
        88,
        4,
        3,
        0.2,
        act="leaky_relu",
        backbone_indices=(3, 4, 5),
    ),
    _dense(
        "cspdarkdet53m",
        "cspdarknet53",
        768,
        96,
        4,
        3,
        0.2,
        act="leaky_relu",
        head_act_type="mish",
        fpn_name="qufpn_fa",
        backbone_indices=(3, 4, 5),
        **_BILINEAR,
    ),
    _level_first("mixdet_m", "mixnet_m", 512, 64, 3, 3, 0.1, aspect_ratios=_RATIOS),
    _level_first("mixdet_l", "mixnet_l", 640, 88, 4, 3, 0.2, aspect_ratios=_RATIOS),
    _level_first(
        "mobiledetv2_110d",
        "mobilenetv2_110d",
        384,
        48,
        3,
        3,
        0.05,
        act_type="relu6",
        aspect_ratios=_RATIOS,
    ),
    _level_first(
        "mobiledetv2_120d",
        "mobilenetv2_120d",
        512,
        56,
        3,
        3,
        0.1,
        act_type="relu6",
        aspect_ratios=_RATIOS,
    ),
    _level_first(
        "mobiledetv3_large",
        "mobilenetv3_large_100",
        512,
        64,
        3,
        3,
        0.1,
        act_type="hard_swish",
        aspect_ratios=_RATIOS,
    ),
    _level_first("efficientdet_q0", "efficientnet_b0", 512, 64, 3, 3, 0.1, fpn_name="qufpn_fa"),
    _level_first(
        "efficientdet_q1", "efficientnet_b1", 640, 88, 3, 3, 0.2, fpn_name="qufpn_fa", **_BILINEAR
    ),
    _level_first("efficientdet_q2", "efficientnet_b2", 768, 112, 4, 3, 0.2, fpn_name="qufpn_fa"),
    # Fuses the wide maps in front of each stage's last projection instead of the stage outputs.
    _level_first("efficientdet_w0", "efficientnet_b0", 512, 80, 3, 3, 0.1, aspect_ratios=_RATIOS),
    _dense("efficientdet_es", "efficientnet_es", 512, 72, 3, 3, 0.1, act="relu"),
    _dense("efficientdet_em", "efficientnet_em", 640, 96, 4, 3, 0.2, act="relu"),
    _entry(
        "efficientdet_lite0",
        "efficientnet_lite0",
        384,
        64,
        3,
        3,
        0.1,
        act_type="relu6",
        redundant_bias=False,
        head_bn_level_first=True,
    ),
    _entry("tf_efficientdet_d0", "tf_efficientnet_b0", 512, 64, 3, 3, 0.2),
    _entry("tf_efficientdet_d1", "tf_efficientnet_b1", 640, 88, 4, 3, 0.2),
    _entry("tf_efficientdet_d2", "tf_efficientnet_b2", 768, 112, 5, 3, 0.2),
    _entry("tf_efficientdet_d3", "tf_efficientnet_b3", 896, 160, 6, 4, 0.2),
    _entry("tf_efficientdet_d4", "tf_efficientnet_b4", 1024, 224, 7, 4, 0.2),
    _entry("tf_efficientdet_d5", "tf_efficientnet_b5", 1280, 288, 7, 4, 0.2),
    # From d6 on the paper drops the learned fusion weights for the sake of stable training.
    _entry("tf_efficientdet_d6", "tf_efficientnet_b6", 1280, 384, 8, 5, 0.2, fpn_name="bifpn_sum"),
    _entry(
        "tf_efficientdet_d7",
        "tf_efficientnet_b6",
        1536,
        384,
        8,
        5,
        0.2,
        fpn_name="bifpn_sum",
        anchor_scale=5.0,
    ),
    _entry(
        "tf_efficientdet_d7x",
        "tf_efficientnet_b7",
        1536,
        384,
        8,
        5,
        0.2,
        fpn_name="bifpn_sum",
        anchor_scale=4.0,
        max_level=8,
    ),
    _adv("tf_efficientdet_d0_ap", "tf_efficientnet_b0", 512, 64, 3, 3, 0.2),
    _adv("tf_efficientdet_d1_ap", "tf_efficientnet_b1", 640, 88, 4, 3, 0.2),
    _adv("tf_efficientdet_d2_ap", "tf_efficientnet_b2", 768, 112, 5, 3, 0.2),
    _adv("tf_efficientdet_d3_ap", "tf_efficientnet_b3", 896, 160, 6, 4, 0.2),
    _adv("tf_efficientdet_d4_ap", "tf_efficientnet_b4", 1024, 224, 7, 4, 0.2),
    _adv("tf_efficientdet_d5_ap", "tf_efficientnet_b5", 1280, 288, 7, 4, 0.2),
    _lite("tf_efficientdet_lite0", "tf_efficientnet_lite0", 320, 64, 3, 3, 0.0, anchor_scale=3.0),
    _lite("tf_efficientdet_lite1", "tf_efficientnet_lite1", 384, 88, 4, 3, 0.2, anchor_scale=3.0),
    _lite("tf_efficientdet_lite2", "tf_efficientnet_lite2", 448, 112, 5, 3, 0.2, anchor_scale=3.0),
    _lite("tf_efficientdet_lite3", "tf_efficientnet_lite3", 512, 160, 6, 4, 0.2),
    _lite("tf_efficientdet_lite3x", "tf_efficientnet_lite3", 640, 200, 6, 4, 0.2, anchor_scale=3.0),
    _lite("tf_efficientdet_lite4", "tf_efficientnet_lite4", 640, 224, 7, 4, 0.2),
    # The compound rule of the paper (section 4) continued below d0, at phi = -2: size
    # 512 + 128 phi; BiFPN width 64 * 1.35^phi = 35, cut to a multiple of 32; BiFPN depth 3 + phi;
    # head depth 3 + floor(phi / 3). The backbone is B0 cut to 0.45 of its width and 0.6 of its
    # depth, below what EfficientNet's rule gives (0.83 and 0.69), to stay under 1 M parameters.
    _entry("efficientdet_nano", "efficientnet_nano", 256, 32, 1, 2, 0.0),
]

efficientdet_model_param_dict: dict[str, dict[str, Any]] = {e["name"]: e for e in _ENTRIES}
efficientdet_model_param_dict["efficientdet_w0"]["backbone_args"]["feature_location"] = "depthwise"


def get_efficientdet_config(model_name: str = "tf_efficientdet_d1") -> DictConfig:
    """A fresh, writable config of the model called `model_name`.

    Raises:
        KeyError: no such model; the message names the closest ones.
    """
    if model_name not in efficientdet_model_param_dict:
        close = difflib.get_close_matches(str(model_name), efficientdet_model_param_dict, n=4)
        hint = f"; did you mean {', '.join(close)}?" if close else ""
        raise KeyError(
            f"model_name: got {model_name!r}, expected one of the"
            f" {len(efficientdet_model_param_dict)} keys of"
            f" effdet.config.model_config.efficientdet_model_param_dict{hint}"
        )
    config = default_detection_model_configs()
    config.update(copy.deepcopy(efficientdet_model_param_dict[model_name]))
    config.num_levels = config.max_level - config.min_level + 1
    return config
