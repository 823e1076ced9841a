"""Pascal VOC and OpenImages metrics: cases by hand."""

from __future__ import annotations

import logging
import math

import numpy as np
import pytest

from effdet.evaluation import metrics
from effdet.evaluation.detection_evaluator import (
    DetectionEvaluator,
    ObjectDetectionEvaluator,
    OpenImagesChallengeEvaluator,
    OpenImagesDetectionEvaluator,
    PascalDetectionEvaluator,
    PrecisionAtRecallDetectionEvaluator,
    WeightedPascalDetectionEvaluator,
    create_category_index,
)
from effdet.evaluation.object_detection_evaluation import ObjectDetectionEvaluation
from effdet.evaluation.per_image_evaluation import PerImageEvaluation

CATEGORIES = [{"id": 2, "name": "jar"}, {"id": 1, "name": "cup"}]
# Two cups and a jar; the second half of each detection's name says what it is.
CUP, OTHER_CUP, JAR = [0, 0, 10, 10], [20, 20, 30, 30], [0, 20, 10, 30]
HALF_OF_CUP = [0, 0, 5, 10]  # IoU 0.5
THIRD_OF_CUP = [0, 0, 10, 3]
NOWHERE = [50, 50, 60, 60]
TRUTH = {"bbox": np.array([CUP, OTHER_CUP, JAR], dtype=float), "cls": np.array([1, 1, 2])}


def _found(*rows: tuple[list[float], float, int]) -> dict[str, np.ndarray]:
    boxes, scores, classes = zip(*rows, strict=True)
    return {
        "bbox": np.array(boxes, dtype=float),
        "score": np.array(scores),
        "cls": np.array(classes),
    }


def _metrics(evaluator, found: dict, **truth) -> dict[str, float]:
    """Metrics by the ends of their names."""
    evaluator.add_single_ground_truth_image_info("a", {**TRUTH, **truth})
    evaluator.add_single_detected_image_info("a", found)
    return {name.split("/", 1)[1]: value for name, value in evaluator.evaluate().items()}


FOUND = _found((NOWHERE, 0.9, 1), (CUP, 0.8, 1), (CUP, 0.7, 1), (OTHER_CUP, 0.6, 1), (JAR, 0.5, 2))


def test_pascal():
    """Cups: miss, hit, double, hit: precision 1/2 at recall 1/2, 1/2 at recall 1."""
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), FOUND)
    assert found == {"mAP@0.5IOU": 0.75, "AP@0.5IOU/cup": 0.5, "AP@0.5IOU/jar": 1.0}


def test_order_of_detections_does_not_matter():
    shuffled = {name: values[[3, 1, 4, 0, 2]] for name, values in FOUND.items()}
    assert _metrics(PascalDetectionEvaluator(CATEGORIES), shuffled)["mAP@0.5IOU"] == 0.75


@pytest.mark.parametrize(("threshold", "hit"), [(0.5, 1.0), (0.51, 0.0)])
def test_threshold_is_reached_by_equality(threshold, hit):
    found = _metrics(
        PascalDetectionEvaluator(CATEGORIES, threshold),
        _found((HALF_OF_CUP, 0.9, 1), (JAR, 0.1, 2)),
    )
    assert found[f"AP@{threshold}IOU/cup"] == hit / 2


def test_weighted_by_objects():
    """All detections together: miss, hit, double, hit, hit of three objects."""
    found = _metrics(WeightedPascalDetectionEvaluator(CATEGORIES), FOUND)
    assert found["mAP@0.5IOU"] == pytest.approx((3 / 5) * 1)
    assert found["AP@0.5IOU/cup"] == 0.5


def test_range_of_recalls():
    """Of the cups' curve the points at recall 1/2 are left: precisions 1/2 and 1/3."""
    evaluator = PrecisionAtRecallDetectionEvaluator(
        CATEGORIES[1:], recall_lower_bound=0.25, recall_upper_bound=0.75
    )
    found = _metrics(evaluator, FOUND)
    assert found == {"mAP@0.5IOU@[0.2,0.8]Recall": 0.25, "AP@0.5IOU/cup": 0.25}


