"""Reading and checking a COCO annotation file."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import warnings
from collections import Counter
from numbers import Integral, Real
from typing import TYPE_CHECKING

from .parser import AnnotationError, image_size

if TYPE_CHECKING:
    from pycocotools.coco import COCO


def load_coco_json(path: str | os.PathLike) -> COCO:
    """Read a COCO file into an index of pycocotools, with its references and numbers checked.

    Absent `iscrowd` and `area` are filled in, and annotation ids that are absent, repeated or 0 are
    renumbered from 1, because COCO evaluation does not work without them.

    Raises:
        AnnotationError: not JSON, not of the COCO form, or an entry that cannot be used; the
            message names the file and the entry.
        OSError: the file cannot be opened.
    """
    name = os.fspath(path)
    with open(path, encoding="utf-8") as file:
        try:
            data = json.load(file)
        except ValueError as error:
            raise AnnotationError(f"{name}: not valid JSON ({error})") from error
    if not isinstance(data, dict) or not isinstance(data.get("images"), list):
        raise AnnotationError(
            f'{name}: not a COCO file; expected an object with the lists "images", "annotations" '
            'and "categories"'
        )
    for key in ("annotations", "categories"):
        data[key] = data.get(key) or []
    images = _check_images(data["images"], name)
    categories = _check_categories(data["categories"], name)
    for annotation in data["annotations"]:
        _check_annotation(annotation, images, categories, name)
    _number_annotations(data["annotations"])
    return make_coco(data)


def make_coco(data: dict) -> COCO:
    """Index a COCO dict without the messages that pycocotools prints."""
    from pycocotools.coco import COCO

    coco = COCO()
    coco.dataset = data
    with contextlib.redirect_stdout(io.StringIO()):
        coco.createIndex()
    return coco


def _check_images(images: list, name: str) -> set:
    for image in images:
        _require(image, ("id", "file_name", "width", "height"), f"{name}: image")
        where = f"{name}: image {image['id']!r} ({image['file_name']})"
        if not isinstance(image["id"], (int, str)) or not isinstance(image["file_name"], str):
            raise AnnotationError(f"{where}: takes a number or text as id, and text as file_name")
        image["width"], image["height"] = image_size(image["width"], image["height"], where)
    ids = Counter(image["id"] for image in images)
    repeated = [image_id for image_id, count in ids.items() if count > 1]
    if repeated:
        raise AnnotationError(f"{name}: image id {repeated[0]!r} occurs twice")
    file_names = Counter(image["file_name"] for image in images)
    repeated = [file_name for file_name, count in file_names.items() if count > 1]
    if repeated:
        warnings.warn(
            f"{name}: {len(repeated)} file names are listed under several image ids, e.g. "
            f"{repeated[0]}; each entry counts as an image of its own",
            stacklevel=4,
        )
    return set(ids)


def _check_categories(categories: list, name: str) -> set:
    for category in categories:
        _require(category, ("id", "name"), f"{name}: category")
        if not isinstance(category["id"], Integral):
            raise AnnotationError(
                f"{name}: category {category['name']!r} has id {category['id']!r}; takes a number"
            )
    ids = {category["id"] for category in categories}
    if len(ids) < len(categories):
        raise AnnotationError(f"{name}: two categories share an id")
    return ids


def _check_annotation(annotation: dict, images: set, categories: set, name: str) -> None:
    _require(annotation, ("image_id", "category_id", "bbox"), f"{name}: annotation")
    where = f"{name}: annotation {annotation.get('id')!r}"
    for key in ("image_id", "category_id"):
        if not isinstance(annotation[key], (int, str)):
            raise AnnotationError(f"{where}: {key} is {annotation[key]!r}; takes an id")
    if annotation["image_id"] not in images:
        raise AnnotationError(f"{where}: image_id {annotation['image_id']!r} is not in the images")
    if annotation["category_id"] not in categories:
        raise AnnotationError(
            f"{where}: category_id {annotation['category_id']!r} is not in the categories "
            f"{sorted(categories)}"
        )
    box = annotation["bbox"]
    numbers = isinstance(box, list) and all(isinstance(v, Real) and math.isfinite(v) for v in box)
    if not numbers or len(box) != 4:
        raise AnnotationError(f"{where}: bbox is {box!r}; takes four numbers [x, y, width, height]")
    annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
    if not isinstance(annotation.get("area"), Real):
        annotation["area"] = box[2] * box[3]


def _require(entry: dict, keys: tuple[str, ...], what: str) -> None:
    missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
    if missing:
        raise AnnotationError(f"{what} {str(entry)[:120]} lacks {', '.join(missing)}")


def _number_annotations(annotations: list) -> None:
    """COCO evaluation takes id 0 for "no match", and an index loses repeated ids."""
    ids = {annotation.get("id") for annotation in annotations}
    if len(ids) < len(annotations) or ids & {0, None}:
        for number, annotation in enumerate(annotations, start=1):
            annotation["id"] = number
