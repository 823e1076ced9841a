"""Average precision and CorLoc over images, on arrays; classes count from 0."""

from __future__ import annotations

import logging

import numpy as np

from .metrics import compute_average_precision, compute_cor_loc, compute_precision_recall
from .per_image_evaluation import PerImageEvaluation

_logger = logging.getLogger(__name__)


class ObjectDetectionEvaluation:
    """Collects images and computes the metrics. Of each image the ground truth comes first.

    Args:
        num_gt_classes: number of classes; boxes of others are left out.
        matching_iou_threshold: overlap that makes a match.
        nms_iou_threshold, nms_max_output_boxes: suppression of detections beforehand, by class.
        recall_lower_bound, recall_upper_bound: use the points of the curve in this range.
        use_weighted_mean_ap: the mean is the AP of the detections of all classes together.
        label_id_offset: added to classes in messages.
        group_of_weight: what finding a group of objects is worth.
        per_image_eval_class: judges the detections of an image.

    Attributes:
        num_gt_instances_per_class: [classes] objects that could be found, groups by their weight.
        num_gt_imgs_per_class: [classes] images with the class.
        scores_per_class, tp_fp_labels_per_class: for each class the arrays of all images.
        num_images_correctly_detected_per_class: [classes].

    Raises:
        ValueError: `num_gt_classes` is under 1.
    """

    def __init__(
        self,
        num_gt_classes,
        matching_iou_threshold=0.5,
        nms_iou_threshold=1.0,
        nms_max_output_boxes=10000,
        recall_lower_bound=0.0,
        recall_upper_bound=1.0,
        use_weighted_mean_ap=False,
        label_id_offset=0,
        group_of_weight=0.0,
        per_image_eval_class=PerImageEvaluation,
    ):
        if num_gt_classes < 1:
            raise ValueError(f"num_gt_classes: got {num_gt_classes}; takes at least 1")
        self.per_image_eval = per_image_eval_class(
            num_gt_classes=num_gt_classes,
            matching_iou_threshold=matching_iou_threshold,
            nms_iou_threshold=nms_iou_threshold,
            nms_max_output_boxes=nms_max_output_boxes,
            group_of_weight=group_of_weight,
        )
        self.recall_lower_bound = recall_lower_bound
        self.recall_upper_bound = recall_upper_bound
        self.group_of_weight = group_of_weight
        self.num_class = num_gt_classes
        self.use_weighted_mean_ap = use_weighted_mean_ap
        self.label_id_offset = label_id_offset
        self._ground_truth: dict = {}
        self.num_gt_instances_per_class = np.zeros(num_gt_classes)
        self.num_gt_imgs_per_class = np.zeros(num_gt_classes, dtype=np.int64)
        self.clear_detections()

    def clear_detections(self):
        """Forget the detections; the ground truth stays."""
        self.detection_keys: set = set()
        self.scores_per_class: list[list[np.ndarray]] = [[] for _ in range(self.num_class)]
        self.tp_fp_labels_per_class: list[list[np.ndarray]] = [[] for _ in range(self.num_class)]
        self.num_images_correctly_detected_per_class = np.zeros(self.num_class)

    def add_single_ground_truth_image_info(
        self,
        image_key,
        gt_boxes,
        gt_class_labels,
        gt_is_difficult_list=None,
        gt_is_group_of_list=None,
        gt_masks=None,
    ):
        """Add an image; one that is known already is left out, with a warning in the log.

        Args:
            image_key: anything hashable.
            gt_boxes: [m, 4].
            gt_class_labels: [m].
            gt_is_difficult_list: bool [m]; None: none is.
            gt_is_group_of_list: bool [m]; None: none is.
            gt_masks: uint8 [m, height, width], or None.
        """
        if image_key in self._ground_truth:
            _logger.warning("ground truth of image %s was added before", image_key)
            return
        classes = np.asarray(gt_class_labels).astype(np.int64)
        difficult, group = (
            np.zeros(len(classes), dtype=bool) if flags is None else np.asarray(flags, dtype=bool)
            for flags in (gt_is_difficult_list, gt_is_group_of_list)
        )
        self._ground_truth[image_key] = {
            "gt_boxes": gt_boxes,
            "gt_class_labels": classes,
            "gt_is_difficult_list": difficult,
            "gt_is_group_of_list": group,
            "gt_masks": gt_masks,
        }
        self.num_gt_instances_per_class += self._count(classes[~difficult & ~group])
        self.num_gt_instances_per_class += self.group_of_weight * self._count(classes[group])
        self.num_gt_imgs_per_class += self._count(classes) > 0

    def add_single_detected_image_info(
        self,
        image_key,
        detected_boxes,
        detected_scores,
        detected_class_labels,
        detected_masks=None,
    ):
        """Add the detections of an image; a second time they are left out, with a warning in the log.

        Without ground truth of the image all of them are false positives.

        Args:
            image_key: of the ground truth.
            detected_boxes: [n, 4].
            detected_scores: [n].
            detected_class_labels: [n].
            detected_masks: uint8 [n, height, width], or None.

        Raises:
            ValueError: lengths differ, or there are masks on one side only.
        """
        if image_key in self.detection_keys:
            _logger.warning("detections of image %s were added before", image_key)
            return
        truth = self._ground_truth.get(image_key) or _nothing_like(detected_masks)
        scores, labels, located = self.per_image_eval.compute_object_detection_metrics(
            detected_boxes=detected_boxes,
            detected_scores=detected_scores,
            detected_class_labels=detected_class_labels,
            detected_masks=detected_masks,
            **truth,
        )
        self.detection_keys.add(image_key)
        for number in range(self.num_class):
            if len(scores[number]):
                self.scores_per_class[number].append(scores[number])
                self.tp_fp_labels_per_class[number].append(labels[number])
        self.num_images_correctly_detected_per_class += located

    def evaluate(self):
        """The metrics of what was added so far.

        Returns:
            a dictionary, with NaN for a class without ground truth:
            per_class_ap: [classes].
            mean_ap: over classes with ground truth.
            per_class_precision, per_class_recall: for each class the curve, [k].
            per_class_corlocs: [classes] share of the images with the class in which its best
                detection overlaps an object of it.
            mean_corloc.
        """
        absent = np.flatnonzero(self.num_gt_instances_per_class == 0) + self.label_id_offset
        if absent.size:
            _logger.info("classes without ground truth: %s", absent)
        average = np.full(self.num_class, np.nan)
        precisions: list = [np.nan] * self.num_class
        recalls: list = [np.nan] * self.num_class
        present = np.flatnonzero(self.num_gt_instances_per_class)
        for number in present.tolist():
            precision, recall = self._curve([number])
            precisions[number], recalls[number] = precision, recall
            average[number] = compute_average_precision(precision, recall)
        mean = _mean(average)
        if self.use_weighted_mean_ap:
            mean = compute_average_precision(*self._curve(present))
        located = compute_cor_loc(
            self.num_gt_imgs_per_class, self.num_images_correctly_detected_per_class
        )
        return {
            "per_class_ap": average,
            "mean_ap": mean,
            "per_class_precision": precisions,
            "per_class_recall": recalls,
            "per_class_corlocs": located,
            "mean_corloc": _mean(located),
        }

    def _curve(self, classes) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
        """Precision and recall [k] of classes together, between the bounds of recall; None of no objects."""
        scores, labels = (
            np.concatenate([np.zeros(0), *(part for n in classes for part in per_class[n])])
            for per_class in (self.scores_per_class, self.tp_fp_labels_per_class)
        )
        total = self.num_gt_instances_per_class[classes].sum()
        precision, recall = compute_precision_recall(scores, labels, total)
        if recall is None:
            return None, None
        inside = (recall >= self.recall_lower_bound) & (recall <= self.recall_upper_bound)
        return precision[inside], recall[inside]

    def _count(self, classes: np.ndarray) -> np.ndarray:
        """[classes] how many of each."""
        known = classes[(classes >= 0) & (classes < self.num_class)]
        return np.bincount(known, minlength=self.num_class)


def _nothing_like(masks: np.ndarray | None) -> dict:
    """Ground truth without an object."""
    return {
        "gt_boxes": np.zeros((0, 4)),
        "gt_class_labels": np.zeros(0, dtype=np.int64),
        "gt_is_difficult_list": np.zeros(0, dtype=bool),
        "gt_is_group_of_list": np.zeros(0, dtype=bool),
        "gt_masks": None if masks is None else masks[:0],
    }


def _mean(values: np.ndarray) -> np.float64:
    """Mean of the values that are not NaN; NaN without any."""
    known = values[~np.isnan(values)]
    return known.mean() if known.size else np.float64(np.nan)
