"""Metrics of detections, on a dictionary of arrays for each image: Pascal VOC's and OpenImages'.

Use: for each image `add_single_ground_truth_image_info`, then `add_single_detected_image_info`; then
`evaluate`, and `clear` before other images.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np

from .fields import DetectionResultFields, InputDataFields
from .object_detection_evaluation import ObjectDetectionEvaluation


class DetectionEvaluator(ABC):
    """What every evaluator has.

    Args:
        categories: dictionaries with "id" (from 1) and "name".
    """

    def __init__(self, categories):
        self._categories = categories

    def observe_result_dict_for_single_example(self, eval_dict):
        """Add an image, ground truth and detections, from one dictionary; no evaluator here does."""
        raise NotImplementedError(
            f"{type(self).__name__} takes add_single_ground_truth_image_info and "
            "add_single_detected_image_info"
        )

    @abstractmethod
    def add_single_ground_truth_image_info(self, image_id, gt_dict):
        """Add an image."""

    @abstractmethod
    def add_single_detected_image_info(self, image_id, detections_dict):
        """Add the detections of an image that was added."""

    @abstractmethod
    def evaluate(self):
        """Metrics by name."""

    @abstractmethod
    def clear(self):
        """Forget all images."""


class ObjectDetectionEvaluator(DetectionEvaluator):
    """Mean average precision at one IoU, and the average precision of each category.

    Args:
        categories: dictionaries with "id" (from 1) and "name"; boxes of others are left out.
        matching_iou_threshold: overlap that makes a match.
        recall_lower_bound, recall_upper_bound: use the points of the curve in this range.
        evaluate_corlocs: also CorLoc, the share of a category's images in which it was located.
        evaluate_precision_recall: also the curve of each category.
        metric_prefix: begins the names of metrics.
        use_weighted_mean_ap: the mean is the AP of the detections of all categories together.
        evaluate_masks: overlap is that of masks.
        group_of_weight: what finding a group of objects is worth.

    Raises:
        ValueError: no categories, or an id under 1.
    """

    def __init__(
        self,
        categories,
        matching_iou_threshold=0.5,
        recall_lower_bound=0.0,
        recall_upper_bound=1.0,
        evaluate_corlocs=False,
        evaluate_precision_recall=False,
        metric_prefix=None,
        use_weighted_mean_ap=False,
        evaluate_masks=False,
        group_of_weight=0.0,
    ):
        super().__init__(categories)
        ids = [category["id"] for category in categories]
        if not ids or min(ids) < 1:
            raise ValueError(f"categories: got ids {ids}; takes at least one, from 1 up")
        self._num_classes = max(ids)
        self.matching_iou_threshold = matching_iou_threshold
        self._recall_bounds = recall_lower_bound, recall_upper_bound
        self._label_id_offset = 1
        self._evaluate_corlocs = evaluate_corlocs
        self._evaluate_precision_recall = evaluate_precision_recall
        self._metric_prefix = f"{metric_prefix}_" if metric_prefix else ""
        self._use_weighted_mean_ap = use_weighted_mean_ap
        self._evaluate_masks = evaluate_masks
        self._group_of_weight = group_of_weight
        self._build_metric_names()
        self.clear()

    def add_single_ground_truth_image_info(self, image_id, gt_dict):
        """Add an image; one that is known already is left out, with a warning in the log.

        Args:
            image_id: anything hashable.
            gt_dict: "bbox" [m, 4]; "cls" [m] from 1; "difficult" [m], if some are; with masks
                "instance_masks" uint8 [m, height, width]. Other keys are not looked at.

        Raises:
            KeyError: a key is missing.
        """
        self._add_ground_truth(image_id, gt_dict, difficult=_flags(gt_dict, "difficult"))

    def add_single_detected_image_info(self, image_id, detections_dict):
        """Add the detections of an image; a second time they are left out, with a warning in the log.

        Args:
            image_id: of the ground truth; without it all detections are false positives.
            detections_dict: "bbox" [n, 4]; "score" [n]; "cls" [n] from 1; with masks "masks" uint8
                [n, height, width].

        Raises:
            KeyError: a key is missing.
        """
        fields = DetectionResultFields
        masks = detections_dict[fields.detection_masks] if self._evaluate_masks else None
        self._evaluation.add_single_detected_image_info(
            image_key=image_id,
            detected_boxes=np.asarray(detections_dict[fields.detection_boxes]),
            detected_scores=np.asarray(detections_dict[fields.detection_scores]),
            detected_class_labels=self._numbers(detections_dict[fields.detection_classes]),
            detected_masks=masks,
        )

    def evaluate(self):
        """Metrics by name, NaN where there is no ground truth.

        The names are PREFIX_Precision/mAP@0.5IOU, PREFIX_PerformanceByCategory/AP@0.5IOU/NAME, and
        likewise meanCorLoc, CorLoc, Precision and Recall if asked.
        """
        found = self._evaluation.evaluate()
        metrics = {self._metric_names[0]: found["mean_ap"]}
        if self._evaluate_corlocs:
            metrics[self._metric_names[1]] = found["mean_corloc"]
        kinds = {"AP": "per_class_ap"}
        if self._evaluate_precision_recall:
            kinds |= {"Precision": "per_class_precision", "Recall": "per_class_recall"}
        if self._evaluate_corlocs:
            kinds |= {"CorLoc": "per_class_corlocs"}
        for category in self._in_order():
            for kind, key in kinds.items():
                value = found[key][category["id"] - self._label_id_offset]
                metrics[self.metric_name(category, kind)] = value
        return metrics

    def clear(self):
        """Forget all images."""
        lower, upper = self._recall_bounds
        self._evaluation = ObjectDetectionEvaluation(
            num_gt_classes=self._num_classes,
            matching_iou_threshold=self.matching_iou_threshold,
            recall_lower_bound=lower,
            recall_upper_bound=upper,
            use_weighted_mean_ap=self._use_weighted_mean_ap,
            label_id_offset=self._label_id_offset,
            group_of_weight=self._group_of_weight,
        )

    def _build_metric_names(self):
        """Set `_metric_names`: the mean AP first, then what else is one number."""
        at = f"@{self.matching_iou_threshold}IOU"
        lower, upper = self._recall_bounds
        part = f"@[{lower:.1f},{upper:.1f}]Recall" if lower > 0 or upper < 1 else ""
        names = [f"{self._metric_prefix}Precision/mAP{at}{part}"]
        if self._evaluate_corlocs:
            names.append(f"{self._metric_prefix}Precision/meanCorLoc{at}")
        for category in self._in_order():
            names.append(self.metric_name(category))
            if self._evaluate_corlocs:
                names.append(self.metric_name(category, "CorLoc"))
        self._metric_names = names

    def metric_name(self, category=None, kind="AP"):
        """Name among the metrics of the mean AP, or of a category's "AP" or another of its figures."""
        if category is None:
            return self._metric_names[0]
        at = f"@{self.matching_iou_threshold}IOU"
        return f"{self._metric_prefix}PerformanceByCategory/{kind}{at}/{category['name']}"

    def _in_order(self) -> list[dict]:
        return sorted(self._categories, key=lambda category: category["id"])

    def _numbers(self, classes) -> np.ndarray:
        """Classes from 0."""
        return np.asarray(classes).astype(np.int64) - self._label_id_offset

    def _add_ground_truth(self, image_id, gt_dict: dict, difficult=None, group_of=None) -> None:
        fields = InputDataFields
        self._evaluation.add_single_ground_truth_image_info(
            image_key=image_id,
            gt_boxes=np.asarray(gt_dict[fields.gt_boxes]),
            gt_class_labels=self._numbers(gt_dict[fields.gt_classes]),
            gt_is_difficult_list=difficult,
            gt_is_group_of_list=group_of,
            gt_masks=gt_dict[fields.gt_instance_masks] if self._evaluate_masks else None,
        )


