"""What every annotation parser gives: the image list, the categories, the boxes of an image."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np

# A box may overshoot the picture by rounding; only more than this many pixels counts as a defect.
_ROUNDING = 1.0


class AnnotationError(ValueError):
    """Annotations that cannot be used as they are. The message names the file and the entry."""


class Parser:
    """Base of the parsers.

    Attributes:
        cat_names, cat_ids: the categories in label order, and their ids in the annotation files.
        cat_id_to_label: id to label (1-based); empty where the ids themselves are the labels.
        img_ids, img_infos: one entry per usable image; an info has `file_name`, `width`, `height`.
        img_ids_invalid: images that were left out (too small, or without annotations if asked).
    """

    def __init__(
        self,
        bbox_yxyx: bool = False,
        has_labels: bool = True,
        include_masks: bool = False,
        include_bboxes_ignore: bool = False,
        ignore_empty_gt: bool = False,
        min_img_size: int = 32,
    ):
        self.yxyx = bbox_yxyx
        self.has_labels = has_labels
        self.include_masks = include_masks
        self.include_bboxes_ignore = include_bboxes_ignore
        self.ignore_empty_gt = ignore_empty_gt
        self.min_img_size = min_img_size
        self.label_offset = 1

        self.cat_names: list[str] = []
        self.cat_ids: list[int | str] = []
        self.cat_id_to_label: dict[int | str, int] = {}
        self.img_ids: list[int | str] = []
        self.img_ids_invalid: list[int | str] = []
        self.img_infos: list[dict] = []

    @property
    def cat_dicts(self) -> list[dict]:
        """[{"name", "id"}] with id = the label that a model is trained on."""
        return [
            {"name": name, "id": self.cat_id_to_label.get(cat_id, cat_id)}
            for name, cat_id in zip(self.cat_names, self.cat_ids, strict=True)
        ]

    @property
    def max_label(self) -> int:
        """Largest label, which is the `num_classes` that a model needs."""
        return max((category["id"] for category in self.cat_dicts), default=0)

    def label_to_cat_id(self, label: int) -> int | str:
        """Category id in the annotation files for a label.

        Raises:
            ValueError: the label belongs to no category (only where labels are not the ids).
        """
        if not self.cat_id_to_label:
            return label
        index = int(label) - self.label_offset
        if not 0 <= index < len(self.cat_ids):
            last = self.label_offset + len(self.cat_ids) - 1
            raise ValueError(
                f"class {label}: the data set has classes {self.label_offset}..{last} "
                f"({', '.join(map(str, self.cat_names[:5]))}{', ...' if last > 5 else ''})"
            )
        return self.cat_ids[index]

    def get_ann_info(self, idx: int) -> dict[str, np.ndarray]:
        """Annotations of image number `idx`: `bbox` float32 [n, 4] in pixels, `cls` int64 [n]."""
        raise NotImplementedError

    def get_ground_truth(self, idx: int) -> dict[str, np.ndarray]:
        """What image number `idx` is evaluated against: `get_ann_info`, and flags of boxes where there are such."""
        return self.get_ann_info(idx)

    def _number_categories(self) -> None:
        self.cat_id_to_label = {
            cat_id: index + self.label_offset for index, cat_id in enumerate(self.cat_ids)
        }

    def _usable(self, width: float, height: float, has_annotation: bool) -> bool:
        if min(width, height) < self.min_img_size:
            return False
        return has_annotation or not (self.has_labels and self.ignore_empty_gt)

    def _warn_images_left_out(self, source: str) -> None:
        if self.img_ids_invalid:
            why = f"shorter side below min_img_size={self.min_img_size}"
            if self.ignore_empty_gt:
                why += ", or no annotation"
            total = len(self.img_ids_invalid) + len(self.img_ids)
            warnings.warn(
                f"{source}: {len(self.img_ids_invalid)} of {total} images left out ({why})",
                stacklevel=2,
            )

    def _as_target(self, boxes, labels, ignored=()) -> dict[str, np.ndarray]:
        """Arrays from (x1, y1, x2, y2) per box and labels."""
        target = {"bbox": self._box_array(boxes), "cls": np.array(labels, dtype=np.int64)}
        if self.include_bboxes_ignore:
            target["bbox_ignore"] = self._box_array(ignored)
        return target

    def _box_array(self, boxes) -> np.ndarray:
        array = np.array(boxes, dtype=np.float32).reshape(-1, 4)
        return np.ascontiguousarray(array[:, [1, 0, 3, 2]]) if self.yxyx else array


class BoxAudit:
    """Makes boxes usable and counts what had to be changed, for one warning per file."""

    def __init__(self) -> None:
        self.total = self.dropped = self.clipped = 0

    def fit(self, box: tuple, width: float, height: float) -> tuple | None:
        """(x1, y1, x2, y2) clipped to the image; None under one pixel or wholly outside."""
        self.total += 1
        x1, y1, x2, y2 = box
        if not (x2 - x1 >= 1 and y2 - y1 >= 1) or x1 >= width or y1 >= height or x2 <= 0 or y2 <= 0:
            self.dropped += 1
            return None
        beyond = max(-x1, -y1, x2 - width, y2 - height)
        if beyond <= 0:
            return box
        self.clipped += beyond > _ROUNDING
        return max(x1, 0), max(y1, 0), min(x2, width), min(y2, height)

    def warn(self, source: str) -> None:
        """One warning, which names `source`, if boxes were left out or clipped."""
        if self.dropped or self.clipped:
            warnings.warn(
                f"{source}: of {self.total} boxes {self.dropped} left out (a side under one pixel, "
                f"or outside the image) and {self.clipped} clipped to the image",
                stacklevel=3,
            )


def image_size(width: Any, height: Any, source: str) -> tuple[int, int]:
    """Check a (width, height) read from an annotation file."""
    numbers = all(isinstance(side, (int, float)) for side in (width, height))
    if not numbers or width % 1 or height % 1 or min(width, height) < 1:
        raise AnnotationError(
            f"{source}: width={width!r}, height={height!r}; takes positive whole numbers"
        )
    return int(width), int(height)
