"""Pascal VOC and OpenImages metrics against PyPI effdet on the same random detections.

Left out is what PyPI effdet cannot do: CorLoc by name, the overlap of masks, clipping boxes to a window and
pruning them by overlap. Difficult groups are left out too: there they are found but not counted.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import effdet.evaluator
from effdet.evaluation import (
    detection_evaluator,
    metrics,
    np_box_list,
    np_mask_list,
    object_detection_evaluation,
)

CATEGORIES = [{"id": number, "name": f"class {number}"} for number in (5, 1, 2, 3)]


def _boxes(rng: np.random.Generator, count: int) -> np.ndarray:
    corners = rng.uniform(0, 60, (count, 2))
    return np.concatenate([corners, corners + rng.uniform(2, 40, (count, 2))], axis=1)


def _near(rng: np.random.Generator, box: np.ndarray) -> np.ndarray:
    """The box moved a little, or its middle."""
    if rng.random() < 0.3:
        center, half = (box[:2] + box[2:]) / 2, (box[2:] - box[:2]) / 5
        return np.concatenate([center - half, center + half])
    moved = box + rng.normal(0, 2, 4)
    return np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])])


def _scene(rng: np.random.Generator) -> tuple[dict, dict]:
    """Ground truth and detections of an image with classes 1 to 6; the last is no category, 4 neither."""
    truth_count, count = rng.integers(0, 8), rng.integers(0, 25)
    truth, found = _boxes(rng, truth_count), _boxes(rng, count)
    classes, labels = rng.integers(1, 7, truth_count), rng.integers(1, 7, count)
    for row in range(count if truth_count else 0):
        if rng.random() < 0.7:
            owner = rng.integers(truth_count)
            found[row] = _near(rng, truth[owner])
            labels[row] = classes[owner] if rng.random() < 0.8 else labels[row]
    if count and rng.random() < 0.3:
        found[0, 2] = found[0, 0]  # without area
    difficult = rng.random(truth_count) < 0.3
    group_of = ~difficult & (rng.random(truth_count) < 0.3)
    verified = rng.integers(1, 7, 3)
    ground_truth = {"bbox": truth, "cls": classes, "difficult": difficult, "group_of": group_of}
    return {**ground_truth, "img_cls": verified}, {
        "bbox": found,
        "score": rng.random(count),
        "cls": labels,
    }


def _scenes(seed: int) -> list[tuple[int, dict, dict]]:
    rng = np.random.default_rng(seed)
    return [(number, *_scene(rng)) for number in range(6)]


def _same(ours: Any, theirs: Any) -> None:
    """Equal names in the same order, and numbers to 1e-12."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        ours, theirs = list(ours.values()), list(theirs.values())
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs)
        for our_part, their_part in zip(ours, theirs, strict=True):
            _same(our_part, their_part)
    elif theirs is None:
        assert ours is None
    else:
        assert np.shape(ours) == np.shape(theirs)
        np.testing.assert_allclose(np.asarray(ours, dtype=float), theirs, rtol=0, atol=1e-12)


