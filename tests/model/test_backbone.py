"""Backbones: what they return, how they are built, and the rules behind the tables."""

from __future__ import annotations

import math
import sys
import types
from typing import Any

import pytest
import torch
from torch import nn

import effdet.backbone.timm_models as timm_models
from effdet.backbone import SPECS, create_backbone
from effdet.backbone.blocks import Block, DropPath, InvertedResidual, MixedConv2d, SqueezeExcite
from effdet.backbone.specs import round_channels
from effdet.efficientdet import get_feature_info

SMALL = [
    "tf_efficientnet_b0",
    "efficientnet_lite0",
    "efficientnet_es",
    "efficientnetv2_rw_t",
    "mobilenetv2_110d",
    "mobilenetv3_large_100",
    "mixnet_m",
    "efficientnet_nano",
]


@pytest.mark.parametrize("name", SMALL)
def test_maps_are_what_feature_info_says(name: str) -> None:
    backbone = create_backbone(name, out_indices=(0, 1, 2, 3, 4)).eval()
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 65, 97))
    info = get_feature_info(backbone)
    assert [i["reduction"] for i in info] == [2, 4, 8, 16, 32]
    for feature, y in zip(info, maps, strict=True):
        stride = feature["reduction"]
        expected = (1, feature["num_chs"], math.ceil(65 / stride), math.ceil(97 / stride))
        assert y.shape == expected


@pytest.mark.parametrize("name", SMALL)
def test_wide_features_are_the_gated_maps_before_the_projection(name: str) -> None:
    if name == "mobilenetv3_large_100":
        pytest.skip("its last stage has no projection")
    torch.manual_seed(0)
    backbone = create_backbone(name, feature_location="expansion").eval()
    last = [backbone.blocks[int(i["module"].split(".")[1])][-1] for i in backbone.feature_info.info]
    with torch.no_grad():
        maps = backbone(torch.randn(1, 3, 64, 64))
    assert [y.shape[1] for y in maps] == backbone.feature_info.channels()
    assert all(y.shape[1] == block.bn1.num_features for y, block in zip(maps, last, strict=True))
    same = create_backbone(name, feature_location="depthwise")
    assert same.feature_info.get_dicts() == backbone.feature_info.get_dicts()


def test_squeeze_excite_multiplies_by_gates_of_the_means() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("tf_efficientnet_b0").eval()
    block = backbone.blocks[1][0]
    assert isinstance(block, InvertedResidual) and isinstance(block.se, SqueezeExcite)
    x = torch.randn(2, 16, 20, 30)
    wide, gate = block.expand(x)
    se = block.se
    pooled = wide.mean((2, 3), keepdim=True)
    hidden = nn.functional.silu(se.conv_reduce(pooled))
    expected = torch.sigmoid(se.conv_expand(hidden)).flatten(1)
    torch.testing.assert_close(gate, expected)
    projected = block.bn3(block.conv_pwl(wide * gate[:, :, None, None]))
    torch.testing.assert_close(block.project(wide, gate, x), projected)


def test_mixed_convolutions_share_the_channels() -> None:
    mixed = MixedConv2d(10, 7, (1, 1, 1))
    assert mixed.in_splits == [4, 3, 3]
    assert [conv.out_channels for conv in mixed.values()] == [3, 2, 2]
    assert list(mixed.state_dict()) == ["0.weight", "1.weight", "2.weight"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [(16 * 1.1, 16), (24 * 1.1, 24), (40 * 1.2, 48), (32 * 0.45, 16), (10.8, 16), (3, 8)],
)
def test_rounding_of_channels(value: float, expected: int) -> None:
    rounded = round_channels(value)
    assert rounded == expected and rounded % 8 == 0 and rounded >= 0.9 * value


def test_drop_path_rate_grows_linearly_over_the_blocks() -> None:
    backbone = create_backbone("tf_efficientnet_b0", drop_path_rate=0.2)
    blocks = [m for m in backbone.modules() if isinstance(m, Block)]
    paths = [b.drop_path for b in blocks]
    rates = [p.drop_prob if isinstance(p, DropPath) else 0.0 for p in paths]
    assert len(rates) == 16
    assert rates == pytest.approx([0.2 * i / 16 for i in range(16)])


def test_drop_path_keeps_the_mean() -> None:
    torch.manual_seed(0)
    y = DropPath(0.25)(torch.ones(4000, 2, 1, 1))
    assert y.unique().tolist() == pytest.approx([0.0, 1 / 0.75])
    assert torch.equal(y[:, 0], y[:, 1])
    kept = (y[:, 0] > 0).double().mean().item()
    assert abs(kept - 0.75) < 5 * math.sqrt(0.75 * 0.25 / 4000)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_norms_and_padding_follow_the_origin_of_the_weights(name: str) -> None:
    with torch.device("meta"):
        backbone = create_backbone(name)
    tensorflow = name.startswith("tf_") or name == "efficientnet_nano"
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(n.eps, n.momentum) for n in norms} == {(1e-3 if tensorflow else 1e-5, 0.1)}
    assert backbone.pad_type == ("same" if tensorflow else "")


@pytest.mark.parametrize("indices", [(5,), (2, 3, 9), (-6,)])
def test_wrong_indices_are_named(indices: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"out_indices.*strides 2, 4, 8, 16, 32"):
        create_backbone("efficientnet_nano", out_indices=indices)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="drop_rate_path"):
        create_backbone("efficientnet_nano", drop_rate_path=0.1)


def fake_timm(models: dict[str, nn.Module]) -> types.ModuleType:
    """A stand-in for timm that knows `models`."""
    timm = types.ModuleType("timm")
    timm.is_model = models.__contains__
    timm.create_model = lambda name, **kwargs: models[name]
    return timm


def test_imagenet_weights_come_from_timm(monkeypatch: Any) -> None:
    source = create_backbone("efficientnet_nano")
    source.classifier = nn.Linear(2, 2)
    monkeypatch.setitem(sys.modules, "timm", fake_timm({"efficientnet_nano": source}))
    backbone = create_backbone("efficientnet_nano", pretrained=True)
    for key, value in backbone.state_dict().items():
        assert torch.equal(value, source.state_dict()[key])


def test_imagenet_weights_that_do_not_fit_are_named(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "timm", fake_timm({"efficientnet_nano": nn.Linear(1, 1)}))
    with pytest.raises(RuntimeError, match=r"efficientnet_nano.*backbone|blocks"):
        create_backbone("efficientnet_nano", pretrained=True)


def test_other_backbones_come_from_timm(monkeypatch: Any) -> None:
    other = nn.Linear(1, 1)
    monkeypatch.setitem(sys.modules, "timm", fake_timm({"resnet50": other}))
    assert create_backbone("resnet50") is other
    with pytest.raises(ValueError, match=r"resnet51.*neither effdet nor timm"):
        create_backbone("resnet51")


def test_a_broken_timm_is_not_taken_for_a_missing_one(monkeypatch: Any) -> None:
    def broken(name: str) -> None:
        raise ModuleNotFoundError("No module named 'torchvision'", name="torchvision")

    monkeypatch.setattr(timm_models.importlib, "import_module", broken)
    with pytest.raises(ModuleNotFoundError, match="torchvision"):
        timm_models.import_timm()
