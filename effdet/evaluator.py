"""Mean average precision of detections against the annotations of a data set."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
from typing import Any

import numpy as np
import torch

from .data.parsers.coco_json import make_coco
from .distributed import all_gather, broadcast, is_main_process
from .evaluation.detection_evaluator import (
    ObjectDetectionEvaluator,
    OpenImagesDetectionEvaluator,
    PascalDetectionEvaluator,
)
from .files import replacing

MIN_SCORE = 0.001
_SWAPPED = [1, 0, 3, 2]  # (x1, y1, x2, y2) from (y1, x1, y2, x2), and back

_STATS = (
    *("AP", "AP50", "AP75", "APsmall", "APmedium", "APlarge"),
    *("AR1", "AR10", "AR100", "ARsmall", "ARmedium", "ARlarge"),
)


class Evaluator:
    """Collects detections; see `CocoEvaluator` and `TfmEvaluator`, also for what `evaluate` sets.

    Args:
        distributed: gather the detections of all processes; each then has to call `evaluate`.
        pred_yxyx: detections are (y1, x1, y2, x2, ...) instead of (x1, y1, x2, y2, ...).
    """

    def __init__(self, distributed: bool = False, pred_yxyx: bool = False):
        self.distributed = distributed
        self.pred_yxyx = pred_yxyx
        self.img_indices: list[int] = []
        self.predictions: list[np.ndarray] = []
        self.stats: dict[str, float] = {}
        self.per_class: dict[str, dict[str, float]] = {}
        self.precision_recall: dict[str, Any] = {}
        self._parser: Any = None

    def reset(self) -> None:
        """Forget all detections and metrics."""
        self.img_indices = []
        self.predictions = []
        self.stats, self.per_class, self.precision_recall = {}, {}, {}

    def add_predictions(self, detections: torch.Tensor, target: dict[str, torch.Tensor]) -> None:
        """Add the detections of a batch.

        Args:
            detections: [B, n, 6] rows (box in pixels of the original image, score, class), in any
                order; padding among them is left out.
            target: `img_idx` [B], the number of each image in the data set.
        """
        if "img_idx" not in target:
            raise KeyError(f"target: lacks 'img_idx'; it has {', '.join(target)}")
        try:
            rows = torch.as_tensor(detections).detach().float().cpu().numpy()
        except (TypeError, ValueError) as error:  # a list of unequal parts, for one
            raise ValueError(
                f"detections: got a {type(detections).__name__} ({error}); takes [B, n, 6], where rows of"
                " score 0 fill up"
            ) from error
        indices = torch.as_tensor(target["img_idx"]).reshape(-1).tolist()
        self._check_indices(indices)
        if rows.ndim != 3 or rows.shape[2] != 6 or len(rows) != len(indices):
            raise ValueError(
                f"detections: got shape {list(rows.shape)}; takes [{len(indices)}, n, 6]"
            )
        for index, image_rows in zip(indices, rows, strict=True):
            self.img_indices.append(index)
            self.predictions.append(_finite(image_rows[~self._is_padding(image_rows)]))

    def _check_indices(self, indices: list) -> None:
        """Numbers of images of the data set; of a parser that has no list of them any from 0."""
        count = len(getattr(self._parser, "img_ids", ())) or math.inf
        wrong = [n for n in indices if not isinstance(n, int) or not 0 <= n < count]
        if wrong:
            raise ValueError(
                f"target['img_idx']: got {wrong[0]}; takes whole numbers from 0, less than {count}"
            )

    def evaluate(self, output_result_file: str | os.PathLike = "") -> float:
        """The metric; optionally writes the detections as `save` does."""
        raise NotImplementedError

    def save(self, result_file: str | os.PathLike) -> None:
        """Write the detections as a COCO result file (json). The file appears complete or not.

        With `distributed` every process calls it, and process 0 writes.
        """
        results, _ = self._coco_predictions()
        self._write(results, result_file)

    def _is_padding(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows [n, 6] are no detections, bool [n]: those with a score under 0.001."""
        return rows[:, 4] < MIN_SCORE

    def _coco_predictions(self) -> tuple[list[dict], list]:
        """(COCO results, ids of the images seen) of all processes."""
        results, image_ids = [], []
        for index, rows in self._gathered().items():
            image_id = self._parser.img_ids[index]
            image_ids.append(image_id)
            boxes = rows[:, _SWAPPED if self.pred_yxyx else slice(4)].copy()
            boxes[:, 2:] -= boxes[:, :2]
            for box, (score, label) in zip(boxes.tolist(), rows[:, 4:].tolist(), strict=True):
                results.append(
                    {
                        "image_id": image_id,
                        "bbox": box,
                        "score": score,
                        "category_id": self._parser.label_to_cat_id(int(label)),
                    }
                )
        return results, image_ids

    def _gathered(self) -> dict[int, np.ndarray]:
        """Rows by image number; an image that several processes saw counts once."""
        mine = (self.img_indices, self.predictions)
        rows: dict[int, np.ndarray] = {}
        for indices, predictions in all_gather(mine) if self.distributed else [mine]:
            for index, image_rows in zip(indices, predictions, strict=True):
                rows.setdefault(index, image_rows)
        return rows

    def _write(self, results: list[dict], result_file: str | os.PathLike) -> None:
        if self.distributed and not is_main_process():
            return
        with replacing(result_file) as partial:
            partial.write_text(json.dumps(results), encoding="utf-8")


