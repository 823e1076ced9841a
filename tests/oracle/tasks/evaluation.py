"""Pascal VOC and OpenImages metrics of PyPI effdet, and its lists of boxes."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import torch

import effdet.evaluator
from effdet.evaluation import (
    detection_evaluator,
    metrics,
    np_box_list,
    np_mask_list,
    object_detection_evaluation,
    per_image_evaluation,
)

from . import task

# Names that NumPy 2 no longer has, without which these evaluators stop.
vars(np).update(float_=np.float64, NAN=np.nan)


@task
def detection_metrics(evaluator: str, images: list, **settings: Any) -> dict:
    """Metrics of images (id, ground truth, detections)."""
    judge = getattr(detection_evaluator, evaluator)(**settings)
    for image_id, truth, found in images:
        judge.add_single_ground_truth_image_info(image_id, truth)
        judge.add_single_detected_image_info(image_id, found)
    return judge.evaluate()


@task
def array_metrics(images: list, **settings: Any) -> dict:
    """Metrics of images (id, ground truth, detections), given as arguments."""
    judge = object_detection_evaluation.ObjectDetectionEvaluation(**settings)
    for image_id, truth, found in images:
        judge.add_single_ground_truth_image_info(image_id, *truth)
        judge.add_single_detected_image_info(image_id, *found)
    return judge.evaluate()


@task
def image_metrics(settings: dict, arrays: dict) -> tuple:
    """Scores and hits of one image."""
    judge = per_image_evaluation.PerImageEvaluation(**settings)
    return judge.compute_object_detection_metrics(**arrays)


@task
def metric(name: str, arguments: list) -> Any:
    """One function of precision and recall."""
    return getattr(metrics, name)(*arguments)


@task
def box_list(name: str, lists: list, arguments: list) -> Any:
    """A function of `BoxList`s, or of `MaskList`s where there are masks, as plain arrays."""
    result = getattr(np_mask_list, name)(*[_made(fields) for fields in lists], *arguments)
    return [_plain(part) for part in result] if isinstance(result, tuple) else _plain(result)


def _made(fields: dict) -> np_box_list.BoxList:
    made = np_box_list.BoxList(fields["boxes"])
    if "masks" in fields:
        made = np_mask_list.MaskList(fields["boxes"], fields["masks"])
    for name in set(fields) - {"boxes", "masks"}:
        made.add_field(name, fields[name])
    return made


def _plain(value: Any) -> Any:
    if isinstance(value, np_box_list.BoxList):
        return {name: value.get_field(name) for name in ["boxes", *value.get_extra_fields()]}
    return value


@task
def data_set_map(
    evaluator: str, annotations: list, names: list, pred_yxyx: bool, detections: torch.Tensor
) -> float:
    """The figure of an evaluator on a data set of these annotations."""
    parser = types.SimpleNamespace(
        cat_dicts=[{"id": n, "name": name} for n, name in enumerate(names, start=1)],
        img_ids=list(range(len(annotations))),
        get_ann_info=lambda index: annotations[index],
    )
    dataset = types.SimpleNamespace(parser=parser)
    judge = getattr(effdet.evaluator, evaluator)(dataset, pred_yxyx=pred_yxyx)
    judge.add_predictions(detections, {"img_idx": torch.arange(len(annotations))})
    return float(judge.evaluate())
