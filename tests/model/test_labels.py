"""AnchorLabeler: the form of its targets, what it accepts, what it refuses."""

from __future__ import annotations

import pytest
import torch

from effdet.anchors import AnchorLabeler, Anchors, decode_box_outputs

BOXES = torch.tensor([[8.0, 8, 60, 80], [60, 70, 120, 110], [-1, -1, -1, -1]])
CLASSES = torch.tensor([2.0, 1.0, -1.0])


@pytest.fixture
def labeler() -> AnchorLabeler:
    pairs = [(1.0, 1.0), (1.4, 0.7), (0.7, 1.4)]
    return AnchorLabeler(Anchors(3, 7, 3, pairs, 4.0, (128, 128)), num_classes=5)


def flat(levels: list[torch.Tensor], width: int) -> torch.Tensor:
    return torch.cat([level.reshape(level.shape[0], -1, width) for level in levels], dim=1)


def assert_same(first, second) -> None:
    for mine, other in zip(
        (*first[0], *first[1], first[2]), (*second[0], *second[1], second[2]), strict=True
    ):
        assert torch.equal(mine, other)


def test_form_of_the_targets(labeler):
    cls, box, positives = labeler.batch_label_anchors(BOXES[None], CLASSES[None])
    assert [tuple(level.shape) for level in cls] == [(1, s, s, 9) for s in (16, 8, 4, 2, 1)]
    assert [tuple(level.shape) for level in box] == [(1, s, s, 36) for s in (16, 8, 4, 2, 1)]
    assert {level.dtype for level in cls} == {torch.int64}
    assert {level.dtype for level in box} == {torch.float32}
    assert positives.shape == (1,) and positives.dtype == torch.float32
    assert positives == (flat(cls, 1) >= 0).sum()


def test_positives_decode_to_their_box(labeler):
    cls, box, _ = labeler.batch_label_anchors(BOXES[None], CLASSES[None])
    cls, box = flat(cls, 1)[0, :, 0], flat(box, 4)[0]
    decoded = decode_box_outputs(box, labeler.anchors.boxes)
    for row, label in ((0, 1), (1, 0)):
        mine = decoded[cls == label]
        torch.testing.assert_close(mine, BOXES[row].expand_as(mine), rtol=1e-4, atol=1e-4)
    assert (box[cls < 0] == 0).all()


def test_one_image_is_a_batch_of_one(labeler):
    cls, box, positives = labeler.label_anchors(BOXES, CLASSES)
    assert positives.ndim == 0 and cls[0].shape == (16, 16, 9) and box[0].shape == (16, 16, 36)
    batch = labeler.batch_label_anchors(BOXES[None], CLASSES[None])
    assert_same(([c[None] for c in cls], [b[None] for b in box], positives[None]), batch)


def test_a_list_is_a_padded_batch(labeler):
    padded = labeler.batch_label_anchors(torch.stack([BOXES, BOXES]), torch.stack([CLASSES] * 2))
    listed = labeler.batch_label_anchors([BOXES, BOXES[:2]], [CLASSES, CLASSES[:2]])
    assert_same(padded, listed)
    unfiltered = labeler.batch_label_anchors(
        [BOXES[:2], BOXES[:0]], [CLASSES[:2], CLASSES[:0]], filter_valid=False
    )
    assert unfiltered[2].tolist() == [padded[2][0].item(), 0]


def test_images_without_boxes(labeler):
    for boxes, classes in (
        (BOXES[None, :0], CLASSES[None, :0]),
        ([BOXES[:0]], [CLASSES[:0]]),
        (-torch.ones(1, 4, 4), -torch.ones(1, 4)),
    ):
        cls, box, positives = labeler.batch_label_anchors(boxes, classes)
        assert positives.tolist() == [0]
        assert (flat(cls, 1) == -1).all() and (flat(box, 4) == 0).all()


def test_half_precision_boxes_are_accepted(labeler):
    exact = labeler.batch_label_anchors(BOXES[None], CLASSES[None])
    half = labeler.batch_label_anchors(BOXES[None].half(), CLASSES[None].int())
    assert_same(exact, half)


def test_unfiltered_rows_keep_their_class(labeler):
    classes = torch.tensor([[2, -1, 3]])
    boxes = torch.cat([BOXES[:2], torch.tensor([[0.0, 90, 30, 120]])])[None]
    filtered, _, _ = labeler.batch_label_anchors(boxes, classes)
    everything, _, _ = labeler.batch_label_anchors(boxes, classes, filter_valid=False)
    assert set(flat(filtered, 1).unique().tolist()) == {-1, 1, 2}
    assert set(flat(everything, 1).unique().tolist()) == {-2, -1, 1, 2}


def test_another_image_size(labeler):
    cls, box, positives = labeler.batch_label_anchors(
        BOXES[None], CLASSES[None], image_size=(128, 200)
    )
    assert cls[0].shape == (1, 16, 25, 9) and box[-1].shape == (1, 1, 2, 36)
    other = AnchorLabeler(Anchors(3, 7, 3, labeler.anchors.aspect_ratios, 4.0, (128, 200)), 5)
    assert_same((cls, box, positives), other.batch_label_anchors(BOXES[None], CLASSES[None]))


@pytest.mark.parametrize(
    ("boxes", "classes", "named"),
    [
        (BOXES[None], CLASSES[None, :2], "gt_boxes and gt_classes"),
        (BOXES, CLASSES, "gt_boxes and gt_classes"),
        ([BOXES], CLASSES[None], "both be tensors"),
        ([BOXES, BOXES], [CLASSES], "one of each per image"),
        ([BOXES[:2]], [CLASSES], "one of each per image"),
        (BOXES[None], CLASSES[None] + 4, "1 to 5"),
        (BOXES[None] / 0, CLASSES[None], "gt_boxes.*finite"),
    ],
)
def test_bad_ground_truth_is_refused(labeler, boxes, classes, named):
    with pytest.raises(ValueError, match=named):
        labeler.batch_label_anchors(boxes, classes)