class CocoEvaluator(Evaluator):
    """COCO metrics by pycocotools, over the images that predictions were added for.

    `dataset.parser` is a `CocoParser`. Detections with a score under 0.001 are padding. After
    `evaluate()`:

    - `stats`: AP (IoU 0.50:0.95), AP50, AP75, APsmall, APmedium, APlarge, AR1, AR10, AR100,
      ARsmall, ARmedium, ARlarge; -1 where no annotation falls in the range.
    - `per_class`: category name to {"AP", "AP50"}; NaN for a category without annotations.
    - `precision_recall`: "recall": the 101 recalls 0, 0.01, … 1; "mean": the precision at each of
      them, averaged over categories, by the name of the figure that its mean is ("AP50": at IoU
      0.50, "AP75", "AP": averaged over IoU 0.50:0.95 too); "per_class": the precision at IoU 0.50
      by category name. Precision at a recall is the best at that recall or a higher one. None in
      the place of a list where there are no annotations.
    - `summary`: the table of pycocotools as text.
    """

    def __init__(self, dataset, distributed: bool = False, pred_yxyx: bool = False):
        super().__init__(distributed=distributed, pred_yxyx=pred_yxyx)
        self._parser = dataset.parser
        if not hasattr(self._parser, "coco"):
            raise ValueError(
                f"dataset: its parser is a {type(self._parser).__name__}; takes one with COCO "
                "annotations"
            )
        self.summary = ""

    def reset(self) -> None:
        """Forget all detections and metrics."""
        super().reset()
        self.summary = ""

    def evaluate(self, output_result_file: str | os.PathLike = "") -> float:
        """AP at IoU 0.50:0.95. The same on every process."""
        results, image_ids = self._coco_predictions()
        _check_any(image_ids)
        if output_result_file:
            self._write(results, output_result_file)
        main = not self.distributed or is_main_process()
        metrics = self._measure(results, image_ids) if main else ({}, {}, {}, "")
        self.stats, self.per_class, self.precision_recall, self.summary = (
            broadcast(metrics) if self.distributed else metrics
        )
        return self.stats["AP"]

    def _measure(self, results: list[dict], image_ids: list) -> tuple[dict, dict, dict, str]:
        from pycocotools.cocoeval import COCOeval

        truth = self._parser.coco
        # pycocotools' own loadRes fails on an empty list.
        found = make_coco(
            {
                "images": truth.dataset["images"],
                "categories": truth.dataset["categories"],
                "annotations": [
                    {**result, "id": n, "iscrowd": 0, "area": result["bbox"][2] * result["bbox"][3]}
                    for n, result in enumerate(results, start=1)
                ],
            }
        )
        with contextlib.redirect_stdout(io.StringIO()) as text:
            evaluation = COCOeval(truth, found, "bbox")
            evaluation.params.imgIds = image_ids
            evaluation.evaluate()
            evaluation.accumulate()
            text.truncate(0)
            text.seek(0)
            evaluation.summarize()
        stats = {name: float(value) for name, value in zip(_STATS, evaluation.stats, strict=True)}
        # [IoU thresholds, recalls, classes], all areas, 100 detections; -1: class not annotated
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        precision = np.where(precision < 0, np.nan, precision)
        categories = evaluation.cocoGt.cats
        names = [categories[cat_id]["name"] for cat_id in evaluation.params.catIds]
        curves = _precision_recall(precision, evaluation.params.recThrs, names)
        return stats, _by_class(precision, names), curves, text.getvalue()


