"""create_model, create_model_from_config and reset_head."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import effdet.backbone.timm_models as timm_models
from effdet import (
    DetBenchPredict,
    DetBenchTrain,
    EfficientDet,
    create_model,
    get_efficientdet_config,
    unwrap_bench,
)
from effdet.backbone import create_backbone
from effdet.efficientdet import HeadNet


def nano(**kwargs: Any) -> nn.Module:
    return create_model("efficientdet_nano", pretrained_backbone=False, **kwargs)


@pytest.mark.parametrize(
    ("task", "kind"), [("", EfficientDet), ("train", DetBenchTrain), ("predict", DetBenchPredict)]
)
def test_bench_tasks(task: str, kind: type) -> None:
    assert type(nano(bench_task=task)) is kind
    assert isinstance(unwrap_bench(nano(bench_task=task)), EfficientDet)


def test_training_bench_labels_only_if_asked() -> None:
    assert nano(bench_task="train").anchor_labeler is None
    assert nano(bench_task="train", bench_labeler=True).anchor_labeler is not None


def test_overrides_reach_the_config() -> None:
    overrides = {
        "redundant_bias": False,
        "label_smoothing": 0.1,
        "legacy_focal": True,
        "jit_loss": False,
        "soft_nms": True,
        "max_det_per_image": 7,
        "max_detection_points": 50,
        "image_size": (128, 192),
    }
    config = nano(**overrides).config
    assert {key: config[key] for key in overrides} == overrides
    assert nano(bench_task="predict", **overrides).max_detection_points == 50


def test_an_integer_image_size_is_a_square() -> None:
    assert tuple(nano(image_size=192).config.image_size) == (192, 192)


def test_unknown_names_are_answered_with_the_closest() -> None:
    with pytest.raises(KeyError, match="tf_efficientdet_d0"):
        create_model("tf_eficientdet_d0")
    with pytest.raises(TypeError, match=r"max_detection_point'.*max_detection_points"):
        nano(max_detection_point=5)
    with pytest.raises(ValueError, match=r"bench_task.*'eval'"):
        nano(bench_task="eval")


def test_num_classes_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="num_classes"):
        nano(num_classes=0)


def test_new_number_of_classes_keeps_the_rest() -> None:
    torch.manual_seed(0)
    one = nano()
    torch.manual_seed(0)
    other = nano(num_classes=3)
    assert other.config.num_classes == 3
    assert other.class_net.predict.conv_pw.out_channels == 27
    for part in ("backbone", "fpn", "box_net"):
        ours, theirs = getattr(one, part).state_dict(), getattr(other, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_reset_head() -> None:
    model = nano()
    class_net, box_net = model.class_net, model.box_net
    model.reset_head()
    assert (model.class_net, model.box_net) == (class_net, box_net)
    model.reset_head(num_classes=5)
    assert model.class_net is not class_net and model.box_net is box_net
    assert model.class_net.predict.conv_pw.out_channels == 5 * 9
    model.reset_head(aspect_ratios=[(1.0, 1.0)], num_scales=2)
    assert model.class_net.predict.conv_pw.out_channels == 5 * 2
    assert model.box_net.predict.conv_pw.out_channels == 4 * 2
    cls, box = model.eval()(torch.zeros(1, 3, 64, 64))
    assert (cls[0].shape[1], box[0].shape[1]) == (10, 8)
    with pytest.raises(ValueError, match="num_classes"):
        model.reset_head(num_classes=-1)
    assert model.config.num_classes == 5


def test_a_new_head_is_like_the_old_one_and_touches_no_other_mode() -> None:
    model = nano().double().eval()
    model.backbone.train()
    model.reset_head(num_classes=5, num_scales=1)
    assert model.backbone.training
    for head in (model.class_net, model.box_net):
        assert not any(module.training for module in head.modules())
        assert {p.dtype for p in head.parameters()} == {torch.float64}


def test_a_new_class_head_predicts_the_prior() -> None:
    model = nano(num_classes=4)
    bias = model.class_net.predict.conv_pw.bias
    assert torch.allclose(bias.sigmoid(), torch.tensor(0.01))
    assert torch.count_nonzero(model.box_net.predict.conv_pw.bias) == 0


def test_head_net_takes_the_arguments_of_old_programs() -> None:
    config = get_efficientdet_config("efficientdet_nano")
    config.num_classes = 2
    head = HeadNet(config, num_outputs=2, norm_kwargs={"eps": 0.01, "momentum": 0.2})
    norms = [m for m in head.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in norms} == {(0.01, 0.2)}
    model = EfficientDet(config, pretrained_backbone=False)
    model.class_net = HeadNet(config, num_outputs=2)
    assert model(torch.zeros(2, 3, 64, 64))[0][0].shape == (2, 18, 8, 8)


def test_default_config_without_backbone_args_builds() -> None:
    from effdet.config import default_detection_model_configs

    model = EfficientDet(default_detection_model_configs(), pretrained_backbone=False)
    assert len(model.fpn.cell) == 3
    assert model.backbone.feature_info.channels() == [40, 112, 320]


def test_imagenet_weights_without_timm_warn_once_and_go_on(monkeypatch: Any) -> None:
    monkeypatch.setattr(timm_models, "import_timm", lambda: None)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        create_model("efficientdet_nano")
    messages = [str(w.message) for w in caught if "timm" in str(w.message)]
    assert len(messages) == 1
    assert "pretrained_backbone=False to silence" in messages[0]


def test_backbones_of_timm_say_how_to_get_it(monkeypatch: Any) -> None:
    monkeypatch.setattr(timm_models, "import_timm", lambda: None)
    with pytest.raises(ImportError, match=r'resnet50.*pip install "effdet-kernels\[timm\]"'):
        create_model("resdet50", pretrained_backbone=False)
    with pytest.raises(ImportError, match="tf_efficientnet_b0"):
        create_backbone("tf_eficientnet_b0")