EVALUATORS = [
    ("PascalDetectionEvaluator", {}),
    ("WeightedPascalDetectionEvaluator", {"matching_iou_threshold": 0.6}),
    (
        "PrecisionAtRecallDetectionEvaluator",
        {"recall_lower_bound": 0.2, "recall_upper_bound": 0.6},
    ),
    ("OpenImagesDetectionEvaluator", {}),
    ("OpenImagesDetectionEvaluator", {"group_of_weight": 0.5, "metric_prefix": ""}),
    ("OpenImagesChallengeEvaluator", {}),
    (
        "ObjectDetectionEvaluator",
        {"evaluate_precision_recall": True, "use_weighted_mean_ap": True, "metric_prefix": "X"},
    ),
]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(("evaluator", "settings"), EVALUATORS)
def test_evaluators(oracle, evaluator, settings, seed):
    settings = {"categories": CATEGORIES, **settings}
    judge = getattr(detection_evaluator, evaluator)(**settings)
    for image_id, truth, found in _scenes(seed):
        judge.add_single_ground_truth_image_info(image_id, truth)
        judge.add_single_detected_image_info(image_id, found)
    ours = judge.evaluate()
    theirs = oracle.call("detection_metrics", evaluator=evaluator, images=_scenes(seed), **settings)
    _same(ours, theirs)
    assert 0 < next(iter(ours.values())) < 1


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"nms_iou_threshold": 0.4, "group_of_weight": 0.3},
        {"nms_max_output_boxes": 3},
        {"use_weighted_mean_ap": True, "recall_lower_bound": 0.2, "group_of_weight": 1.0},
    ],
    ids=str,
)
def test_arrays_with_corloc(oracle, settings, seed):
    images = [
        (
            image_id,
            (truth["bbox"], truth["cls"] - 1, truth["difficult"], truth["group_of"]),
            (found["bbox"], found["score"], found["cls"] - 1),
        )
        for image_id, truth, found in _scenes(seed)
    ]
    judge = object_detection_evaluation.ObjectDetectionEvaluation(5, **settings)
    for image_id, truth, found in images:
        judge.add_single_ground_truth_image_info(image_id, *truth)
        judge.add_single_detected_image_info(image_id, *found)
    theirs = oracle.call("array_metrics", images=images, num_gt_classes=5, **settings)
    _same(judge.evaluate(), theirs)


HITS = [np.array([True, False, True]), np.zeros(2, dtype=bool), np.array([False, True])]
METRICS = [
    ("compute_precision_recall", [np.array([0.1, 0.9, 0.5]), HITS[0], 3]),
    ("compute_precision_recall", [np.array([0.1, 0.9, 0.5]), np.array([0.5, 0.0, 1.0]), 3]),
    ("compute_precision_recall", [np.array([0.1]), np.array([False]), 0]),
    ("compute_precision_recall", [np.zeros(0), np.zeros(0), 2]),
    ("compute_average_precision", [np.array([1, 0.5, 0.66]), np.array([0.3, 0.3, 0.6])]),
    ("compute_average_precision", [np.zeros(0), np.zeros(0)]),
    ("compute_average_precision", [None, None]),
    ("compute_cor_loc", [np.array([2, 0, 4]), np.array([1.0, 0, 3])]),
    *[("compute_median_rank_at_k", [HITS, k]) for k in (1, 2, 3, 5)],
    *[("compute_recall_at_k", [HITS, 4, k]) for k in (1, 2, 3, 5)],
    ("compute_median_rank_at_k", [[HITS[1]], 2]),
]


@pytest.mark.parametrize(("name", "arguments"), METRICS)
def test_metrics(oracle, name, arguments):
    theirs = oracle.call("metric", name=name, arguments=arguments)
    _same(getattr(metrics, name)(*arguments), theirs)


def _fields(seed: int, size: int = 6, **columns: Any) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    scores = rng.random((size, columns["classes"]) if "classes" in columns else size)
    fields = {"boxes": _boxes(rng, size), "scores": scores, "weights": rng.random(size)}
    if columns.get("masks"):
        fields["masks"] = rng.integers(0, 2, (size, 5, 7), dtype=np.uint8)
    return fields


