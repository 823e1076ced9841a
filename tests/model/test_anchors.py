"""Anchors: counts, golden values, precision, other image sizes, bad arguments."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch

from effdet.anchors import Anchors, get_feat_sizes
from effdet.config import get_efficientdet_config
from effdet_kernels.ops.decode_topk import reference

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


def whole(anchors: Anchors, size) -> torch.Tensor:
    """All boxes that the grid of a size stands for, as ``boxes`` has them."""
    maps = [torch.empty(1, 1, *level) for level in anchors.level_sizes(size)]
    return reference.grid(*anchors.grid(size), maps).float()[:, [1, 0, 3, 2]]


@pytest.mark.parametrize("changes", [{}, {"anchor_scale": [4.0, 3.0, 5.0, 4.0, 2.5]}])
@pytest.mark.parametrize("size", [(128, 192), (512, 512), (100, 333), (33, 7), (1000, 1537)])
def test_the_grid_stands_for_the_boxes(size, changes):
    bits = {"rtol": 0, "atol": 0} if size[0] % 128 == 0 else {"rtol": 2**-23, "atol": 1e-12}
    for anchors in (make(size, **changes), make(**changes)):
        first, strides = anchors.grid(size)
        assert (first.shape, strides.shape) == ((5, 9, 4), (5, 2))
        torch.testing.assert_close(whole(anchors, size), anchors.boxes_for(size), **bits)
        assert anchors.grid(size)[0] is first
    rows, columns = anchors.level_sizes(size)[0]
    assert strides[0].tolist() == [size[1] / columns, size[0] / rows]


def test_few_grids_are_kept():
    anchors = make()
    for side in range(8, 60):
        anchors.grid((side, side))
    assert len(anchors._grids) <= 8
    assert torch.equal(whole(anchors, (8, 8)), make((8, 8)).boxes)


def _assigned(anchors: Anchors) -> None:
    anchors.boxes = anchors.boxes + 1


def _written(anchors: Anchors) -> None:
    anchors.boxes[7, 2] += 1


def _moved(anchors: Anchors) -> None:
    anchors.boxes.data = anchors.boxes * 2


def _loaded(anchors: Anchors) -> None:
    anchors.load_state_dict({"boxes": anchors.boxes.flip(0)})


@pytest.mark.parametrize("change", [_assigned, _written, _moved, _loaded])
@pytest.mark.parametrize("used", [False, True])
def test_boxes_that_were_changed_are_no_grid(change, used):
    anchors = make()
    if used:
        assert anchors.grid((128, 192)) is not None
    change(anchors)
    for each in (anchors, copy.deepcopy(anchors), pickle.loads(pickle.dumps(anchors))):
        assert each.grid((128, 192)) is None
        assert torch.equal(whole(each, (64, 64)), make((64, 64)).boxes)
    anchors.load_state_dict(make().state_dict())
    assert torch.equal(whole(anchors, (128, 192)), anchors.boxes)


def test_the_same_boxes_loaded_copied_and_cast_stay_a_grid():
    anchors = make()
    for _ in range(2):
        for each in (
            anchors,
            copy.deepcopy(anchors),
            pickle.loads(pickle.dumps(anchors)),
            make().double().float().half(),
        ):
            assert torch.equal(whole(each, (128, 192)), make().boxes)
        anchors.load_state_dict(make().state_dict())


def test_boxes_are_compared_when_they_change_only(monkeypatch):
    anchors = make()
    calls = []
    generate = anchors._generate_boxes
    monkeypatch.setattr(anchors, "_generate_boxes", lambda: calls.append(1) or generate())
    for _ in range(3):
        anchors.grid((128, 192))
    anchors.load_state_dict(make().state_dict())
    for _ in range(3):
        anchors.grid((128, 192))
    assert len(calls) == 2


def test_tensors_without_values_or_versions_are_no_grid():
    assert make().to("meta").grid((128, 192)) is None
    with torch.inference_mode():
        assert make().grid((128, 192)) is None


def test_a_grid_made_in_inference_mode_serves_calls_with_gradients():
    anchors = make()
    with torch.inference_mode():
        grid = anchors.grid((128, 192))
    assert not any(t.is_inference() for t in grid)


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