def test_difficult_objects_do_not_count():
    """Neither the cup nor the two detections of it: a miss and a hit are left."""
    difficult = np.array([True, False, False])
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), FOUND, difficult=difficult)
    assert found["AP@0.5IOU/cup"] == 0.5
    difficult = np.array([True, True, False])
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), FOUND, difficult=difficult)
    assert math.isnan(found["AP@0.5IOU/cup"])
    assert found["mAP@0.5IOU"] == 1.0


GROUP = np.array([True, False, False])


def test_detections_in_a_group_do_not_count():
    """The cup at (0, 0) is a group: the other cup is left."""
    rows = (THIRD_OF_CUP, 0.95, 1), (CUP, 0.8, 1), (OTHER_CUP, 0.6, 1)
    evaluator = OpenImagesDetectionEvaluator(CATEGORIES)
    assert _metrics(evaluator, _found(*rows), group_of=GROUP)["AP@0.5IOU/cup"] == 1.0
    # to Pascal VOC's evaluator groups are objects: miss, hit, hit
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), _found(*rows), group_of=GROUP)
    assert found["AP@0.5IOU/cup"] == pytest.approx(2 / 3)


def test_open_images_knows_no_difficult_objects():
    difficult = np.array([True, True, False])
    found = _metrics(OpenImagesDetectionEvaluator(CATEGORIES), FOUND, difficult=difficult)
    assert found["AP@0.5IOU/cup"] == 0.5


def test_a_detection_of_a_difficult_object_is_not_one_of_a_group():
    """Nor is the hit of a single object, so that the group is found by neither."""
    judge = PerImageEvaluation(1, nms_iou_threshold=1.0, group_of_weight=0.5)
    truth = np.array([CUP, OTHER_CUP, [0, 0, 40, 40]], dtype=float)
    flags = np.array([True, False, False]), np.array([False, False, True])
    found = truth[:2], np.array([0.9, 0.8]), np.zeros(2, dtype=int)
    scores, hits, _ = judge.compute_object_detection_metrics(
        *found, truth, np.zeros(3, dtype=int), *flags
    )
    assert scores[0].tolist() == [0.8] and hits[0].tolist() == [1.0]


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_group_is_one_hit(weight):
    """Hit of the group at 0.95, miss, hit; of 1 + weight objects."""
    rows = (THIRD_OF_CUP, 0.95, 1), (CUP, 0.8, 1), (NOWHERE, 0.7, 1), (OTHER_CUP, 0.6, 1)
    evaluator = OpenImagesDetectionEvaluator(CATEGORIES, group_of_weight=weight)
    found = _metrics(evaluator, _found(*rows), group_of=GROUP)
    total = 1 + weight
    after = total / (total + 1)
    assert found["AP@0.5IOU/cup"] == pytest.approx(weight / total + after / total)


def test_single_objects_come_before_groups():
    """A detection of the cup inside a group around both cups is the cup's hit."""
    truth = {"bbox": np.array([CUP, [0, 0, 40, 40]], dtype=float), "cls": np.array([1, 1])}
    evaluator = OpenImagesDetectionEvaluator(CATEGORIES)
    rows = _found((CUP, 0.9, 1), (OTHER_CUP, 0.95, 1))
    found = _metrics(evaluator, rows, **truth, group_of=np.array([False, True]))
    assert found["AP@0.5IOU/cup"] == 1.0


