"""Detections of one image against its ground truth."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .matching import match_detections
from .np_box_list import BoxList, ioa, iou, non_max_suppression
from .np_mask_list import EPSILON, MaskList, ioa_mask, iou_mask, non_max_suppression_mask

__all__ = ["EPSILON", "PerImageEvaluation"]


class PerImageEvaluation:
    """Judges detections; classes count from 0.

    Args:
        num_gt_classes: number of classes; boxes of others are left out.
        matching_iou_threshold: overlap that makes a match.
        nms_iou_threshold, nms_max_output_boxes: suppression of detections beforehand, by class;
            1.0 suppresses none.
        group_of_weight: what finding a group of objects is worth.
    """

    def __init__(
        self,
        num_gt_classes,
        matching_iou_threshold=0.5,
        nms_iou_threshold=0.3,
        nms_max_output_boxes=50,
        group_of_weight=0.0,
    ):
        self.num_gt_classes = num_gt_classes
        self.matching_iou_threshold = matching_iou_threshold
        self.nms_iou_threshold = nms_iou_threshold
        self.nms_max_output_boxes = nms_max_output_boxes
        self.group_of_weight = group_of_weight

    def compute_object_detection_metrics(
        self,
        detected_boxes,
        detected_scores,
        detected_class_labels,
        gt_boxes,
        gt_class_labels,
        gt_is_difficult_list,
        gt_is_group_of_list,
        detected_masks=None,
        gt_masks=None,
    ):
        """Scores and hits of each class.

        Args:
            detected_boxes: [n, 4]; a box without area is left out.
            detected_scores: [n].
            detected_class_labels: [n].
            gt_boxes: [m, 4].
            gt_class_labels: [m].
            gt_is_difficult_list: bool [m].
            gt_is_group_of_list: bool [m].
            detected_masks: uint8 [n, height, width]; overlap is then that of the masks.
            gt_masks: uint8 [m, height, width], if there are `detected_masks`.

        Returns:
            scores: for each class those of the detections that count, [k].
            tp_fp_labels: for each class how much of a hit each of them is, [k].
            is_class_correctly_detected_in_image: [classes] 1 where the best detection of the class
                overlaps an object of it, else 0.

        Raises:
            ValueError: lengths differ, or there are masks on one side only.
        """
        if (detected_masks is None) != (gt_masks is None):
            raise ValueError("detected_masks, gt_masks: one is None; take both or neither")
        found = _Boxes.of(
            detected_masks, detected_boxes, score=detected_scores, label=detected_class_labels
        )
        truth = _Boxes.of(
            gt_masks,
            gt_boxes,
            label=gt_class_labels,
            difficult=np.asarray(gt_is_difficult_list, dtype=bool),
            group=np.asarray(gt_is_group_of_list, dtype=bool),
        )
        found = found[np.flatnonzero((found.boxes[:, 2:] > found.boxes[:, :2]).all(axis=1))]
        scores = [np.zeros(0)] * self.num_gt_classes
        labels = [np.zeros(0)] * self.num_gt_classes
        located = np.zeros(self.num_gt_classes, dtype=np.int64)
        for number in np.unique(found.values["label"]).astype(np.int64):
            if 0 <= number < self.num_gt_classes:
                of_class = found[found.values["label"] == number]
                objects = truth[truth.values["label"] == number]
                best = of_class[of_class.values["score"].argmax(axis=0, keepdims=True)]
                located[number] = (best.iou(objects) >= self.matching_iou_threshold).any()
                scores[number], labels[number] = self._match(of_class, objects)
        return scores, labels, located

    def _match(self, found: _Boxes, objects: _Boxes) -> tuple[np.ndarray, np.ndarray]:
        """Scores and hits of one class."""
        found = found.suppressed(self.nms_iou_threshold, self.nms_max_output_boxes)
        is_group = objects.values["group"]
        single = objects[~is_group]
        return match_detections(
            found.values["score"],
            found.iou(single),
            single.values["difficult"],
            found.ioa(objects[is_group]),
            self.matching_iou_threshold,
            self.group_of_weight,
        )


@dataclass(frozen=True)
class _Boxes:
    """Boxes [n, 4], perhaps masks [n, height, width], and values [n] of each by name."""

    boxes: np.ndarray
    masks: np.ndarray | None
    values: dict[str, np.ndarray]

    @classmethod
    def of(cls, masks, boxes, **values) -> _Boxes:
        boxes = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
        values = {name: np.asarray(value) for name, value in values.items()}
        for name, value in [*values.items(), ("masks", masks)]:
            if value is not None and len(value) != len(boxes):
                raise ValueError(f"{name}: got {len(value)} for {len(boxes)} boxes")
        return cls(boxes, masks, values)

    def __getitem__(self, rows: np.ndarray) -> _Boxes:
        masks = None if self.masks is None else self.masks[rows]
        values = {name: value[rows] for name, value in self.values.items()}
        return _Boxes(self.boxes[rows], masks, values)

    def iou(self, other: _Boxes) -> np.ndarray:
        """Intersection over union [n, m]."""
        if self.masks is None:
            return iou(self.boxes, other.boxes)
        return iou_mask(self.masks, other.masks)

    def ioa(self, other: _Boxes) -> np.ndarray:
        """Shares [n, m] of these that lie in the others."""
        if self.masks is None:
            return ioa(other.boxes, self.boxes).T
        return ioa_mask(other.masks, self.masks).T

    def suppressed(self, threshold: float, limit: int) -> _Boxes:
        """From the highest score down, after non-maximum suppression."""
        boxes = BoxList(self.boxes) if self.masks is None else MaskList(self.boxes, self.masks)
        boxes.add_field("scores", self.values["score"])
        boxes.add_field("row", np.arange(len(self.boxes)))
        suppress = non_max_suppression if self.masks is None else non_max_suppression_mask
        return self[suppress(boxes, limit, threshold).get_field("row")]
