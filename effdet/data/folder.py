"""COCO-format folders as people have them."""

from __future__ import annotations

import glob
import json
import os
from pathlib import Path

from .dataset import DetectionDatset
from .parsers import AnnotationError, CocoParser, CocoParserCfg

_NAMES_SHOWN = 3


def coco_folder(
    root: str | os.PathLike,
    split: str,
    num_classes: int | None = None,
) -> DetectionDatset:
    """Data set from a folder with COCO annotations.

    The annotation file is the first of `instances_{split}.json`, `instances_{split}*.json`,
    `{split}.json` in `root/annotations` or `root`, then `root/{split}/_annotations.coco.json`,
    then `instances.json`. The pictures are in `root/{split}*`, `root/images/{split}`,
    `root/images` or `root`: the first that holds them all.

    Labels are 1..n by ascending category id; `parser.label_to_cat_id` maps them back. No image is
    left out for its size.

    Args:
        root: the folder.
        split: the name of the part, as file and folder names have it.
        num_classes: of the model to be used. If it is not the number of categories, but covers
            their ids (as the 90 classes of a COCO model do), the ids themselves are the labels.

    Raises:
        FileNotFoundError: no annotation file or no picture; the message lists what was looked for,
            or the number and the first of the missing pictures.
        AnnotationError: unusable annotations, no category, or a `num_classes` that does not fit.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder; expected a folder in COCO format")
    ann_file = _find_annotations(root, split)
    cfg = CocoParserCfg(ann_filename=str(ann_file), min_img_size=0, cat_ids_as_labels=False)
    parser = CocoParser(cfg)
    if not parser.img_ids or not parser.cat_ids:
        lacking = "images" if not parser.img_ids else "categories"
        raise AnnotationError(f"{ann_file}: lists no {lacking}")
    if num_classes is not None and num_classes != len(parser.cat_ids):
        smallest, largest = int(parser.cat_ids[0]), int(parser.cat_ids[-1])
        if smallest < 1 or num_classes < largest:
            raise AnnotationError(
                f"num_classes: got {num_classes}; {ann_file} has {len(parser.cat_ids)} categories "
                f"with ids from {smallest} up to {largest}"
            )
        cfg.cat_ids_as_labels = True
        parser = CocoParser(cfg)
    file_names = [info["file_name"] for info in parser.img_infos]
    return DetectionDatset(_find_images(root, split, ann_file, file_names), parser)


def listed_pictures(ann_file: str | Path) -> dict[Path, int | str]:
    """The pictures that a COCO annotation file lists, with their ids; annotations need not be there.

    They are looked for as `coco_folder` does, from the file's folder, or from the one above `annotations`.

    Raises:
        FileNotFoundError: no such file, or a picture is missing.
        AnnotationError: the file is none of COCO's.
    """
    ann_file = Path(ann_file)
    try:
        images = json.loads(ann_file.read_text(encoding="utf-8"))["images"]
        names = {str(image["file_name"]): image["id"] for image in images}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise AnnotationError(
            f"{ann_file}: is no COCO annotation file, which has a list of images with id and file_name"
        ) from error
    if not names:
        raise AnnotationError(f"{ann_file}: lists no images")
    root = ann_file.parent.parent if ann_file.parent.name == "annotations" else ann_file.parent
    split = ann_file.stem.removeprefix("instances_")
    folder = _find_images(root, split, ann_file, list(names))
    return {folder / name: image_id for name, image_id in names.items()}


def _find_annotations(root: Path, split: str) -> Path:
    folders = [root / "annotations", root]
    name = glob.escape(split)
    patterns = [f"instances_{name}.json", f"instances_{name}*.json", f"{name}.json"]
    candidates = [(folder, pattern) for pattern in patterns for folder in folders]
    candidates.append((root / split, "_annotations.coco.json"))
    candidates += [(folder, "instances.json") for folder in folders]
    for folder, pattern in candidates:
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise AnnotationError(
                f"split: {split!r} fits {', '.join(path.name for path in found)} in {folder}; name "
                f"one of them, e.g. {found[0].stem.removeprefix('instances_')!r}"
            )
        if found:
            return found[0]
    looked_for = [str((folder / pattern).relative_to(root)) for folder, pattern in candidates]
    voc = any(root.glob("VOC*/ImageSets"))
    hint = "; Pascal VOC is read by effdet.create_dataset and effdet eval --dataset" if voc else ""
    raise FileNotFoundError(
        f"{root}: no annotations of the split {split!r}; looked for {', '.join(looked_for)}{hint}"
    )


def _find_images(root: Path, split: str, ann_file: Path, file_names: list[str]) -> Path:
    """The folder that holds every picture; else say what the best one lacks."""
    stem = ann_file.stem.removeprefix("instances_")
    folders = [base / name for base in (root, root / "images") for name in (stem, split)]
    folders += [
        *sorted(root.glob(f"{glob.escape(split)}*")),
        root / "images",
        root,
        ann_file.parent,
    ]
    folders = [folder for folder in dict.fromkeys(folders) if folder.is_dir()]
    fewest, best = file_names, root
    for folder in folders:
        missing = [name for name in file_names if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(fewest):
            fewest, best = missing, folder
    if fewest is file_names:
        where = ", ".join(str(folder) for folder in folders)
    else:
        where = str(best)
    more = ", ..." if len(fewest) > _NAMES_SHOWN else ""
    raise FileNotFoundError(
        f"{ann_file}: {len(fewest)} of {len(file_names)} pictures are missing in {where}: "
        f"{', '.join(fewest[:_NAMES_SHOWN])}{more}"
    )
