"""Data sets, transforms, batches and COCO metrics of PyPI effdet."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import torch

import effdet.data.loader
from effdet import CocoEvaluator
from effdet.data import (
    DetectionDatset,
    create_dataset,
    create_loader,
    create_parser,
    dataset_config,
    resolve_input_config,
    transforms_coco_eval,
    transforms_coco_train,
)
from effdet.data.parsers import CocoParserCfg, VocParserCfg

from . import task


def _coco(ann_file: str, img_dir: str, **settings: Any) -> DetectionDatset:
    cfg = CocoParserCfg(ann_filename=ann_file, **settings)
    return DetectionDatset(Path(img_dir), parser="coco", parser_kwargs={"cfg": cfg})


@task
def coco_parsed(ann_file: str, **settings: Any) -> dict:
    """All that the parser tells about a file."""
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=ann_file, **settings))
    names = ("cat_names", "cat_ids", "cat_dicts", "max_label", "img_ids", "img_ids_invalid")
    return {
        **{name: getattr(parser, name) for name in (*names, "img_infos")},
        "anns": [parser.get_ann_info(index) for index in range(len(parser.img_ids))],
    }


@task
def transformed(
    ann_file: str, img_dir: str, train: bool, seed: int, indices: list, **settings: Any
) -> list:
    """Samples of a COCO data set after the built-in transforms, `random` seeded for each."""
    dataset = _coco(ann_file, img_dir)
    make = transforms_coco_train if train else transforms_coco_eval
    dataset.transform = make(use_prefetcher=True, **settings)
    samples = []
    for index in indices:
        random.seed(seed + index)
        samples.append(dataset[index])
    return samples


@task
def first_batch(ann_file: str, img_dir: str, size: int, batch_size: int) -> tuple:
    """The uint8 images and targets of the evaluation loader's first batch."""
    prefetch = effdet.data.loader.PrefetchLoader
    effdet.data.loader.PrefetchLoader = lambda loader, **settings: loader  # it needs CUDA
    try:
        loader = create_loader(_coco(ann_file, img_dir), (3, size, size), batch_size, num_workers=0)
    finally:
        effdet.data.loader.PrefetchLoader = prefetch
    return next(iter(loader))


@task
def coco_ap(ann_file: str, img_dir: str, detections: torch.Tensor, img_idx: torch.Tensor) -> float:
    """AP of the evaluator."""
    evaluator = CocoEvaluator(_coco(ann_file, img_dir))
    evaluator.add_predictions(detections, {"img_idx": img_idx})
    return float(evaluator.evaluate())


@task
def voc_parsed(**settings: Any) -> dict:
    """Categories, images and annotations of one VOC split."""
    parser = create_parser("voc", cfg=VocParserCfg(**settings))
    return {
        "cat_id_to_label": parser.cat_id_to_label,
        "cat_dicts": parser.cat_dicts,
        "img_infos": parser.img_infos,
        "anns": [parser.get_ann_info(index) for index in range(len(parser.img_ids))],
    }


@task
def voc0712_files(root: str) -> list:
    """File names of the merged training split."""
    return [info["file_name"] for info in create_dataset("voc0712", root, "train").parser.img_infos]


@task
def dataset_configs() -> dict:
    """Field values of every data set config."""
    return {
        name: dataclasses.asdict(value())
        for name, value in vars(dataset_config).items()
        if isinstance(value, type) and dataclasses.is_dataclass(value)
    }


@task
def input_config(args: dict, model_config: dict) -> dict:
    """Resolved input settings."""
    return resolve_input_config(args, model_config)
