"""Matching rules of label_anchors, by hand: claims, ties, padding, degenerate boxes."""

from __future__ import annotations

import math

import pytest
import torch

from effdet_kernels import label_anchors
from effdet_kernels.ops.label_anchors import reference
from effdet_kernels.ops.label_anchors.spec import _pyramid

# Four 8x8 anchors in a row, at x = 0, 8, 16, 24.
ROW = torch.tensor([[x, 0.0, x + 8, 8.0] for x in (0.0, 8.0, 16.0, 24.0)])


def label(boxes, classes, **options):
    """Class targets, codes and the count for one image of boxes on ROW."""
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(1, -1, 4)
    classes, codes, count = label_anchors(boxes, torch.tensor([classes]), ROW, **options)
    return classes[0].tolist(), codes[0], float(count[0])


def test_match_at_exactly_the_threshold():
    double = [0.0, 0.0, 16.0, 8.0]  # IoU 1/2 with anchors 0 (which it claims) and 1
    assert label([double], [3])[0] == [2, 2, -1, -1]
    assert label([double], [3], match_threshold=0.51)[0] == [2, -1, -1, -1]
    halves = [4.0, 0.0, 20.0, 8.0]  # IoU 1/2 with anchor 1, 1/5 with its neighbours
    assert label([halves], [3])[0] == [-1, 2, -1, -1]
    assert label([halves], [3], match_threshold=0.19)[0] == [2, 2, 2, -1]


def test_a_box_claims_its_best_anchor_below_the_threshold():
    classes, _codes, count = label([[16.0, 0.0, 18.0, 2.0]], [7])
    assert classes == [-1, -1, 6, -1]
    assert count == 1


def test_a_claim_overrides_a_better_match():
    small, exact = [0.0, 0.0, 4.0, 4.0], [0.0, 0.0, 8.0, 8.0]
    assert label([small, exact], [1, 2])[0] == [0, -1, -1, -1]  # both claim anchor 0: the first box


def test_of_two_claims_the_first_box_wins():
    boxes = [[24.0, 0.0, 28.0, 8.0], [24.0, 0.0, 32.0, 8.0]]
    assert label(boxes, [1, 2])[0][3] == 0
    assert label(boxes[::-1], [2, 1])[0][3] == 1


def test_of_equal_anchors_the_first_is_claimed():
    astride = [4.0, 0.0, 12.0, 8.0]  # IoU 1/3 with anchors 0 and 1
    assert label([astride], [9])[0] == [8, -1, -1, -1]


def test_a_box_that_meets_no_anchor_claims_the_first():
    classes, codes, _count = label([[100.0, 100.0, 108.0, 116.0]], [1])
    assert classes == [0, -1, -1, -1]
    expected = torch.tensor([(108 - 4) / 8, (104 - 4) / 8, math.log(2), 0])
    torch.testing.assert_close(codes[0], expected)


def test_a_box_of_zero_area_has_a_finite_code():
    _classes, codes, count = label([[4.0, 4.0, 4.0, 4.0]], [1])
    assert count == 1
    assert codes.isfinite().all()
    torch.testing.assert_close(codes[0, 2:], torch.full((2,), math.log(1e-7 / 8)))


def test_padding_takes_part_in_nothing():
    with_padding = label([[8.0, 0.0, 16.0, 8.0], [0.0, 0.0, 8.0, 8.0]], [4, -1])
    assert with_padding[0] == label([[8.0, 0.0, 16.0, 8.0]], [4])[0] == [-1, 3, -1, -1]
    assert with_padding[2] == 1


def test_padding_may_hold_anything():
    assert label([[math.nan] * 4, [8.0, 0.0, 16.0, 8.0]], [-1, 4])[0] == [-1, 3, -1, -1]


def test_no_boxes_is_all_background():
    classes, codes, count = label([], [])
    assert classes == [-1] * 4
    assert not codes.any()
    assert count == 0


def test_classes_may_be_floating():
    boxes = torch.tensor([[[0.0, 0.0, 8.0, 8.0]]])
    assert label_anchors(boxes, torch.tensor([[2.0]]), ROW)[0][0, 0] == 1


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_real_box_must_be_finite(value):
    with pytest.raises(ValueError, match=r"label_anchors: gt_boxes: .*finite"):
        label([[0.0, 0.0, value, 8.0]], [1])


def crowd(anchors, batch, count, seed):
    """Boxes near anchors, exact copies of them, some twice, some between two anchors, some that meet none; padding."""
    g = torch.Generator().manual_seed(seed)
    at = torch.randint(len(anchors), (batch, count), generator=g)
    boxes = anchors[at] + torch.randint(-3, 4, (batch, count, 4), generator=g).to(anchors.dtype)
    kind = torch.randint(6, (batch, count), generator=g)[..., None]
    shift = torch.tensor([4.0, 0.0, 4.0, 0.0], dtype=anchors.dtype)
    boxes = torch.where(kind == 0, anchors[at], boxes)
    boxes = torch.where(kind == 1, anchors[at] + shift, boxes)
    boxes = torch.where(kind == 2, boxes.roll(1, 1), boxes)
    boxes = torch.where((kind == 3) & (at[..., None] % 8 == 0), boxes + 4000, boxes)
    classes = torch.randint(0, 90, (batch, count), generator=g)
    return boxes, torch.where(classes < 9, -1, classes.clamp(min=1))


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.5, 2.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [1, 5])
def test_targets_of_a_crowd_are_the_reference_s(batch, dtype, threshold):
    anchors = _pyramid(512).to(dtype)
    boxes, classes = crowd(anchors, batch, 60, seed=batch)
    expected = reference.label_anchors(boxes, classes, anchors, threshold)
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(label_anchors(boxes, classes, anchors, match_threshold=threshold))
    finally:
        torch.set_num_threads(before)
    for labels, codes, positives in found:
        assert torch.equal(labels, expected[0])
        assert torch.equal(codes[..., :2], expected[1][..., :2])
        torch.testing.assert_close(codes[..., 2:], expected[1][..., 2:])  # logarithms
        assert torch.equal(positives, expected[2])
    assert torch.equal(found[0][1], found[1][1])


def test_tiny_and_huge_boxes_are_the_reference_s():
    for scale in (1e-21, 1e-18, 1e15):
        anchors = _pyramid(64)[:500].float() * scale
        boxes, classes = crowd(anchors / scale, 2, 20, seed=3)
        boxes = boxes * scale
        expected = reference.label_anchors(boxes, classes, anchors, 0.5)
        labels, _codes, positives = label_anchors(boxes, classes, anchors)
        assert torch.equal(labels, expected[0])
        assert torch.equal(positives, expected[2])


def test_a_class_that_is_no_number_is_padding():
    boxes = torch.full((1, 2, 4), math.nan)
    boxes[0, 1] = ROW[1]
    labels, _codes, positives = label_anchors(boxes, torch.tensor([[math.nan, 3.0]]), ROW)
    assert labels.tolist() == [[-1, 2, -1, -1]]
    assert positives == 1


def test_anchors_that_are_no_numbers_meet_nothing():
    anchors = torch.cat([torch.full((1, 4), math.nan), ROW])
    labels, _codes, positives = label_anchors(ROW[None, 2:3], torch.tensor([[3]]), anchors)
    assert labels.tolist() == [[-1, -1, -1, 2, -1]]
    assert positives == 1
