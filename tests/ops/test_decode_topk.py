"""Selection and decoding of decode_topk, by hand."""

from __future__ import annotations

import math

import pytest
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


SIZES = [(2, 3), (1, 2)]
FIRST = torch.tensor([[[-4.0, -2, 12, 6], [0, 0, 8, 4]], [[-9.0, -7, 25, 13], [1, 2, 3, 4]]])
STRIDES = torch.tensor([[100 / 13, 4.0], [100 / 7, 10.0]])  # x, y


def maps(per_location=2, classes=4):
    """Logits and codes of two images, on two levels, and how many anchors there are."""
    generator = torch.Generator().manual_seed(0)
    cls = [torch.randn(2, per_location * classes, *size, generator=generator) for size in SIZES]
    box = [torch.randn(2, per_location * 4, *size, generator=generator) for size in SIZES]
    return cls, box, per_location * 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_anchors_of_a_grid_are_the_first_ones_moved(dtype):
    cls, box, total = maps()
    box = [torch.zeros_like(level) for level in box]
    anchors, strides = FIRST.to(dtype), STRIDES.to(dtype)
    options = {"num_classes": 4, "k": 1000, "strides": strides}
    boxes, _logits, index, _classes = decode_topk(cls, box, anchors, **options)
    found = dict(zip(index[1].tolist(), boxes[1], strict=True))
    assert len(found) == total
    x, y = 100 / 13, 4.0
    assert found[1].tolist() == [0, 0, 8, 4]
    torch.testing.assert_close(found[4], torch.tensor([-4 + 2 * x, -2, 12 + 2 * x, 6]))
    torch.testing.assert_close(found[9], torch.tensor([x, y, 8 + x, 4 + y]))  # row 1, column 1
    torch.testing.assert_close(
        found[14], torch.tensor([-9 + 100 / 7, -7, 25 + 100 / 7, 13], dtype=torch.float32)
    )


@pytest.mark.parametrize("clipped", [False, True])
def test_a_grid_gives_what_all_its_anchors_give(clipped):
    cls, box, total = maps()
    table = []
    for (height, width), first, (x, y) in zip(SIZES, FIRST, STRIDES, strict=True):
        for row in range(height):
            for column in range(width):
                table += [anchor + torch.stack([column * x, row * y] * 2) for anchor in first]
    options = {"num_classes": 4, "k": 30}
    if clipped:
        options["limits"] = torch.tensor([[15.0, 7.0], [20.0, 3.0]])
    leaves = [level.requires_grad_() for level in box]
    results = []
    for anchors, strides in ((torch.stack(table), None), (FIRST, STRIDES)):
        outputs = decode_topk(cls, box, anchors, **options, strides=strides)
        weights = torch.arange(outputs[0].numel()).view_as(outputs[0])
        results.append([*outputs, *torch.autograd.grad((outputs[0] * weights).sum(), leaves)])
    assert len(table) == total
    for stored, computed in zip(*results, strict=True):
        torch.testing.assert_close(computed, stored, rtol=1e-5, atol=1e-4)


def test_anchors_of_another_dtype_or_shape_than_strides_want_are_refused():
    cls, box, total = maps()
    options = {"num_classes": 4, "k": 3, "strides": STRIDES}
    for anchors in (FIRST.double(), torch.zeros(total, 4), FIRST[:, :1]):
        with pytest.raises((TypeError, ValueError), match=r"decode_topk: anchors: got .* takes "):
            decode_topk(cls, box, anchors, **options)
    with pytest.raises(ValueError, match=r"decode_topk: anchors: got .* takes a tensor \[16, 4\]"):
        decode_topk(cls, box, FIRST, num_classes=4, k=3)