class PascalDetectionEvaluator(ObjectDetectionEvaluator):
    """PASCAL VOC: the mean over categories of the average precision."""

    def __init__(self, categories, matching_iou_threshold=0.5):
        super().__init__(
            categories,
            matching_iou_threshold=matching_iou_threshold,
            metric_prefix="PascalBoxes",
        )


class WeightedPascalDetectionEvaluator(ObjectDetectionEvaluator):
    """PASCAL VOC, with categories weighted by their objects: AP of all detections together."""

    def __init__(self, categories, matching_iou_threshold=0.5):
        super().__init__(
            categories,
            matching_iou_threshold=matching_iou_threshold,
            metric_prefix="WeightedPascalBoxes",
            use_weighted_mean_ap=True,
        )


class PrecisionAtRecallDetectionEvaluator(ObjectDetectionEvaluator):
    """Average precision over a range of recalls."""

    def __init__(
        self,
        categories,
        matching_iou_threshold=0.5,
        recall_lower_bound=0.0,
        recall_upper_bound=1.0,
    ):
        super().__init__(
            categories,
            matching_iou_threshold=matching_iou_threshold,
            recall_lower_bound=recall_lower_bound,
            recall_upper_bound=recall_upper_bound,
            metric_prefix="PrecisionAtRecallBoxes",
        )