def test_challenge_counts_verified_categories_only():
    """Nobody looked for a bowl in the image, unless "img_cls" says so."""
    categories = [*CATEGORIES, {"id": 3, "name": "bowl"}]
    bowl_elsewhere = {"bbox": np.array([CUP], dtype=float), "cls": np.array([3])}
    for verified, precision in (([], 1.0), ([3], 0.5)):
        evaluator = OpenImagesChallengeEvaluator(categories)
        evaluator.add_single_ground_truth_image_info("b", bowl_elsewhere)
        evaluator.add_single_detected_image_info("b", _found((CUP, 0.5, 3)))
        found = _metrics(evaluator, _found((NOWHERE, 0.9, 3)), img_cls=np.array(verified))
        assert found["AP@0.5IOU/bowl"] == precision
    evaluator.add_single_detected_image_info("unknown", _found((NOWHERE, 0.99, 3)))
    name = "OpenImagesDetectionChallenge_PerformanceByCategory/AP@0.5IOU/bowl"
    assert evaluator.evaluate()[name] == 0.5
    evaluator.clear()
    assert math.isnan(evaluator.evaluate()[name])


@pytest.mark.parametrize(
    "evaluator",
    [
        ObjectDetectionEvaluator(CATEGORIES, evaluate_corlocs=True),
        OpenImagesDetectionEvaluator(CATEGORIES, evaluate_corlocs=True),
        OpenImagesChallengeEvaluator(CATEGORIES, evaluate_corlocs=True),
    ],
)
def test_corloc(evaluator):
    """Of two images with cups the best detection is one in the second alone."""
    found = _metrics(evaluator, FOUND)
    assert found["CorLoc@0.5IOU/cup"] == 0 and found["CorLoc@0.5IOU/jar"] == 1
    evaluator.add_single_ground_truth_image_info("b", TRUTH)
    evaluator.add_single_detected_image_info("b", _found((CUP, 0.9, 1), (NOWHERE, 0.8, 1)))
    found = {name.split("/", 1)[1]: value for name, value in evaluator.evaluate().items()}
    assert found["CorLoc@0.5IOU/cup"] == 0.5 and found["CorLoc@0.5IOU/jar"] == 0.5
    assert found["meanCorLoc@0.5IOU"] == 0.5
    assert set(evaluator.evaluate()) == set(evaluator._metric_names)


def test_precision_and_recall():
    evaluator = ObjectDetectionEvaluator(
        CATEGORIES, evaluate_precision_recall=True, metric_prefix="Mine"
    )
    _metrics(evaluator, FOUND)
    found = evaluator.evaluate()
    of_cups = "Mine_PerformanceByCategory/{}@0.5IOU/cup"
    assert found[of_cups.format("Precision")].tolist() == pytest.approx([0, 1 / 2, 1 / 3, 1 / 2])
    assert found[of_cups.format("Recall")].tolist() == [0, 0.5, 0.5, 1]
    assert list(found)[1] == of_cups.format("AP")


def _drawn(boxes: np.ndarray) -> np.ndarray:
    masks = np.zeros((len(boxes), 64, 64), dtype=np.uint8)
    for mask, (top, left, bottom, right) in zip(masks, boxes.astype(int), strict=True):
        mask[top:bottom, left:right] = 1
    return masks


