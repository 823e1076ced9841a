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
    renumbered from 1, because COCO evaluation does not work without them. Names of categories that are
    numbers become text.

    Raises:
        AnnotationError: not JSON, not of the COCO form, or an entry that cannot be used; the
            message names the file and the entry.
        OSError: the file cannot be opened.
    """
    name = os.fspath(path)
    with open(path, encoding="utf-8-sig") as file:
        try:
            data = json.load(file)
        except (ValueError, RecursionError) as error:
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
    _warn_repeated([image["file_name"] for image in images], name, "file names")
    return set(ids)


def _warn_repeated(texts: list[str], name: str, what: str) -> None:
    repeated = [text for text, count in Counter(texts).items() if count > 1]
    if repeated:
        warnings.warn(
            f"{name}: {len(repeated)} {what} are listed under several ids, e.g. {repeated[0]}; each entry "
            "counts on its own, and what is kept by name is that of the last",
            stacklevel=5,
        )


def _check_categories(categories: list, name: str) -> set:
    for category in categories:
        _require(category, ("id", "name"), f"{name}: category")
        if not isinstance(category["id"], Integral):
            raise AnnotationError(
                f"{name}: category {category['name']!r} has id {category['id']!r}; takes a number"
            )
        if not isinstance(category["name"], (str, int)):
            raise AnnotationError(
                f"{name}: category {category['id']} has name {category['name']!r}; takes text"
            )
        category["name"] = str(category["name"])
    _warn_repeated([category["name"] for category in categories], name, "category names")
    ids = {category["id"] for category in categories}
    if len(ids) < len(categories):
        raise AnnotationError(f"{name}: two categories share an id")
    return ids


def _check_annotation(annotation: dict, images: set, categories: set, name: str) -> None:
    _require(annotation, ("image_id", "category_id", "bbox"), f"{name}: annotation")
    where = f"{name}: annotation {annotation.get('id')!r}"
    for key in ("image_id", "category_id", "id"):
        if not isinstance(annotation.get(key, 0), (int, str, type(None))):
            raise AnnotationError(f"{where}: {key} is {annotation[key]!r}; takes an id")
    if annotation["image_id"] not in images:
        raise AnnotationError(f"{where}: image_id {annotation['image_id']!r} is not in the images")
    if annotation["category_id"] not in categories:
        raise AnnotationError(
            f"{where}: category_id {annotation['category_id']!r} is not in the categories "
            f"{sorted(categories)}"
        )
    box = annotation["bbox"]
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise AnnotationError(f"{where}: bbox is {box!r}; takes four numbers [x, y, width, height]")
    for key in ("iscrowd", "ignore"):
        if annotation.get(key, 0) not in (0, 1, None):
            raise AnnotationError(f"{where}: {key} is {annotation[key]!r}; takes 0 or 1")
    annotation["iscrowd"] = int(bool(annotation.get("iscrowd")))
    if not _is_finite(annotation.get("area")):
        annotation["area"] = box[2] * box[3]


def _is_finite(value: object) -> bool:
    """Whether it is a number that a float holds."""
    try:
        return isinstance(value, Real) and math.isfinite(value)
    except OverflowError:
        return False


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
