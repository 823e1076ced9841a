"""Evaluation of a model on a data set."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from effdet.bench import DetBenchPredict
from effdet.evaluator import CocoEvaluator, Evaluator
from effdet.files import replacing


@dataclass(frozen=True)
class Evaluation:
    """What an evaluator of `effdet.evaluator` found.

    Attributes:
        stats: "AP", "AP50", "AP75", "APsmall", … in [0, 1]; -1 where there is no such object. Of other evaluators
            than COCO's "AP50" alone, and NaN.
        per_class: class name to {"AP", "AP50"}; None for a class without objects.
        precision_recall: as of `effdet.CocoEvaluator`; empty of others.
    """

    stats: dict[str, float]
    per_class: dict[str, dict[str, float | None]]
    precision_recall: dict[str, Any] = field(default_factory=dict)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[torch.Tensor, dict[str, torch.Tensor]]],
    dataset: Any,
    *,
    autocast: Callable[[], Any] | None = None,
    progress: Callable[[int], object] | None = None,
    stop: object = None,
    soft_nms: bool = False,
    max_det: int = 100,
    distributed: bool = False,
    result_file: str = "",
    evaluator: Evaluator | None = None,
    **suppression: Any,
) -> Evaluation | None:
    """Run ``model`` over ``loader`` and compare with the annotations of ``dataset``.

    Args:
        model: a bare EfficientDet; put in eval mode.
        loader: yields normalised images and targets (`effdet.engine.data.eval_loader`).
        dataset: the loader's data set.
        autocast: makes the context manager to run the network in.
        progress: called with the number of images of each batch.
        stop: looked at after each batch; when it becomes true, None is returned.
        soft_nms: of the post-processing; False: NMS.
        max_det: of the post-processing: detections per image.
        distributed: this process has a share of the images; all call this, all get the whole result.
        result_file: also write the detections there, in COCO's result format.
        evaluator: an empty one of the same data set and ``distributed``; None: COCO's.
        suppression: what else a call of ``DetBenchPredict`` takes.
    """
    model.eval()
    bench = DetBenchPredict(model)
    options = {"soft_nms": soft_nms, "max_det": max_det, **suppression}
    evaluator = evaluator or CocoEvaluator(dataset, distributed=distributed)
    for images, target in loader:
        if autocast is None:
            detections = bench(images, img_info=target, **options)
        else:
            with autocast():
                detections = bench(images, img_info=target, **options)
        evaluator.add_predictions(detections, target)
        if progress is not None:
            progress(len(images))
        if stop:
            return None
    evaluator.evaluate(result_file)
    per_class = {
        name: {key: None if math.isnan(value) else value for key, value in figures.items()}
        for name, figures in evaluator.per_class.items()
    }
    return Evaluation(dict(evaluator.stats), per_class, evaluator.precision_recall)


def write_precision_recall(
    evaluation: Evaluation, path: str | os.PathLike[str], epoch: int | None = None
) -> None:
    """Write ``evaluation.precision_recall`` as JSON, to four digits, with the epoch where it is given.

    The file appears complete or not.

    Raises:
        OSError: it cannot be written.
    """
    content = {**_rounded(evaluation.precision_recall), "epoch": epoch}
    with replacing(path) as partial:
        partial.write_text(json.dumps(content), encoding="utf-8")


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [round(number, 4) for number in value]
    return value