@pytest.mark.parametrize("group_of_weight", [0.0, 0.5])
def test_masks_of_rectangles_are_as_good_as_boxes(group_of_weight):
    rng = np.random.default_rng(0)
    group_of = np.array([False, False, True])
    near = [
        (np.array(box) + rng.integers(0, 3, 4)).tolist() for box in TRUTH["bbox"] for _ in "abc"
    ]
    near += [[1, 21, 3, 24], [50, 50, 60, 60]]  # a small part of the group, and something outside
    found = _found(*((box, rng.random(), 1 + n // 6) for n, box in enumerate(near)))
    found["score"][-2:] = 1.0, 1.1
    settings = {"matching_iou_threshold": 0.6, "group_of_weight": group_of_weight}
    evaluator = OpenImagesDetectionEvaluator(CATEGORIES, evaluate_masks=True, **settings)
    moved = {**found, "bbox": found["bbox"] + 100, "masks": _drawn(found["bbox"])}
    truth = {"instance_masks": _drawn(TRUTH["bbox"]), "group_of": group_of}
    of_boxes = _metrics(
        OpenImagesDetectionEvaluator(CATEGORIES, **settings), found, group_of=group_of
    )
    assert 0 < of_boxes["AP@0.6IOU/cup"] < 1
    assert np.isnan(of_boxes["AP@0.6IOU/jar"]) == (group_of_weight == 0)
    assert _metrics(evaluator, moved, **truth) == pytest.approx(of_boxes, nan_ok=True)


def test_masks_of_the_challenge():
    evaluator = OpenImagesChallengeEvaluator(CATEGORIES, evaluate_masks=True)
    rows = _found((NOWHERE, 0.9, 1), (NOWHERE, 0.8, 2), (NOWHERE, 0.7, 3))
    masks = _drawn(np.array([CUP, JAR, NOWHERE]))
    found = _metrics(evaluator, {**rows, "masks": masks}, instance_masks=_drawn(TRUTH["bbox"]))
    assert found == {"mAP@0.5IOU": 0.75, "AP@0.5IOU/cup": 0.5, "AP@0.5IOU/jar": 1.0}
    assert next(iter(evaluator.evaluate())).startswith("OpenImagesInstanceSegmentationChallenge_")


def test_boxes_without_area_and_of_no_category_are_left_out():
    rows = ([0, 0, 0, 10], 0.9, 1), ([10, 0, 0, 10], 0.9, 1), (CUP, 0.9, 7), (CUP, 0.9, 0)
    rows = *rows, ([0, 0, float("nan"), 5], 0.9, 1)
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), _found(*rows, (CUP, 0.5, 1)))
    assert found["AP@0.5IOU/cup"] == 0.5
    truth = {"bbox": np.array([CUP, CUP, CUP], dtype=float), "cls": np.array([0, 1, 3])}
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), _found((CUP, 0.9, 1)), **truth)
    assert found["mAP@0.5IOU"] == 1.0


def test_no_detections_and_no_ground_truth():
    nothing = {"bbox": np.zeros((0, 4)), "score": np.zeros(0), "cls": np.zeros(0, dtype=int)}
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), nothing)
    assert found == {"mAP@0.5IOU": 0.0, "AP@0.5IOU/cup": 0.0, "AP@0.5IOU/jar": 0.0}
    found = _metrics(PascalDetectionEvaluator(CATEGORIES), FOUND, **nothing, difficult=np.zeros(0))
    assert all(math.isnan(value) for value in found.values())


def test_clear():
    evaluator = PascalDetectionEvaluator(CATEGORIES)
    _metrics(evaluator, _found((NOWHERE, 0.9, 1)))
    evaluator.clear()
    assert _metrics(evaluator, FOUND)["mAP@0.5IOU"] == 0.75


def test_an_image_added_twice_counts_once(caplog):
    evaluator = PascalDetectionEvaluator(CATEGORIES)
    _metrics(evaluator, FOUND)
    with caplog.at_level(logging.WARNING):
        assert _metrics(evaluator, _found((NOWHERE, 0.99, 1)))["mAP@0.5IOU"] == 0.75
    assert [record.message for record in caplog.records] == [
        "ground truth of image a was added before",
        "detections of image a were added before",
    ]


def test_detections_of_an_image_without_ground_truth_are_wrong():
    evaluator = PascalDetectionEvaluator(CATEGORIES)
    evaluator.add_single_detected_image_info("unknown", _found((CUP, 0.99, 2)))
    assert _metrics(evaluator, FOUND)["AP@0.5IOU/jar"] == 0.5


def test_suppression_beforehand():
    """At most one detection of a class, or none that overlaps a better one by more than 0.4."""
    boxes, scores = np.array([CUP, HALF_OF_CUP, NOWHERE], dtype=float), np.array([0.9, 0.8, 0.7])
    arrays = [boxes, scores, np.zeros(3, dtype=int), boxes[:1], np.zeros(1, dtype=int)]
    flags = [np.zeros(1, dtype=bool)] * 2
    for settings, expected in (
        ((1.0, 1), [0.9]),
        ((0.4, 9), [0.9, 0.7]),
        ((0.5, 9), [0.9, 0.8, 0.7]),
    ):
        judge = PerImageEvaluation(1, 0.5, *settings)
        kept, hits, located = judge.compute_object_detection_metrics(*arrays, *flags)
        assert kept[0].tolist() == expected
        assert hits[0].tolist() == [1.0] + [0.0] * (len(expected) - 1)
        assert located.tolist() == [1]