LISTS = [
    *[(name, 2, [], {}) for name in ("iou_boxlist", "ioa_boxlist", "intersection_boxlist")],
    ("area_boxlist", 1, [], {}),
    ("gather_boxlist", 1, [np.array([4, 1])], {}),
    ("gather_boxlist", 1, [np.array([4, 1]), ["weights"]], {}),
    ("sort_by_field_boxlist", 1, ["weights"], {}),
    ("sort_by_field_boxlist", 1, ["weights", 1], {}),
    *[("non_max_suppression", 1, [n, iou, 0.2], {}) for n in (2, 9) for iou in (0.1, 0.5, 1.0)],
    ("multi_class_non_max_suppression", 1, [0.3, 0.2, 3], {"classes": 4}),
    ("multi_class_non_max_suppression", 1, [0.3, 0.2, 3], {"classes": 1}),
    ("scale", 1, [2.0, 3.0], {}),
    ("clip_to_window", 1, [np.array([20.0, 30.0, 50.0, 50.0]), False], {}),
    ("prune_outside_window", 1, [np.array([0.0, 10.0, 50.0, 60.0])], {}),
    ("filter_scores_greater_than", 1, [0.5], {}),
    ("change_coordinate_frame", 1, [np.array([20.0, 30.0, 50.0, 70.0])], {}),
    ("area_masklist", 1, [], {"masks": True}),
    ("intersection_masklist", 2, [], {"masks": True}),
    ("gather_masklist", 1, [np.array([4, 1]), ["weights"]], {"masks": True}),
    ("sort_by_field_masklist", 1, ["weights"], {"masks": True}),
    ("non_max_suppression_mask", 1, [3], {"masks": True}),
    ("filter_scores_greater_than_masklist", 1, [0.5], {"masks": True}),
]


@pytest.mark.parametrize(("name", "count", "arguments", "columns"), LISTS)
def test_lists(oracle, name, count, arguments, columns):
    lists = [_fields(seed, **columns) for seed in range(count)]
    theirs = oracle.call("box_list", name=name, lists=lists, arguments=arguments)
    module = np_mask_list if "mask" in name else np_box_list
    ours = getattr(module, name)(*[_made(fields) for fields in lists], *arguments)
    if isinstance(theirs, list):
        _same_fields(ours[0], theirs[0])
        _same(ours[1], theirs[1])
    elif isinstance(theirs, dict):
        _same_fields(ours, theirs)
    else:
        _same(ours, theirs)


def _same_fields(ours: np_box_list.BoxList, theirs: dict) -> None:
    assert {"boxes", *ours.get_extra_fields()} == set(theirs)
    for name, values in theirs.items():
        _same(ours.get_field(name), values)


def _made(fields: dict) -> np_box_list.BoxList:
    made = np_box_list.BoxList(fields["boxes"])
    if "masks" in fields:
        made = np_mask_list.MaskList(fields["boxes"], fields["masks"])
    for name in set(fields) - {"boxes", "masks"}:
        made.add_field(name, fields[name])
    return made


@pytest.mark.parametrize("pred_yxyx", [False, True])
@pytest.mark.parametrize("evaluator", ["TfmEvaluator", "PascalEvaluator", "OpenImagesEvaluator"])
def test_data_set(oracle, evaluator, pred_yxyx):
    scenes = _scenes(1)
    annotations = [truth for _, truth, _ in scenes]
    rows = torch.zeros(len(scenes), 30, 6)  # the rest are padding
    for row, (_, _, found) in zip(rows, scenes, strict=True):
        corners = found["bbox"] if pred_yxyx else found["bbox"][:, [1, 0, 3, 2]]
        columns = [corners, found["score"][:, None] ** 9, found["cls"][:, None]]
        row[: len(corners)] = torch.from_numpy(np.concatenate(columns, axis=1))
    names = [f"class {number}" for number in range(1, 6)]
    parser = SimpleNamespace(
        cat_dicts=[{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        max_label=len(names),
        get_ann_info=annotations.__getitem__,
    )
    judge = getattr(effdet.evaluator, evaluator)(SimpleNamespace(parser=parser), False, pred_yxyx)
    judge.add_predictions(rows, {"img_idx": torch.arange(len(scenes))})
    theirs = oracle.call(
        "data_set_map",
        evaluator=evaluator,
        annotations=annotations,
        names=names,
        pred_yxyx=pred_yxyx,
        detections=rows,
    )
    assert judge.evaluate() == pytest.approx(theirs, abs=1e-12)
    assert 0.05 < theirs < 0.95
    assert (rows[..., 4] < 0.001).sum() > (rows[..., 5] == 0).sum()  # some scores are that low
