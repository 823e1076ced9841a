"""COCO annotations."""

from __future__ import annotations

import warnings

import numpy as np

from .coco_json import load_coco_json
from .parser import BoxAudit, Parser
from .parser_config import CocoParserCfg


class CocoParser(Parser):
    """Images and boxes of a COCO json.

    Labels are the category ids themselves (1..90 for COCO), or 1..n by ascending id with
    `cat_ids_as_labels=False`. Crowd regions are not training boxes (they are in `bbox_ignore` with
    `include_bboxes_ignore`), nor are annotations marked `ignore`. Boxes are clipped to the image;
    those with a side under one pixel or outside of the image are left out, with one warning that
    counts them. `coco`, the pycocotools index, keeps every annotation for the evaluation.

    Raises:
        AnnotationError: see `load_coco_json`.
    """

    def __init__(self, cfg: CocoParserCfg):
        super().__init__(
            bbox_yxyx=cfg.bbox_yxyx,
            has_labels=cfg.has_labels,
            include_masks=cfg.include_masks,
            include_bboxes_ignore=cfg.include_bboxes_ignore,
            ignore_empty_gt=cfg.ignore_empty_gt,
            min_img_size=cfg.min_img_size,
        )
        self.cat_ids_as_labels = cfg.cat_ids_as_labels
        self.ann_filename = cfg.ann_filename
        self._load_annotations(cfg.ann_filename)

    def get_ann_info(self, idx: int) -> dict[str, np.ndarray]:
        """`bbox` float32 [n, 4], `cls` int64 [n] (and `bbox_ignore`) of image number `idx`."""
        return self._parse_img_ann(self.img_ids[idx])

    def _load_annotations(self, ann_file: str) -> None:
        self.coco = load_coco_json(ann_file)
        categories = list(self.coco.cats.values())
        if not self.cat_ids_as_labels:
            categories.sort(key=lambda category: category["id"])
        self.cat_names = [category["name"] for category in categories]
        self.cat_ids = [category["id"] for category in categories]
        if not self.cat_ids_as_labels:
            self._number_categories()
        no_labels = [category["id"] for category in categories if category["id"] < 1]
        if no_labels and self.cat_ids_as_labels:
            warnings.warn(
                f"{ann_file}: the category ids {no_labels} are no labels, which "
                "count from 1: such objects are background; cat_ids_as_labels=False numbers categories",
                stacklevel=4,
            )

        annotated = {annotation["image_id"] for annotation in self.coco.anns.values()}
        for image in sorted(self.coco.imgs.values(), key=lambda image: _order(image["id"])):
            if not self._usable(image["width"], image["height"], image["id"] in annotated):
                self.img_ids_invalid.append(image["id"])
                continue
            self.img_ids.append(image["id"])
            self.img_infos.append({k: image[k] for k in ("id", "file_name", "width", "height")})
        self._warn_images_left_out(ann_file)

        audit = BoxAudit()
        for img_id in self.img_ids:
            self._parse_img_ann(img_id, audit)
        audit.warn(ann_file)

    def _parse_img_ann(self, img_id: int | str, audit: BoxAudit | None = None) -> dict:
        audit = audit or BoxAudit()
        image = self.coco.imgs[img_id]
        boxes, labels, ignored = [], [], []
        for annotation in self.coco.imgToAnns[img_id]:
            if annotation.get("ignore") or (self.include_masks and annotation["area"] <= 0):
                continue
            x, y, width, height = annotation["bbox"]
            box = audit.fit((x, y, x + width, y + height), image["width"], image["height"])
            if box is None:
                continue
            if annotation["iscrowd"]:
                ignored.append(box)
            else:
                cat_id = annotation["category_id"]
                boxes.append(box)
                labels.append(self.cat_id_to_label.get(cat_id, cat_id))
        return self._as_target(boxes, labels, ignored)


def _order(image_id: int | str) -> tuple[bool, int | str]:
    """Numbers before names, each in their own order."""
    return isinstance(image_id, str), image_id
