"""Data sets by name, in their published folder layout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from .dataset import DetectionDatset
from .dataset_config import (
    Coco2014Cfg,
    Coco2017Cfg,
    CocoCfg,
    OpenImagesCfg,
    OpenImagesObjChallenge2019Cfg,
    OpenImagesObjV5Cfg,
    Voc0712Cfg,
    Voc2007Cfg,
    Voc2012Cfg,
    VocCfg,
)
from .parsers import (
    CocoParser,
    CocoParserCfg,
    OpenImagesParser,
    OpenImagesParserCfg,
    VocParser,
    VocParserCfg,
)

_CONFIGS = {
    "coco2014": Coco2014Cfg,
    "coco": Coco2017Cfg,
    "voc0712": Voc0712Cfg,
    "voc2007": Voc2007Cfg,
    "voc": Voc2012Cfg,
    "openimages-challenge2019": OpenImagesObjChallenge2019Cfg,
    "openimages": OpenImagesObjV5Cfg,
}


def create_dataset(
    name: str,
    root: str | os.PathLike,
    splits: str | Sequence[str] = ("train", "val"),
    custom_dataset_cfg: CocoCfg | VocCfg | OpenImagesCfg | None = None,
) -> DetectionDatset | list[DetectionDatset]:
    """Data set by name, with the files where its publisher puts them under `root`.

    Args:
        name: starts with coco (2017), coco2014, voc (2012), voc2007, voc0712, openimages or
            openimages-challenge2019.
        root: folder of the data set.
        splits: a name gives one data set, a sequence a list (one data set if it has one entry).
        custom_dataset_cfg: where the files are under `root`, in place of what the name says.

    Raises:
        ValueError: an unknown name or split.
        FileNotFoundError: the annotation file is not there; the message names it.
    """
    config = custom_dataset_cfg or _config(name)
    names = [splits] if isinstance(splits, str) else list(splits)
    datasets = [_create_split(config, Path(root), split) for split in names]
    return datasets if len(datasets) > 1 else datasets[0]


def _config(name: str) -> CocoCfg | VocCfg | OpenImagesCfg:
    key = next((prefix for prefix in _CONFIGS if name.lower().startswith(prefix)), None)
    if key is None:
        raise ValueError(f"name: got {name!r}; takes a name starting with {', '.join(_CONFIGS)}")
    return _CONFIGS[key]()


def _create_split(config, root: Path, split: str) -> DetectionDatset:
    if split not in config.splits:
        raise ValueError(f"splits: got {split!r}; takes {', '.join(config.splits)}")
    files = config.splits[split]
    if config.parser == "coco":
        if not files["ann_filename"]:
            raise ValueError(f"splits: {split!r} of COCO {config.variant} has no annotation file")
        coco_cfg = CocoParserCfg(
            ann_filename=str(root / files["ann_filename"]), has_labels=files["has_labels"]
        )
        return DetectionDatset(root / files["img_dir"], CocoParser(coco_cfg))
    if config.parser == "voc":
        return DetectionDatset(root, _voc_parser(config, root, files))
    if not files["img_info"]:
        raise ValueError(f"splits: {split!r} of {config.parser} has no list of image sizes")
    open_images_cfg = OpenImagesParserCfg(
        categories_filename=str(root / config.categories_map),
        img_info_filename=str(root / files["img_info"]),
        bbox_filename=str(root / files["ann_bbox"]),
        img_label_filename=str(root / files["ann_img_label"]),
        prefix_levels=files["prefix_levels"],
        has_labels=files["has_labels"],
    )
    return DetectionDatset(root / files["img_dir"], OpenImagesParser(open_images_cfg))


def _voc_parser(config, root: Path, files: dict) -> VocParser:
    """One parser over all years of a split; file names are relative to the root."""

    def listed(key: str) -> list[str]:
        return [files[key]] if isinstance(files[key], str) else files[key]

    parsers = [
        VocParser(
            VocParserCfg(
                split_filename=str(root / split_filename),
                ann_filename=str(root / ann_filename),
                img_filename=str(Path(img_dir) / config.img_filename),
            )
        )
        for split_filename, ann_filename, img_dir in zip(
            listed("split_filename"), listed("ann_filename"), listed("img_dir"), strict=True
        )
    ]
    merged = parsers[0]
    for parser in parsers[1:]:
        merged.merge(parser)
    return merged
