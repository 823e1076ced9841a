"""Keys of the dictionaries that evaluators take, and of the fields of a `BoxList`."""

from __future__ import annotations


class BoxListFields:
    """Fields of a `BoxList`."""

    boxes = "boxes"
    classes = "classes"
    scores = "scores"
    weights = "weights"
    confidences = "confidences"
    objectness = "objectness"
    masks = "masks"
    boundaries = "boundaries"
    keypoints = "keypoints"
    keypoint_visibilities = "keypoint_visibilities"
    keypoint_heatmaps = "keypoint_heatmaps"
    is_crowd = "is_crowd"
    group_of = "group_of"


class DetectionResultFields:
    """Keys of the detections of an image."""

    key = "image_id"
    detection_boxes = "bbox"
    detection_scores = "score"
    detection_classes = "cls"
    detection_masks = "masks"


class InputDataFields:
    """Keys of the ground truth of an image."""

    image = "image"
    key = "image_id"
    filename = "filename"
    gt_boxes = "bbox"
    gt_classes = "cls"
    gt_confidences = "confidences"
    gt_label_types = "label_types"
    gt_image_classes = "img_cls"
    gt_image_confidences = "img_confidences"
    gt_labeled_classes = "labeled_cls"
    gt_is_crowd = "is_crowd"
    gt_area = "area"
    gt_difficult = "difficult"
    gt_group_of = "group_of"
    gt_instance_masks = "instance_masks"
    gt_instance_boundaries = "instance_boundaries"
    gt_instance_classes = "instance_classes"
    image_height = "img_height"
    image_width = "img_width"
    image_size = "img_size"
