"""Anchors: counts, golden values, precision, other image sizes, bad arguments."""

from __future__ import annotations

import copy
import math

import pytest
import torch

from effdet.anchors import Anchors, get_feat_sizes
from effdet.config import get_efficientdet_config

PAIRS = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]


def make(image_size=(128, 192), **changes) -> Anchors:
    arguments = {
        "min_level": 3,
        "max_level": 7,
        "num_scales": 3,
        "aspect_ratios": PAIRS,
        "anchor_scale": 4.0,
    }
    return Anchors(**arguments | changes, image_size=image_size)


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("tf_efficientdet_d0", 49104),
        ("tf_efficientdet_d3", 150381),
        ("tf_efficientdet_d7x", 442260),
        ("tf_efficientdet_lite0", 19206),
        ("efficientdet_lite0", 27621),
    ],
)
def test_published_counts(name, count):
    anchors = Anchors.from_config(get_efficientdet_config(name))
    assert anchors.boxes.shape == (count, 4)
    assert anchors.get_anchors_per_location() == 9


def test_first_boxes_of_d0():
    boxes = make((512, 512)).boxes
    expected = [[-12, -12, 20, 20], [-7.2, -18.4, 15.2, 26.4], [-18.4, -7.2, 26.4, 15.2]]
    torch.testing.assert_close(boxes[:3], torch.tensor(expected))


def test_number_as_aspect_ratio_is_its_square_root_both_ways():
    box = make(aspect_ratios=[2.0], num_scales=1).boxes[0].tolist()
    assert box[2] - box[0] == pytest.approx(32 / math.sqrt(2))
    assert box[3] - box[1] == pytest.approx(32 * math.sqrt(2))


def test_order_is_level_row_column_octave_aspect():
    boxes = make().boxes.view(-1, 9, 4)
    centers = (boxes[..., :2] + boxes[..., 2:]) / 2
    torch.testing.assert_close(centers[0, 0], torch.tensor([4.0, 4.0]))
    torch.testing.assert_close(centers[1, 0], torch.tensor([4.0, 12.0]))
    torch.testing.assert_close(centers[24, 0], torch.tensor([12.0, 4.0]))
    torch.testing.assert_close(centers[16 * 24, 0], torch.tensor([8.0, 8.0]))
    height = boxes[0, :, 2] - boxes[0, :, 0]
    torch.testing.assert_close(height[3] / height[0], torch.tensor(2 ** (1 / 3)))


@pytest.mark.parametrize("size", [1, 2, 33, 100, 127, 129, 333, 640])
def test_one_location_per_feature_map_element(size):
    sizes = get_feat_sizes((size, size + 7), 7)[3:]
    assert make((size, size + 7)).boxes.shape[0] == sum(9 * h * w for h, w in sizes)


def test_anchors_stay_float32():
    anchors = make()
    exact = anchors.boxes.clone()
    for cast in (anchors.half, anchors.bfloat16, anchors.double, anchors.float):
        cast()
        assert anchors.boxes.dtype == torch.float32
        assert torch.equal(anchors.boxes, exact)


def test_state_dict_has_the_boxes_only():
    anchors = make()
    anchors.boxes_for((64, 64))
    assert list(anchors.state_dict()) == ["boxes"]


def test_boxes_for_another_size():
    anchors = make()
    assert anchors.boxes_for(torch.Size((128, 192))) is anchors.boxes
    other = anchors.boxes_for((64, 320))
    assert torch.equal(other, make((64, 320)).boxes)
    assert anchors.boxes_for((64, 320)) is other
    assert anchors.level_sizes((64, 320))[0] == (8, 40)
    assert torch.equal(copy.deepcopy(anchors).boxes_for((64, 320)), other)


def test_boxes_for_many_sizes_keeps_few():
    anchors = make()
    for side in range(8, 60):
        anchors.boxes_for((side, side))
    assert len(anchors._other_sizes) <= 8
    assert torch.equal(anchors.boxes_for((8, 8)), make((8, 8)).boxes)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"min_level": 5, "max_level": 4}, "min_level"),
        ({"num_scales": 0}, "num_scales"),
        ({"aspect_ratios": []}, "aspect_ratios"),
        ({"anchor_scale": [4.0, 4.0]}, "anchor_scale"),
        ({"image_size": (0, 64)}, "image_size"),
        ({"image_size": (64, 64, 3)}, "image_size"),
    ],
)
def test_bad_arguments_are_named(changes, named):
    with pytest.raises(ValueError, match=named):
        make(**changes)
