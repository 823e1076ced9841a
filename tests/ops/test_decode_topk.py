"""Selection and decoding of decode_topk, by hand."""

from __future__ import annotations

import math

import torch

from effdet_kernels import decode_topk

ANCHORS = torch.tensor([[0.0, 0.0, 8.0, 4.0], [8.0, 0.0, 16.0, 4.0]])


def inputs(logits, codes=(0.0, 0.0, 0.0, 0.0)):
    """One level of two locations, one anchor each, three classes: logits [2, 3] by location."""
    cls = torch.tensor(logits, dtype=torch.float32).T.reshape(1, 3, 1, 2)
    box = torch.tensor(codes, dtype=torch.float32).reshape(1, 4, 1, 1).expand(1, 4, 1, 2)
    return [cls], [box], ANCHORS


def picks(logits, k):
    _boxes, values, anchor, classes = decode_topk(*inputs(logits), num_classes=3, k=k)
    return values[0].tolist(), list(zip(anchor[0].tolist(), classes[0].tolist(), strict=True))


def test_an_anchor_may_appear_for_several_classes():
    assert picks([[1, 5, 3], [4, 0, 2]], 3) == ([5, 4, 3], [(0, 1), (1, 0), (0, 2)])


def test_more_wanted_than_there_are_gives_all():
    values, pairs = picks([[1, 5, 3], [4, 0, 2]], 100)
    assert values == [5, 4, 3, 2, 1, 0]
    assert len(set(pairs)) == 6


def test_equal_logits_come_in_order_of_anchor_and_class_also_at_the_cut():
    assert picks([[0, 0, 1], [1, 0, 0]], 4)[1] == [(0, 2), (1, 0), (0, 0), (0, 1)]


def test_nan_is_shown_first():
    values, pairs = picks([[0, 9, 1], [1, 0, math.nan]], 2)
    assert math.isnan(values[0])
    assert pairs == [(1, 2), (0, 1)]


def test_decoding_and_clipping():
    codes = (0.5, -0.25, math.log(3), math.log(2))  # ty, tx, th, tw
    arguments = {"num_classes": 3, "k": 1}
    boxes = decode_topk(*inputs([[9, 0, 0], [0, 0, 0]], codes), **arguments)[0]
    # Centre (4 - 0.25 * 8, 2 + 0.5 * 4), size (16, 12).
    torch.testing.assert_close(boxes[0, 0], torch.tensor([-6.0, -2.0, 10.0, 10.0]))
    limits = torch.tensor([[9.0, 7.0]])
    boxes = decode_topk(*inputs([[9, 0, 0], [0, 0, 0]], codes), **arguments, limits=limits)[0]
    torch.testing.assert_close(boxes[0, 0], torch.tensor([0.0, 0.0, 9.0, 7.0]))


def test_levels_and_anchors_are_numbered_as_anchors_are():
    """Level, row, column, anchor: the index of the only high logit, placed by hand."""
    sizes, per_location, classes = [(2, 3), (1, 2)], 2, 4
    total = per_location * 8
    anchors = torch.rand(total, 4)
    for level, row, column, anchor, expected in [(0, 1, 2, 1, 11), (1, 0, 1, 0, 14)]:
        cls = [torch.zeros(1, per_location * classes, *size) for size in sizes]
        cls[level][0, anchor * classes + 3, row, column] = 1
        box = [torch.zeros(1, per_location * 4, *size) for size in sizes]
        _boxes, _logits, index, label = decode_topk(cls, box, anchors, num_classes=classes, k=1)
        assert (int(index), int(label)) == (expected, 3)


def test_gradients_reach_only_what_was_picked():
    cls, box, anchors = inputs([[1, 5, 3], [4, 0, 2]])
    cls[0].requires_grad_()
    decode_topk(cls, box, anchors, num_classes=3, k=2)[1].sum().backward()
    assert cls[0].grad.reshape(3, 2).T.tolist() == [[0, 1, 0], [1, 0, 0]]


def test_half_precision_logits_keep_their_dtype_and_boxes_are_float32():
    cls, box, anchors = inputs([[1, 5, 3], [4, 0, 2]])
    boxes, logits, *_ = decode_topk(
        [cls[0].bfloat16()], [box[0].bfloat16()], anchors, num_classes=3, k=2
    )
    assert (boxes.dtype, logits.dtype) == (torch.float32, torch.bfloat16)