class TfmEvaluator(Evaluator):
    """Mean average precision at IoU 0.5 by an evaluator of `effdet.evaluation`.

    The ground truth of the images that predictions were added for is what `dataset.parser` gives by
    `get_ground_truth`, or without it by `get_ann_info`: "bbox" and "cls", and the flags "difficult"
    (VOC) or "group_of" (OpenImages) of objects that are neither right nor wrong to find. Rows of
    classes beyond the categories are padding. After `evaluate()`:

    - `stats`: "AP50", the mean over categories; NaN without annotations.
    - `per_class`: category name to {"AP50"}; NaN for a category without annotations.
    - `metrics`: all that the evaluator found, by its own names.

    Args:
        dataset: its `parser` tells the categories and the ground truth.
        distributed: gather the detections of all processes; each then has to call `evaluate`.
        pred_yxyx: detections are (y1, x1, y2, x2, ...) instead of (x1, y1, x2, y2, ...).
        evaluator_cls: the evaluator; called with the categories.
    """

    def __init__(
        self,
        dataset,
        distributed: bool = False,
        pred_yxyx: bool = False,
        evaluator_cls=ObjectDetectionEvaluator,
    ):
        super().__init__(distributed=distributed, pred_yxyx=pred_yxyx)
        self._parser = dataset.parser
        self._evaluator = evaluator_cls(categories=self._parser.cat_dicts)
        self.metrics: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget all detections and metrics."""
        super().reset()
        self.metrics = {}

    def evaluate(self, output_result_file: str | os.PathLike = "") -> float:
        """The mean average precision. The same on every process."""
        rows = self._gathered()
        _check_any(rows)
        if output_result_file:
            self.save(output_result_file)
        main = not self.distributed or is_main_process()
        metrics = self._measure(rows) if main else {}
        self.metrics = broadcast(metrics) if self.distributed else metrics
        name = f"AP{100 * self._evaluator.matching_iou_threshold:g}"
        self.stats = {name: float(self.metrics[self._evaluator.metric_name()])}
        self.per_class = {
            category["name"]: {name: float(self.metrics[self._evaluator.metric_name(category)])}
            for category in self._parser.cat_dicts
        }
        return self.stats[name]

    def _is_padding(self, rows: np.ndarray) -> np.ndarray:
        return (rows[:, 5] < 1) | (rows[:, 5] > self._parser.max_label)

    def _measure(self, rows: dict[int, np.ndarray]) -> dict[str, Any]:
        self._evaluator.clear()
        ground_truth = getattr(self._parser, "get_ground_truth", self._parser.get_ann_info)
        for index, found in rows.items():
            truth = ground_truth(index)
            if not getattr(self._parser, "yxyx", True):
                truth = {**truth, "bbox": truth["bbox"][:, _SWAPPED]}
            self._evaluator.add_single_ground_truth_image_info(index, truth)
            boxes = found[:, slice(4) if self.pred_yxyx else _SWAPPED]
            detections = {"bbox": boxes, "score": found[:, 4], "cls": found[:, 5]}
            self._evaluator.add_single_detected_image_info(index, detections)
        return self._evaluator.evaluate()


class PascalEvaluator(TfmEvaluator):
    """Pascal VOC mean average precision (area under the curve, as since 2010); see `TfmEvaluator`."""

    def __init__(self, dataset, distributed: bool = False, pred_yxyx: bool = False):
        super().__init__(dataset, distributed, pred_yxyx, PascalDetectionEvaluator)


class OpenImagesEvaluator(TfmEvaluator):
    """OpenImages V5 mean average precision; see `TfmEvaluator`."""

    def __init__(self, dataset, distributed: bool = False, pred_yxyx: bool = False):
        super().__init__(dataset, distributed, pred_yxyx, OpenImagesDetectionEvaluator)


def create_evaluator(
    name: str, dataset, distributed: bool = False, pred_yxyx: bool = False
) -> Evaluator:
    """Evaluator for a data set name: COCO, OpenImages, or else Pascal VOC."""
    name = name.lower()
    if "coco" in name:
        return CocoEvaluator(dataset, distributed=distributed, pred_yxyx=pred_yxyx)
    if "openimages" in name:
        return OpenImagesEvaluator(dataset, distributed=distributed, pred_yxyx=pred_yxyx)
    return PascalEvaluator(dataset, distributed=distributed, pred_yxyx=pred_yxyx)


def _by_class(precision: np.ndarray, names: list[str]) -> dict[str, dict[str, float]]:
    """AP and AP50 of each class, of precisions [IoU thresholds, recalls, classes]."""
    return {
        name: {
            "AP": float(precision[:, :, column].mean()),
            "AP50": float(precision[0, :, column].mean()),
        }
        for column, name in enumerate(names)
    }


def _precision_recall(
    precision: np.ndarray, recall: np.ndarray, names: list[str]
) -> dict[str, Any]:
    """`CocoEvaluator.precision_recall` of precisions [IoU thresholds, recalls, classes], NaN without annotations."""
    annotated = precision[:, :, ~np.isnan(precision).any(axis=(0, 1))]
    means: dict[str, list[float] | None] = {"AP50": None, "AP75": None, "AP": None}
    if annotated.shape[2]:
        means["AP50"] = annotated[0].mean(axis=-1).tolist()
        means["AP75"] = annotated[5].mean(axis=-1).tolist()
        means["AP"] = annotated.mean(axis=(0, 2)).tolist()
    of_class = {
        name: None if np.isnan(precision[0, :, column]).any() else precision[0, :, column].tolist()
        for column, name in enumerate(names)
    }
    return {"recall": recall.tolist(), "mean": means, "per_class": of_class}


def _check_any(images) -> None:
    if not images:
        raise ValueError("no predictions were added, so there is nothing to evaluate")


def _finite(rows: np.ndarray) -> np.ndarray:
    """Copy of the rows [n, 6] without those that are not finite."""
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        warnings.warn(
            f"{(~finite).sum()} of the detections of an image are not finite and left out",
            stacklevel=3,
        )
    return rows[finite].copy()
