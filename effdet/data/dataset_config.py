"""Where the files of the known data sets are, relative to the root folder of each."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CocoCfg:
    """Annotations in COCO's format: per split a JSON file and the folder of the pictures."""

    variant: str | None = None
    parser: str = "coco"
    num_classes: int = 80
    splits: dict[str, dict] | None = None


def _coco_split(ann_filename: str, img_dir: str, has_labels: bool = True) -> dict:
    return {"ann_filename": ann_filename, "img_dir": img_dir, "has_labels": has_labels}


def _coco2017_splits() -> dict[str, dict]:
    info = "annotations/image_info_test"
    return {
        "train": _coco_split("annotations/instances_train2017.json", "train2017"),
        "val": _coco_split("annotations/instances_val2017.json", "val2017"),
        "test": _coco_split(f"{info}2017.json", "test2017", has_labels=False),
        "testdev": _coco_split(f"{info}-dev2017.json", "test2017", has_labels=False),
    }


def _coco2014_splits() -> dict[str, dict]:
    return {
        "train": _coco_split("annotations/instances_train2014.json", "train2014"),
        "val": _coco_split("annotations/instances_val2014.json", "val2014"),
        "test": _coco_split("", "test2014", has_labels=False),
    }


@dataclass
class Coco2017Cfg(CocoCfg):
    """COCO 2017: train, val, test and test-dev; the last two without labels."""

    variant: str = "2017"
    splits: dict[str, dict] = field(default_factory=_coco2017_splits)


@dataclass
class Coco2014Cfg(CocoCfg):
    """COCO 2014: train, val, and test without labels."""

    variant: str = "2014"
    splits: dict[str, dict] = field(default_factory=_coco2014_splits)


@dataclass
class VocCfg:
    """Pascal VOC: per split a list of names, an XML file per picture, the folder of the pictures."""

    variant: str | None = None
    parser: str = "voc"
    num_classes: int = 20
    img_filename: str = "%s.jpg"
    splits: dict[str, dict] | None = None


def _voc_split(years: tuple[str, ...], split: str) -> dict:
    """Files of one year, or lists of them for several."""
    files = {
        "split_filename": [f"VOC{year}/ImageSets/Main/{split}.txt" for year in years],
        "ann_filename": [f"VOC{year}/Annotations/%s.xml" for year in years],
        "img_dir": [f"VOC{year}/JPEGImages" for year in years],
    }
    return files if len(years) > 1 else {key: value[0] for key, value in files.items()}


@dataclass
class Voc2007Cfg(VocCfg):
    """VOC 2007: train and val."""

    variant: str = "2007"
    splits: dict[str, dict] = field(
        default_factory=lambda: {s: _voc_split(("2007",), s) for s in ("train", "val")}
    )


@dataclass
class Voc2012Cfg(VocCfg):
    """VOC 2012: train and val."""

    variant: str = "2012"
    splits: dict[str, dict] = field(
        default_factory=lambda: {s: _voc_split(("2012",), s) for s in ("train", "val")}
    )


@dataclass
class Voc0712Cfg(VocCfg):
    """Trained on trainval of both years, evaluated on test of 2007."""

    variant: str = "0712"
    splits: dict[str, dict] = field(
        default_factory=lambda: {
            "train": _voc_split(("2007", "2012"), "trainval"),
            "val": _voc_split(("2007",), "test"),
        }
    )


@dataclass
class OpenImagesCfg:
    """Open Images: per split CSV files of boxes and of labels, and the folder of the pictures."""

    variant: str | None = None
    parser: str = "openimages"
    num_classes: int | None = None
    splits: dict[str, dict] | None = None


def _open_images_split(
    img_dir: str, img_info: str, ann: str, img_label: str, prefix_levels: int = 0
) -> dict:
    return {
        "img_dir": img_dir,
        "img_info": img_info,
        "has_labels": bool(ann),
        "prefix_levels": prefix_levels,
        "ann_bbox": ann,
        "ann_img_label": img_label,
    }


def _open_images_v5_splits() -> dict[str, dict]:
    def files(name: str) -> tuple[str, str]:
        stem = f"annotations/{name}-annotations"
        return f"{stem}-bbox.csv", f"{stem}-human-imagelabels-boxable.csv"

    train_info, val_info = "annotations/train-info.csv", "annotations/validation-info.csv"
    return {
        "train": _open_images_split("train", train_info, *files("train"), prefix_levels=1),
        "val": _open_images_split("validation", val_info, *files("validation")),
        "test": _open_images_split("test", "", *files("test")),
    }


def _open_images_challenge2019_splits() -> dict[str, dict]:
    folder = "annotations/challenge-2019"

    def files(name: str) -> tuple[str, str]:
        stem = f"{folder}/challenge-2019-{name}-detection"
        return f"{stem}-bbox.csv", f"{stem}-human-imagelabels.csv"

    train_info, val_info = "annotations/train-info.csv", "annotations/validation-info.csv"
    return {
        "train": _open_images_split("train", train_info, *files("train"), prefix_levels=1),
        "val": _open_images_split("validation", val_info, *files("validation")),
        "test": _open_images_split("challenge2019", f"{folder}/challenge2019-info", "", ""),
    }


@dataclass
class OpenImagesObjCfg(OpenImagesCfg):
    """Open Images with boxes: the 601 classes that have them."""

    num_classes: int = 601
    categories_map: str = "annotations/class-descriptions-boxable.csv"


@dataclass
class OpenImagesObjV5Cfg(OpenImagesObjCfg):
    """Open Images V5 with boxes: train, val and test."""

    splits: dict[str, dict] = field(default_factory=_open_images_v5_splits)


@dataclass
class OpenImagesObjChallenge2019Cfg(OpenImagesObjCfg):
    """The 500 classes of the Open Images challenge of 2019; test without labels."""

    num_classes: int = 500
    categories_map: str = "annotations/challenge-2019/challenge-2019-classes-description-500.csv"
    splits: dict[str, dict] = field(default_factory=_open_images_challenge2019_splits)


def _no_files() -> dict[str, dict]:
    return {"train": {}, "val": {}, "test": {}}


@dataclass
class OpenImagesSegCfg(OpenImagesCfg):
    """The class counts of the segmentation sets; their files are not described."""

    num_classes: int = 350
    categories_map: str = "annotations/classes-segmentation.txt"


@dataclass
class OpenImagesSegV5Cfg(OpenImagesSegCfg):
    """Segmentation of Open Images V5: a class count only."""

    num_classes: int = 300
    splits: dict[str, dict] = field(default_factory=_no_files)


@dataclass
class OpenImagesSegChallenge2019Cfg(OpenImagesSegCfg):
    """Segmentation of the challenge of 2019: a class count only."""

    num_classes: int = 300
    ann_class_map: str = (
        "annotations/challenge-2019/challenge-2019-classes-description-segmentable.csv"
    )
    splits: dict[str, dict] = field(default_factory=_no_files)
