"""Suppression of one image's boxes: golden values, order, classes, empty and non-finite input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

import effdet_kernels
from effdet.soft_nms import (
    batched_nms,
    batched_soft_nms,
    pairwise_iou,
    remove_small_boxes,
    soft_nms,
)

BOXES = torch.tensor([[6.0, 3, 8, 7], [3, 6, 9, 11], [3, 7, 10, 12], [1, 4, 13, 7]])
SCORES = torch.tensor([0.6, 0.9, 0.7, 0.2])


@pytest.mark.parametrize(
    ("gaussian", "expected"),
    [
        (False, [0.9, 0.6, 0.29024392, 0.2]),
        (True, [0.9, 0.59630775, 0.35275510, 0.18650459]),
    ],
)
def test_golden_scores(gaussian, expected):
    index, score = soft_nms(
        BOXES, SCORES, gaussian, sigma=0.5, iou_threshold=0.3, score_threshold=0.01
    )
    assert index.tolist() == [1, 0, 2, 3] and index.dtype == torch.int64
    torch.testing.assert_close(score, torch.tensor(expected))


def test_golden_hard_nms():
    assert batched_nms(BOXES, SCORES, torch.zeros(4), 0.3).tolist() == [1, 0, 3]


def test_hard_nms_takes_any_finite_scores():
    shifted = SCORES - 5.0
    assert batched_nms(BOXES, shifted, torch.zeros(4), 0.3).tolist() == [1, 0, 3]
    equal = batched_nms(BOXES, torch.zeros(4), torch.zeros(4), 0.3)
    assert equal.tolist() == [0, 1, 3]


def test_classes_leave_one_another_alone():
    classes = torch.tensor([0, 0, 1, 1])
    index, score = batched_soft_nms(BOXES, SCORES, classes)
    assert index.tolist() == [1, 2, 0, 3]
    torch.testing.assert_close(score, torch.tensor([0.9, 0.7, 0.59630775, 0.2]), rtol=1e-4, atol=0)
    assert batched_nms(BOXES, SCORES, torch.arange(4), 0.3).tolist() == [1, 2, 0, 3]


def test_scores_at_or_below_the_threshold_are_gone():
    index, score = soft_nms(BOXES, SCORES * 1e-5)
    assert index.numel() == 0 and score.numel() == 0
    index, _ = soft_nms(BOXES, SCORES, score_threshold=0.6)
    assert index.tolist() == [1]


def test_empty_input():
    for index, score in (
        soft_nms(BOXES[:0], SCORES[:0]),
        batched_soft_nms(BOXES[:0], SCORES[:0], SCORES[:0]),
    ):
        assert index.shape == score.shape == (0,)
        assert (index.dtype, score.dtype) == (torch.int64, torch.float32)
    assert batched_nms(BOXES[:0], SCORES[:0], SCORES[:0], 0.5).shape == (0,)


def test_a_non_finite_box_is_left_out_and_suppresses_nothing():
    boxes = torch.cat([BOXES, torch.tensor([[0.0, 0, torch.inf, 9]])])
    scores = torch.cat([SCORES, torch.tensor([0.99])])
    index, score = soft_nms(boxes, scores)
    expected_index, expected_score = soft_nms(BOXES, SCORES)
    assert torch.equal(index, expected_index) and torch.equal(score, expected_score)


def test_scores_are_float32():
    for dtype in (torch.float64, torch.float16):
        index, score = soft_nms(BOXES.to(dtype), SCORES.to(dtype))
        assert score.dtype == torch.float32 and index.tolist() == [1, 0, 2, 3]


def test_pairwise_iou():
    iou = pairwise_iou(BOXES[:2], BOXES)
    assert iou.shape == (2, 4)
    assert iou[1, 2].item() == pytest.approx(24 / 41)
    assert iou[0, 0] == 1
    assert pairwise_iou(torch.zeros(1, 4), torch.zeros(2, 4)).tolist() == [[0, 0]]


def test_remove_small_boxes():
    assert remove_small_boxes(BOXES, 4.0).tolist() == [1, 2]


def test_golden_numbers_of_real_candidates(data_dir):
    """Boxes before suppression on 206 photos: how many are kept, and the sum of their scores."""
    raw = dict(np.load(data_dir / "detections" / "raw_candidates.npz"))
    golden = json.loads((data_dir / "detections" / "golden.json").read_text())["raw_candidates"]
    kept = {"hard": 0, "soft": 0}
    total = {"hard": 0.0, "soft": 0.0}
    for image in np.unique(raw["image_id"]):
        rows = raw["image_id"] == image
        boxes = torch.from_numpy(raw["boxes_xyxy"][rows]).double()
        scores = torch.from_numpy(raw["scores"][rows]).double()
        classes = torch.from_numpy(raw["category_id"][rows])
        index = batched_nms(boxes, scores, classes, 0.5)
        _, score = batched_soft_nms(boxes, scores, classes)
        for method, values in (("hard", scores[index]), ("soft", score)):
            kept[method] += values.numel()
            total[method] += values.double().sum().item()
    hard, soft = golden["hard_iou0.5"], golden["soft_gaussian_sigma0.5_min0.001"]
    assert (kept["hard"], kept["soft"]) == (hard["n_kept"], soft["n_kept"])
    assert total["hard"] == pytest.approx(hard["sum_scores"], rel=1e-6)
    assert total["soft"] == pytest.approx(soft["sum_scores"], rel=1e-6)


GOLDEN = {
    "none": {"method": "hard", "iou_threshold": 1.0},
    "hard_iou0.5": {"method": "hard", "iou_threshold": 0.5},
    "soft_gaussian_sigma0.5_min0.001": {"sigma": 0.5, "score_threshold": 0.001},
}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", GOLDEN)
def test_golden_numbers_of_all_photos_in_one_call(data_dir, name, dtype, rtol):
    """What pads the shorter lists of candidates would be picked first and suppress the rest."""
    raw = dict(np.load(data_dir / "detections" / "raw_candidates.npz"))
    golden = json.loads((data_dir / "detections" / "golden.json").read_text())["raw_candidates"]
    photos = [np.flatnonzero(raw["image_id"] == image) for image in np.unique(raw["image_id"])]
    longest = max(map(len, photos))
    boxes = torch.tensor([0.0, 0, 640, 640], dtype=dtype).repeat(len(photos), longest, 1)
    scores = torch.ones(len(photos), longest, dtype=dtype)
    classes = torch.full(scores.shape, int(raw["category_id"][0]))
    for photo, rows in enumerate(photos):
        boxes[photo, : len(rows)] = torch.from_numpy(raw["boxes_xyxy"][rows])
        scores[photo, : len(rows)] = torch.from_numpy(raw["scores"][rows])
        classes[photo, : len(rows)] = torch.from_numpy(raw["category_id"][rows])
    num_valid = torch.tensor([len(rows) for rows in photos])
    index, score, count, dropped = effdet_kernels.soft_nms(
        boxes, scores, classes, num_valid, longest, **GOLDEN[name]
    )
    assert count.sum() == golden[name]["n_kept"] and not dropped.any()
    assert score.double().sum().item() == pytest.approx(golden[name]["sum_scores"], rel=rtol)
    assert torch.equal((index >= 0).sum(1), count) and (index < num_valid[:, None]).all()