class OpenImagesDetectionEvaluator(ObjectDetectionEvaluator):
    """OpenImages V2, V4, V5: as PASCAL VOC, but detections inside a group of objects do not count."""

    def __init__(
        self,
        categories,
        matching_iou_threshold=0.5,
        evaluate_masks=False,
        evaluate_corlocs=False,
        metric_prefix="OpenImagesV5",
        group_of_weight=0.0,
    ):
        super().__init__(
            categories,
            matching_iou_threshold=matching_iou_threshold,
            evaluate_corlocs=evaluate_corlocs,
            metric_prefix=metric_prefix,
            evaluate_masks=evaluate_masks,
            group_of_weight=group_of_weight,
        )

    def add_single_ground_truth_image_info(self, image_id, gt_dict):
        """As of `ObjectDetectionEvaluator`, with "group_of" [m], if some are, and no "difficult"."""
        self._add_ground_truth(image_id, gt_dict, group_of=_flags(gt_dict, "group_of"))


class OpenImagesChallengeEvaluator(OpenImagesDetectionEvaluator):
    """The OpenImages challenge: only categories that were looked for in an image count there.

    Those are the categories of its boxes and those in "img_cls", the verified image labels. All
    detections in a group together are one hit.
    """

    def __init__(
        self,
        categories,
        evaluate_masks=False,
        matching_iou_threshold=0.5,
        evaluate_corlocs=False,
        group_of_weight=1.0,
    ):
        kind = "InstanceSegmentation" if evaluate_masks else "Detection"
        super().__init__(
            categories,
            matching_iou_threshold=matching_iou_threshold,
            evaluate_masks=evaluate_masks,
            evaluate_corlocs=evaluate_corlocs,
            metric_prefix=f"OpenImages{kind}Challenge",
            group_of_weight=group_of_weight,
        )

    def add_single_ground_truth_image_info(self, image_id, gt_dict):
        """As of `OpenImagesDetectionEvaluator`, with "img_cls", categories verified for the image."""
        super().add_single_ground_truth_image_info(image_id, gt_dict)
        verified = np.asarray(gt_dict.get(InputDataFields.gt_image_classes, ())).reshape(-1)
        labels = np.union1d(np.asarray(gt_dict[InputDataFields.gt_classes]), verified)
        self._verified.setdefault(image_id, labels)

    def add_single_detected_image_info(self, image_id, detections_dict):
        """As of `ObjectDetectionEvaluator`; of an image without ground truth no detection counts."""
        fields = DetectionResultFields
        classes = np.asarray(detections_dict[fields.detection_classes])
        counts = np.isin(classes, self._verified.get(image_id, ()))
        names = [fields.detection_boxes, fields.detection_scores, fields.detection_classes]
        if self._evaluate_masks:
            names.append(fields.detection_masks)
        kept = {name: np.asarray(detections_dict[name])[counts] for name in names}
        super().add_single_detected_image_info(image_id, kept)

    def clear(self):
        """Forget all images."""
        super().clear()
        self._verified: dict = {}


def create_category_index(categories):
    """The categories by their "id"."""
    return {category["id"]: category for category in categories}


def _flags(gt_dict: dict, name: str) -> np.ndarray | None:
    """A flag of each object, or None where there are none."""
    flags = gt_dict.get(name)
    return None if flags is None or not np.size(flags) else np.asarray(flags, dtype=bool)
