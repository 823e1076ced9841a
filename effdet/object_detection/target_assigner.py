"""Classification and regression targets of the anchors of one image."""

from __future__ import annotations

import torch
from torch import Tensor

from .argmax_matcher import ArgMaxMatcher
from .box_coder import FasterRcnnBoxCoder
from .box_list import BoxList
from .matcher import Match
from .region_similarity_calculator import IouSimilarity

KEYPOINTS_FIELD_NAME = "keypoints"


class TargetAssigner:
    """Match anchors to ground truth and encode what each anchor is to predict.

    Args:
        similarity_calc: has ``compare(groundtruth, anchors) -> [rows, columns]``.
        matcher: has ``match(similarity) -> Match``.
        box_coder: encodes the matched box relative to its anchor.
        negative_class_weight: classification weight of unmatched anchors.
        unmatched_cls_target: class target of unmatched anchors; ``None`` for 0.
        keypoints_field_name: accepted for compatibility; keypoints are not encoded.
    """

    def __init__(
        self,
        similarity_calc: IouSimilarity,
        matcher: ArgMaxMatcher,
        box_coder: FasterRcnnBoxCoder,
        negative_class_weight: float = 1.0,
        unmatched_cls_target: float | None = None,
        keypoints_field_name: str = KEYPOINTS_FIELD_NAME,
    ) -> None:
        self._similarity_calc = similarity_calc
        self._matcher = matcher
        self._box_coder = box_coder
        self._negative_class_weight = negative_class_weight
        self._unmatched_cls_target = 0.0 if unmatched_cls_target is None else unmatched_cls_target
        self._keypoints_field_name = keypoints_field_name

    def box_coder(self) -> FasterRcnnBoxCoder:
        """The coder that makes the regression targets."""
        return self._box_coder

    def assign(
        self,
        anchors: BoxList,
        groundtruth_boxes: BoxList,
        groundtruth_labels: Tensor | None = None,
        groundtruth_weights: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Match]:
        """Targets of N anchors given M ground truth boxes.

        Args:
            anchors: N boxes.
            groundtruth_boxes: M boxes.
            groundtruth_labels: ``[M]``; ones by default.
            groundtruth_weights: accepted for compatibility; weights come from
                ``_create_regression_weights`` and ``_create_classification_weights``.

        Returns:
            class targets ``[N]`` of the labels' dtype, regression targets ``[N, code size]``
            (0 where unmatched or ignored), and the ``Match``.
        """
        for name, value in (("anchors", anchors), ("groundtruth_boxes", groundtruth_boxes)):
            if not isinstance(value, BoxList):
                raise ValueError(f"{name} must be a BoxList, got {type(value).__name__}")
        if groundtruth_labels is None:
            groundtruth_labels = groundtruth_boxes.boxes().new_ones(groundtruth_boxes.num_boxes())
        if groundtruth_labels.shape[:1] != (groundtruth_boxes.num_boxes(),):
            raise ValueError(
                f"groundtruth_labels must have {groundtruth_boxes.num_boxes()} rows, one per "
                f"ground truth box, got {list(groundtruth_labels.shape)}"
            )
        match = self._matcher.match(self._similarity_calc.compare(groundtruth_boxes, anchors))
        reg_targets = self._create_regression_targets(anchors, groundtruth_boxes, match)
        cls_targets = self._create_classification_targets(groundtruth_labels, match)
        return cls_targets, reg_targets, match

    def _create_regression_targets(
        self, anchors: BoxList, groundtruth_boxes: BoxList, match: Match
    ) -> Tensor:
        zeros = self._default_regression_target(anchors.device())
        boxes = match.gather_based_on_match(groundtruth_boxes.boxes(), zeros, zeros)
        codes = self._box_coder.encode(BoxList(boxes), anchors)
        return torch.where(match.matched_column_indicator()[:, None], codes, zeros)

    def _default_regression_target(self, device: torch.device) -> Tensor:
        return torch.zeros(1, self._box_coder.code_size(), device=device)

    def _create_classification_targets(self, groundtruth_labels: Tensor, match: Match) -> Tensor:
        background = self._unmatched_cls_target
        return match.gather_based_on_match(groundtruth_labels, background, background)

    def _create_regression_weights(self, match: Match, groundtruth_weights: Tensor) -> Tensor:
        return match.gather_based_on_match(groundtruth_weights, 0.0, 0.0)

    def _create_classification_weights(self, match: Match, groundtruth_weights: Tensor) -> Tensor:
        return match.gather_based_on_match(groundtruth_weights, self._negative_class_weight, 0.0)
