"""Lists of boxes and of masks: what PyPI effdet's cannot do, masks, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from effdet.evaluation import np_box_list as boxes_of
from effdet.evaluation import np_mask_list as masks_of
from effdet.evaluation.np_box_list import BoxList
from effdet.evaluation.np_mask_list import MaskList

CORNERS = np.array([[0, 0, 4, 4], [1, 1, 3, 5], [10, 10, 12, 12], [0, 0, 4, 4.2]])
SCORES = np.array([0.5, 0.9, 0.1, 0.7])


@pytest.fixture
def boxes() -> BoxList:
    made = BoxList(CORNERS)
    made.add_field("scores", SCORES)
    return made


@pytest.fixture
def masks() -> MaskList:
    """Three masks of 4 × 4 pixels: the left half, the upper row, one pixel below right."""
    drawn = np.zeros((3, 4, 4), dtype=np.uint8)
    drawn[0, :, :2] = drawn[1, :1] = drawn[2, 3:, 3:] = 1
    made = MaskList(CORNERS[:3], drawn)
    made.add_field("scores", np.array([0.5, 0.9, 0.1]))
    return made


def test_fields(boxes):
    assert boxes.num_boxes() == 4 and boxes.get() is CORNERS
    assert boxes.get_extra_fields() == ["scores"] and boxes.has_field("boxes")
    assert [part.tolist() for part in boxes.get_coordinates()] == CORNERS.T.tolist()
    with pytest.raises(ValueError, match="'weights'; takes one of boxes, scores"):
        boxes.get_field("weights")
    with pytest.raises(ValueError, match="'scores' exists already"):
        boxes.add_field("scores", SCORES)
    with pytest.raises(ValueError, match=r"takes \[4, ...\]"):
        boxes.add_field("weights", SCORES[:2])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (CORNERS.tolist(), r"data: got list; takes a numpy array \[n, 4\]"),
        (CORNERS[0], r"shape \(4,\)"),
        (CORNERS[:, :3], r"shape \(4, 3\)"),
        (CORNERS.astype(int), "got int64; takes floats"),
        (CORNERS[:, ::-1].copy(), "negative side"),
    ],
)
def test_no_boxes(data, message):
    with pytest.raises(ValueError, match=message):
        BoxList(data)


def test_clipping_leaves_out_what_has_no_area(boxes):
    clipped = boxes_of.clip_to_window(boxes, [0, 0, 3, 3])
    assert clipped.get().tolist() == [[0, 0, 3, 3], [1, 1, 3, 3], [0, 0, 3, 3]]
    assert clipped.get_field("scores").tolist() == [0.5, 0.9, 0.7]
    kept = boxes_of.clip_to_window(boxes, [0, 0, 3, 3], filter_nonoverlapping=False)
    assert kept.num_boxes() == 4


def test_bounds_are_inside_the_window_and_not_above_the_score(boxes):
    kept, numbers = boxes_of.prune_outside_window(boxes, [0, 0, 4, 4.1])
    assert numbers.tolist() == [0] and kept.get_field("scores").tolist() == [0.5]
    assert boxes_of.prune_outside_window(boxes, [0, 0, 4, 5])[1].tolist() == [0, 1, 3]
    assert boxes_of.filter_scores_greater_than(boxes, 0.5).get_field("scores").tolist() == [
        0.9,
        0.7,
    ]


def test_pruning_by_the_covered_share(boxes):
    """The cover holds 8/16, 4/8, 0/4 and 8/16.8 of the boxes."""
    cover = BoxList(np.array([[0.0, 0, 2, 4], [20, 20, 30, 30]]))
    kept = boxes_of.prune_non_overlapping_boxes(boxes, cover, 0.49)
    assert kept.get_field("scores").tolist() == [0.5]
    assert boxes_of.prune_non_overlapping_boxes(boxes, cover, 0.5).num_boxes() == 1
    assert boxes_of.prune_non_overlapping_boxes(boxes, cover, 0.3).num_boxes() == 3
    assert boxes_of.prune_non_overlapping_boxes(boxes, cover).num_boxes() == 4


def test_concatenation(boxes, masks):
    joined = boxes_of.concatenate_boxlist([boxes, boxes])
    assert joined.get().tolist() == CORNERS.tolist() * 2
    assert joined.get_field("scores").tolist() == SCORES.tolist() * 2
    assert boxes_of.concatenate_boxlist([boxes, boxes], []).get_extra_fields() == []
    joined = masks_of.concatenate_masklist([masks, masks], ["scores"])
    assert joined.get_masks().shape == (6, 4, 4) and joined.has_field("scores")
    assert masks_of.concatenate_masklist([masks], []).get_extra_fields() == ["masks"]
    with pytest.raises(ValueError, match="there is no 'scores'"):
        boxes_of.concatenate_boxlist([boxes, BoxList(CORNERS)])


def test_empty_lists(boxes, masks):
    nothing = boxes_of.gather_boxlist(boxes, np.zeros(0, dtype=int))
    assert boxes_of.iou_boxlist(nothing, boxes).shape == (0, 4)
    assert boxes_of.ioa_boxlist(boxes, nothing).shape == (4, 0)
    for threshold in (0.5, 1.0):
        assert boxes_of.non_max_suppression(nothing, 9, threshold).num_boxes() == 0
    assert boxes_of.multi_class_non_max_suppression(boxes, 2.0, 0.5, 9).num_boxes() == 0
    assert boxes_of.multi_class_non_max_suppression(boxes, 0.0, 0.5, 0).num_boxes() == 0
    assert boxes_of.prune_non_overlapping_boxes(boxes, nothing).num_boxes() == 0
    no_masks = masks_of.gather_masklist(masks, np.zeros(0, dtype=int))
    assert masks_of.iou_masklist(no_masks, masks).shape == (0, 3)
    assert masks_of.iou_masklist(masks, no_masks).shape == (3, 0)


def test_overlap_of_masks(masks):
    """Areas 8, 4, 1; the first two have 2 pixels in common."""
    assert masks_of.area_masklist(masks).tolist() == [8, 4, 1]
    assert masks_of.iou_masklist(masks, masks).tolist() == [
        pytest.approx(row) for row in ([1, 0.2, 0], [0.2, 1, 0], [0, 0, 1])
    ]
    two = masks_of.gather_masklist(masks, [0, 2])
    assert masks_of.intersection_masklist(masks, two).tolist() == [[8, 0], [2, 0], [0, 1]]
    assert masks_of.ioa_masklist(two, masks).tolist() == [[1, 0.5, 0], [0, 0, 1]]
    empty = np.zeros((1, 4, 4), dtype=np.uint8)
    assert masks_of.iou_mask(empty, empty).tolist() == [[0]]
    assert masks_of.ioa_mask(masks.get_masks(), empty).tolist() == [[0]] * 3


@pytest.mark.parametrize(("threshold", "scores"), [(0.19, [0.9, 0.1]), (0.21, [0.9, 0.5, 0.1])])
def test_suppression_of_masks(masks, threshold, scores):
    """The masks of the first two overlap by 1/5; their boxes are put where none overlap."""
    apart = MaskList(CORNERS[:3] + 50 * np.arange(3)[:, None], masks.get_masks())
    apart.add_field("scores", masks.get_field("scores"))
    kept = masks_of.non_max_suppression_mask(apart, iou_threshold=threshold)
    assert kept.get_field("scores").tolist() == scores
    assert kept.get_masks().sum(axis=(1, 2)).tolist() == [4, 8, 1] if len(scores) == 3 else [4, 1]
    many = MaskList(apart.get(), apart.get_masks())
    many.add_field("scores", np.stack([apart.get_field("scores"), np.full(3, 0.2)], axis=1))
    kept = masks_of.multi_class_non_max_suppression_mask(many, 0.05, threshold, 9)
    assert kept.get_field("scores").tolist() == [*scores[:-1], *[0.2] * len(scores), 0.1]
    assert kept.get_field("classes").tolist() == [
        *[0.0] * (len(scores) - 1),
        *[1.0] * len(scores),
        0.0,
    ]
    assert kept.get_masks().shape == (2 * len(scores), 4, 4)


def test_pruning_of_masks(masks):
    corner = masks_of.gather_masklist(masks, [2])
    upper = masks_of.gather_masklist(masks, [1])
    for share, scores in ((0.25, [0.5, 0.9]), (0.26, [0.9])):  # it covers 2/8 of the first
        pruned = masks_of.prune_non_overlapping_masklist(masks, upper, share)
        assert pruned.get_field("scores").tolist() == scores
    pruned = masks_of.prune_non_overlapping_masklist(masks, corner, 0.5)
    assert pruned.get_masks().tolist() == corner.get_masks().tolist()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (np.zeros((4, 4, 4)), "got float64"),
        (np.zeros((4, 4), dtype=np.uint8), r"takes a uint8 array \[n, height, width\]"),
        ([[[1]]], "got <class 'list'>"),
        (np.zeros((3, 4, 4), dtype=np.uint8), "got 3 masks for 4 boxes"),
    ],
)
def test_no_masks(data, message):
    with pytest.raises(ValueError, match=f"mask_data: .*{message}"):
        MaskList(CORNERS, data)


def test_bad_arguments(boxes, masks):
    cases = [
        (boxes_of.gather_boxlist, [np.array([4])], r"indices: got 4 to 4; takes 0..3"),
        (boxes_of.gather_boxlist, [np.array([-1])], "indices: got -1"),
        (boxes_of.sort_by_field_boxlist, ["boxes"], "field: 'boxes' is"),
        (boxes_of.sort_by_field_boxlist, ["scores", 3], "order: got 3"),
        (boxes_of.non_max_suppression, [9, 1.5], r"iou_threshold: got 1.5; takes \[0, 1\]"),
        (boxes_of.non_max_suppression, [-1], "max_output_size: got -1"),
        (boxes_of.multi_class_non_max_suppression, [0.1, -0.1, 9], "iou_threshold: got -0.1"),
        (masks_of.boxlist_to_masklist, [], "there is no 'masks'"),
    ]
    for function, arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            function(boxes, *arguments)
    for boxlists in ([], boxes, [boxes, 3]):
        with pytest.raises(ValueError, match="boxlists: "):
            boxes_of.concatenate_boxlist(boxlists)
    with pytest.raises(ValueError, match="boxlist: got int; takes a BoxList"):
        boxes_of.filter_scores_greater_than(3, 0.5)
    two_classes = BoxList(CORNERS)
    two_classes.add_field("scores", np.zeros((4, 2)))
    with pytest.raises(ValueError, match=r"boxlist: its scores are ndarray of shape \(4, 2\)"):
        boxes_of.filter_scores_greater_than(two_classes, 0.5)
    with pytest.raises(ValueError, match=r"masks2: of size \(5, 4\); takes that of masks1"):
        masks_of.iou_mask(masks.get_masks(), np.zeros((1, 5, 4), dtype=np.uint8))