def test_detections_can_be_cleared_alone():
    judge = ObjectDetectionEvaluation(2)
    judge.add_single_ground_truth_image_info("a", TRUTH["bbox"], TRUTH["cls"] - 1)
    arrays = TRUTH["bbox"], np.array([0.9, 0.8, 0.7]), TRUTH["cls"] - 1
    judge.add_single_detected_image_info("a", *arrays)
    assert judge.evaluate()["mean_ap"] == 1.0
    judge.clear_detections()
    assert judge.evaluate()["mean_ap"] == 0.0
    judge.add_single_detected_image_info("a", *arrays)
    assert judge.evaluate()["per_class_ap"].tolist() == [1.0, 1.0]


def test_bad_arguments():
    for categories in ([], [{"id": 0, "name": "cup"}]):
        with pytest.raises(ValueError, match="categories: got ids"):
            PascalDetectionEvaluator(categories)
    with pytest.raises(ValueError, match="num_gt_classes: got 0"):
        ObjectDetectionEvaluation(0)
    evaluator = PascalDetectionEvaluator(CATEGORIES)
    with pytest.raises(KeyError, match="cls"):
        evaluator.add_single_ground_truth_image_info("a", {"bbox": np.zeros((0, 4))})
    with pytest.raises(ValueError, match="score: got 4 for 5 boxes"):
        evaluator.add_single_detected_image_info("a", {**FOUND, "score": FOUND["score"][1:]})
    with pytest.raises(KeyError, match="masks"):
        _metrics(ObjectDetectionEvaluator(CATEGORIES, evaluate_masks=True), FOUND)
    judge = ObjectDetectionEvaluation(2)
    judge.add_single_ground_truth_image_info("a", TRUTH["bbox"], TRUTH["cls"])
    arrays = [FOUND[name] for name in ("bbox", "score", "cls")]
    with pytest.raises(ValueError, match="take both or neither"):
        judge.add_single_detected_image_info("a", *arrays, _drawn(FOUND["bbox"]))
    with pytest.raises(NotImplementedError, match="takes add_single_ground_truth_image_info"):
        evaluator.observe_result_dict_for_single_example({})
    with pytest.raises(TypeError, match="abstract"):
        DetectionEvaluator(CATEGORIES)
    assert create_category_index(CATEGORIES) == {1: CATEGORIES[1], 2: CATEGORIES[0]}


@pytest.mark.parametrize(
    ("scores", "labels", "num_gt", "message"),
    [
        ([0.1, 0.2], [True], 2, r"got shapes \(2,\) and \(1,\)"),
        ([[0.1]], [[True]], 2, r"take equal ones \[n\]"),
        ([0.1], [1], 2, "labels: got int64; takes bool or float"),
        ([0.1, 0.2], [True, True], 1, "num_gt: got 1, less than the 2 hits"),
    ],
)
def test_bad_precision_and_recall(scores, labels, num_gt, message):
    with pytest.raises(ValueError, match=message):
        metrics.compute_precision_recall(np.array(scores), np.array(labels), num_gt)


@pytest.mark.parametrize(
    ("precision", "recall", "message"),
    [
        (None, [1.0], "one is None"),
        ([1.0, 0.5], [1.0], "take equal ones"),
        ([1.5, 0.5], [0.1, 0.2], r"precision: got 0.5 to 1.5; takes \[0, 1\]"),
        ([1.0, 0.5], [-0.1, 0.2], "recall: got -0.1 to 0.2"),
        ([1.0, 0.5], [0.3, 0.2], "recall: decreases"),
    ],
)
def test_bad_average_precision(precision, recall, message):
    with pytest.raises(ValueError, match=message):
        metrics.compute_average_precision(precision, recall)
