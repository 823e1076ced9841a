"""Pascal VOC annotations."""

from __future__ import annotations

import os
from xml.etree import ElementTree

import numpy as np

from .parser import AnnotationError, BoxAudit, Parser, image_size
from .parser_config import VocParserCfg

_VOC_CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa"),
    *("train", "tvmonitor"),
)


class VocParser(Parser):
    """Images of a VOC split file and the boxes of their XML files; labels are 1..20.

    VOC counts pixels from 1, so 1 is subtracted from each coordinate. Unusable boxes are treated as
    by `CocoParser`.

    Raises:
        AnnotationError: broken XML, a class that is not in the list, a box that is not four numbers, or
            a `difficult` that is not 0 or 1; the message names the file.
        OSError: the split file or an annotation file cannot be opened.
    """

    def __init__(self, cfg: VocParserCfg):
        super().__init__(
            bbox_yxyx=cfg.bbox_yxyx,
            has_labels=cfg.has_labels,
            ignore_empty_gt=cfg.ignore_empty_gt,
            min_img_size=cfg.min_img_size,
        )
        self.correct_bbox = 1
        self.keep_difficult = cfg.keep_difficult
        self.anns: list[list[dict]] = []
        self._load_annotations(
            cfg.split_filename, cfg.img_filename, cfg.ann_filename, classes=cfg.classes
        )

    def merge(self, other: VocParser) -> None:
        """Append the images of another VOC parser with the same classes."""
        if self.cat_names != other.cat_names:
            raise ValueError(
                f"other: its classes {other.cat_names} differ from these {self.cat_names}"
            )
        self.img_ids += other.img_ids
        self.img_ids_invalid += other.img_ids_invalid
        self.img_infos += other.img_infos
        self.anns += other.anns

    def get_ann_info(self, idx: int) -> dict[str, np.ndarray]:
        """`bbox` float32 [n, 4], `cls` int64 [n] of image number `idx`."""
        return self._parse_ann_info(self.anns[idx])

    def get_ground_truth(self, idx: int) -> dict[str, np.ndarray]:
        """`bbox` and `cls` of all objects, whatever `keep_difficult` says, and `difficult` bool [n]."""
        anns = self.anns[idx]
        target = self._as_target([ann["bbox"] for ann in anns], [ann["label"] for ann in anns])
        return {**target, "difficult": np.array([ann["difficult"] > 0 for ann in anns], dtype=bool)}

    def _load_annotations(
        self,
        split_filename: str,
        img_filename: str,
        ann_filename: str,
        classes: list[str] | None = None,
    ) -> None:
        self.cat_names = list(classes or _VOC_CLASSES)
        self.cat_ids = list(self.cat_names)
        self._number_categories()

        with open(split_filename, encoding="utf-8-sig") as file:
            img_ids = [line.split()[0] for line in file if line.strip()]
        audit = BoxAudit()
        for img_id in img_ids:
            source = ann_filename % img_id
            width, height, anns = self._read_xml(source, audit)
            if not self._usable(width, height, bool(anns)):
                self.img_ids_invalid.append(img_id)
                continue
            self.img_ids.append(img_id)
            self.img_infos.append(
                {"id": img_id, "file_name": img_filename % img_id, "width": width, "height": height}
            )
            self.anns.append(anns)
        self._warn_images_left_out(split_filename)
        audit.warn(split_filename)

    def _read_xml(self, path: str, audit: BoxAudit) -> tuple[int, int, list[dict]]:
        with open(path, "rb") as file:
            try:
                root = ElementTree.parse(file).getroot()
            except ElementTree.ParseError as error:
                raise AnnotationError(f"{os.fspath(path)}: not valid XML ({error})") from error
        try:
            width, height = image_size(
                int(root.findtext("size/width", "")), int(root.findtext("size/height", "")), path
            )
        except ValueError as error:
            raise AnnotationError(
                f"{path}: takes <size> with positive <width> and <height> ({error})"
            ) from None

        anns = []
        for number, entry in enumerate(root.findall("object"), start=1):
            name = (entry.findtext("name") or "").strip()
            if name not in self.cat_id_to_label:
                raise AnnotationError(
                    f"{path}: object {number} is of class {name!r}, which is not one of "
                    f"{', '.join(self.cat_names)}"
                )
            sides = [entry.findtext(f"bndbox/{s}", "") for s in ("xmin", "ymin", "xmax", "ymax")]
            try:
                corners = tuple(float(side) - self.correct_bbox for side in sides)
            except ValueError:
                raise AnnotationError(
                    f"{path}: object {number} has the box {sides}; takes four numbers in <bndbox>"
                ) from None
            flag = (entry.findtext("difficult") or "0").strip()
            if flag not in ("0", "1"):
                raise AnnotationError(
                    f"{path}: object {number} has <difficult> {flag!r}; takes 0 or 1"
                )
            box = audit.fit(corners, width, height)
            if box is not None:
                label, difficult = self.cat_id_to_label[name], int(flag)
                anns.append({"label": label, "bbox": box, "difficult": difficult})
        return width, height, anns

    def _parse_ann_info(self, ann_info: list[dict]) -> dict[str, np.ndarray]:
        kept = [ann for ann in ann_info if self.keep_difficult or not ann["difficult"]]
        return self._as_target([ann["bbox"] for ann in kept], [ann["label"] for ann in kept])
