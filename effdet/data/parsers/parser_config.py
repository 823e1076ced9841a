"""Settings of the parsers.

Common fields: `bbox_yxyx` gives boxes as (y1, x1, y2, x2) instead of (x1, y1, x2, y2);
`min_img_size` leaves out images with a shorter side below it; `ignore_empty_gt` leaves out images
without any annotation; `has_labels=False` reads the image list only. Accepted without effect, for
programs that set them: `add_background` (labels always count from 1, 0 is the background),
`img_label_filename`, `masks_filename`.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CocoParserCfg", "OpenImagesParserCfg", "VocParserCfg"]


@dataclass
class CocoParserCfg:
    """Settings of `CocoParser`.

    `include_masks` leaves out annotations of zero area; `cat_ids_as_labels=False` numbers the
    categories 1..n by ascending id instead of taking the ids as labels.
    """

    ann_filename: str
    include_masks: bool = False
    include_bboxes_ignore: bool = False
    has_labels: bool = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False
    cat_ids_as_labels: bool = True


@dataclass
class VocParserCfg:
    """Settings of `VocParser`.

    `ann_filename` and `img_filename` hold a `%s` for the image id; `classes` default to VOC's 20.
    """

    split_filename: str
    ann_filename: str
    img_filename: str = "%s.jpg"
    keep_difficult: bool = True
    classes: list | None = None
    add_background: bool = True
    has_labels: bool = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False


@dataclass
class OpenImagesParserCfg:
    """`prefix_levels` = folders named after the first characters of the image id."""

    categories_filename: str
    img_info_filename: str
    bbox_filename: str
    img_label_filename: str = ""
    masks_filename: str = ""
    img_filename: str = "%s.jpg"
    task: str = "obj"
    prefix_levels: int = 1
    add_background: bool = True
    has_labels: bool = True
    bbox_yxyx: bool = True
    min_img_size: int = 32
    ignore_empty_gt: bool = False
