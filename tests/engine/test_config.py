from __future__ import annotations

import pytest

from effdet.engine.config import TrainConfig


def test_the_default_rate_follows_the_batch_and_a_given_one_stays():
    assert TrainConfig("d", "o", batch_size=64).lr == pytest.approx(0.08)
    assert TrainConfig("d", "o", batch_size=64, lr=0.3).lr == 0.3


def test_roundtrip():
    config = TrainConfig("d", "o", epochs=3, optimizer="adamw")
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_settings_of_another_version_are_an_error():
    with pytest.raises(ValueError, match="unknown colour, shape"):
        TrainConfig.from_dict({"data": "d", "out": "o", "shape": 1, "colour": 2})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("epochs", 0),
        ("batch_size", 0),
        ("size", 31),
        ("pretrained", "voc"),
        ("optimizer", "adam"),
        ("lr", -0.1),
        ("lr", float("nan")),
        ("momentum", 1.0),
        ("weight_decay", -1.0),
        ("warmup_epochs", -1.0),
        ("clip_grad", -1.0),
        ("ema_decay", 1.0),
        ("scale_min", 0.0),
        ("scale_max", 0.05),
        ("amp", "fp8"),
        ("workers", -1),
        ("seed", -1),
        ("eval_every", -1),
        ("keep", -1),
        ("log_every", 0),
    ],
)
def test_each_setting_out_of_range_is_named(name, value):
    with pytest.raises(ValueError, match=f"{name}: got .*takes"):
        TrainConfig("d", "o", **{name: value})


def test_two_sorts_of_weights_to_start_from_are_one_too_many():
    with pytest.raises(ValueError, match="pretrained: got 'coco', takes '' with a checkpoint"):
        TrainConfig("d", "o", checkpoint="a.pth", pretrained="coco")
