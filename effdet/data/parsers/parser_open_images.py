"""OpenImages annotations (CSV files)."""

from __future__ import annotations

import contextlib
import csv
import math
from array import array
from collections.abc import Iterator
from pathlib import PurePosixPath

import numpy as np

from .parser import AnnotationError, BoxAudit, Parser
from .parser_config import OpenImagesParserCfg

_BOX_COLUMNS = ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax", "IsGroupOf")


class OpenImagesParser(Parser):
    """Images that have boxes, from three CSV files; labels are 1..n in the order of the classes.

    - `categories_filename`: no header, (LabelName, display name) per line;
    - `img_info_filename`: columns id, width, height;
    - `bbox_filename`: the columns of OpenImages, with coordinates relative to the image.

    Boxes around groups of objects are not training boxes. Unusable boxes are treated as by
    `CocoParser`. Without labels (`has_labels=False`) every image of the info file is listed.

    Raises:
        AnnotationError: a column is absent, or a row cannot be used; the message names the file and
            the line.
        NotImplementedError: segmentation (`task="seg"`), which is not available.
    """

    def __init__(self, cfg: OpenImagesParserCfg):
        super().__init__(
            bbox_yxyx=cfg.bbox_yxyx,
            has_labels=cfg.has_labels,
            ignore_empty_gt=cfg.ignore_empty_gt,
            min_img_size=cfg.min_img_size,
        )
        if cfg.task != "obj":
            raise NotImplementedError(f'task: got {cfg.task!r}; only "obj" (boxes) is available')
        self.img_prefix_levels = cfg.prefix_levels
        self._load_annotations(
            cfg.categories_filename,
            cfg.img_info_filename,
            cfg.img_filename,
            cfg.masks_filename,
            cfg.bbox_filename,
        )

    def get_ann_info(self, idx: int) -> dict[str, np.ndarray]:
        """`bbox` float32 [n, 4], `cls` int64 [n] of image number `idx`."""
        start, stop = self._img_to_ann[idx]
        return self._parse_ann_info(idx, slice(start, stop), self._anns)

    def get_ground_truth(self, idx: int) -> dict[str, np.ndarray]:
        """`bbox` and `cls` of single objects and of groups, and `group_of` bool [n]."""
        rows = {key: column[slice(*self._img_to_ann[idx])] for key, column in self._anns.items()}
        target = self._as_target(rows["bbox"][rows["valid"]], rows["label"][rows["valid"]])
        return {**target, "group_of": rows["group"][rows["valid"]]}

    def _load_annotations(
        self,
        categories_filename: str,
        img_info_filename: str,
        img_filename: str,
        masks_filename: str,
        bbox_filename: str,
    ) -> None:
        with open(categories_filename, newline="", encoding="utf-8-sig") as file:
            rows = [row for row in csv.reader(file) if row]
        self.cat_ids = [row[0] for row in rows]
        self.cat_names = [row[-1] for row in rows]
        self._number_categories()

        infos = {
            row["id"]: (_number(row, "width", where), _number(row, "height", where))
            for where, row in _read(img_info_filename, ("id", "width", "height"))
        }
        boxes, starts = self._read_boxes(bbox_filename, list(infos))
        self._img_to_ann: list[tuple[int, int]] = []
        for number, (img_id, (width, height)) in enumerate(infos.items()):
            first, last = starts[number], starts[number + 1]
            if self.has_labels and first == last:
                continue
            if not self._usable(width, height, True):
                self.img_ids_invalid.append(img_id)
                continue
            self.img_ids.append(img_id)
            name = str(PurePosixPath(*img_id[: self.img_prefix_levels], img_filename % img_id))
            info = {"id": img_id, "file_name": name, "width": int(width), "height": int(height)}
            self.img_infos.append(info)
            self._img_to_ann.append((first, last))
        self._warn_images_left_out(img_info_filename)
        self._fit_boxes(boxes, bbox_filename)

    def _read_boxes(self, bbox_filename: str, img_ids: list[str]) -> tuple[dict, np.ndarray]:
        """Columns of the box file sorted by image, and where each image starts."""
        order = {img_id: number for number, img_id in enumerate(img_ids)}
        image, label, group, corners = array("q"), array("q"), array("b"), array("d")
        for where, row in _read(bbox_filename, _BOX_COLUMNS) if self.has_labels else ():
            if row["ImageID"] not in order:
                raise AnnotationError(f"{where}: image {row['ImageID']!r} is not in the image list")
            if row["LabelName"] not in self.cat_id_to_label:
                raise AnnotationError(f"{where}: class {row['LabelName']!r} is not in the classes")
            image.append(order[row["ImageID"]])
            label.append(self.cat_id_to_label[row["LabelName"]])
            group.append(int(_number(row, "IsGroupOf", where)) > 0)
            corners.extend(_number(row, side, where) for side in ("XMin", "YMin", "XMax", "YMax"))
        sort = np.argsort(np.array(image, dtype=np.int64), kind="stable")
        starts = np.searchsorted(np.array(image, dtype=np.int64)[sort], np.arange(len(order) + 1))
        columns = {
            "bbox": np.array(corners, dtype=np.float64).reshape(-1, 4)[sort],
            "label": np.array(label, dtype=np.int64)[sort],
            "group": np.array(group, dtype=bool)[sort],
        }
        return columns, starts

    def _fit_boxes(self, boxes: dict, source: str) -> None:
        """Relative to pixel coordinates; `valid` marks the boxes that are usable."""
        audit = BoxAudit()
        valid = np.zeros(len(boxes["label"]), dtype=bool)
        for info, (start, stop) in zip(self.img_infos, self._img_to_ann, strict=True):
            width, height = info["width"], info["height"]
            for row in range(start, stop):
                corners = tuple((boxes["bbox"][row] * (width, height, width, height)).tolist())
                box = audit.fit(corners, width, height)
                if box is not None:
                    boxes["bbox"][row], valid[row] = box, True
        audit.warn(source)
        self._anns = {**boxes, "bbox": boxes["bbox"].astype(np.float32), "valid": valid}

    def _parse_ann_info(self, img_idx: int, ann_keys: slice, ann_values: dict) -> dict:
        rows = {key: column[ann_keys] for key, column in ann_values.items()}
        trained = rows["valid"] & ~rows["group"]
        return self._as_target(rows["bbox"][trained], rows["label"][trained])


def _read(path: str, columns: tuple[str, ...]) -> Iterator[tuple[str, dict]]:
    """("file, line n", row) of a CSV file with a header."""
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        missing = [column for column in columns if column not in (reader.fieldnames or ())]
        if missing:
            raise AnnotationError(
                f"{path}: lacks the columns {', '.join(missing)}; it has {reader.fieldnames}"
            )
        for row in reader:
            yield f"{path}, line {reader.line_num}", row


def _number(row: dict, column: str, where: str) -> float:
    with contextlib.suppress(TypeError, ValueError):
        value = float(row[column])
        if math.isfinite(value):
            return value
    raise AnnotationError(f"{where}: {column} is {row[column]!r}; takes a number")
