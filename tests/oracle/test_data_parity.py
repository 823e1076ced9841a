"""Data pipeline and COCO metric against PyPI effdet on the same files."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

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
from effdet.evaluator import CocoEvaluator

SIZES = ((61, 37), (40, 80), (128, 128), (300, 33))


def _annotate(images: list[dict]) -> list[dict]:
    """Boxes of every kind: usual, crowd, ignored, too thin."""
    rng = np.random.default_rng(0)
    annotations = []
    for image in images[:-1]:
        for kind in ({}, {}, {"iscrowd": 1}, {"ignore": 1}, {"thin": True}):
            left, top = rng.uniform(0, [image["width"] / 2, image["height"] / 2])
            width, height = rng.uniform(2, [image["width"] / 2, image["height"] / 2])
            if kind.pop("thin", False):
                height = 0.5
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([3, 7])),
                    "bbox": [left, top, width, height],
                    "area": width * height,
                    "iscrowd": 0,
                    **kind,
                }
            )
    return annotations


@pytest.fixture
def generated(tmp_path: Path) -> tuple[str, str]:
    images = []
    for index, (width, height) in enumerate(SIZES):
        pixels = np.random.default_rng(index).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{index}.png")
        images.append(
            {"id": 40 - index, "file_name": f"{index}.png", "width": width, "height": height}
        )
    data = {
        "images": images,
        "annotations": _annotate(images),
        "categories": [{"id": 3, "name": "cup"}, {"id": 7, "name": "jar"}],
    }
    path = tmp_path / "instances.json"
    path.write_text(json.dumps(data))
    return str(path), str(tmp_path)


@pytest.fixture
def photos(data_dir: Path) -> tuple[str, str]:
    return str(data_dir / "photos" / "instances.json"), str(data_dir / "photos" / "images")


def _dataset(files: tuple[str, str]) -> DetectionDatset:
    cfg = CocoParserCfg(ann_filename=files[0])
    return DetectionDatset(files[1], parser="coco", parser_kwargs={"cfg": cfg})


def _same(ours: object, theirs: object) -> None:
    """Equal, dtype included."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs)
        for key in theirs:
            _same(ours[key], theirs[key])
    elif isinstance(theirs, np.ndarray):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)
    elif isinstance(theirs, torch.Tensor):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    else:
        assert ours == theirs


SETTINGS = [
    {},
    {"bbox_yxyx": False, "min_img_size": 0},
    {"include_bboxes_ignore": True, "min_img_size": 100},
    {"ignore_empty_gt": True, "include_masks": True},
]


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_coco_parser(oracle, generated, settings):
    theirs = oracle.call("coco_parsed", ann_file=generated[0], **settings)
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=generated[0], **settings))
    for name in set(theirs) - {"anns"}:
        assert getattr(parser, name) == theirs[name], name
    assert sum(len(ann["cls"]) for ann in theirs["anns"]) > 0
    for index, ann in enumerate(theirs["anns"]):
        _same(parser.get_ann_info(index), ann)


def _check_transformed(oracle, files, train: bool, indices: list[int], **settings) -> None:
    seed = 5
    theirs = oracle.call(
        "transformed",
        ann_file=files[0],
        img_dir=files[1],
        train=train,
        seed=seed,
        indices=indices,
        **settings,
    )
    dataset = _dataset(files)
    make = transforms_coco_train if train else transforms_coco_eval
    dataset.transform = make(use_prefetcher=True, **settings)
    for index, (image, target) in zip(indices, theirs, strict=True):
        random.seed(seed + index)
        our_image, our_target = dataset[index]
        _same(our_image, image)
        _same(our_target, target)


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [96, (64, 128)])
def test_eval_transforms(oracle, generated, interpolation, size):
    _check_transformed(
        oracle,
        generated,
        False,
        [0, 1, 2],
        img_size=size,
        interpolation=interpolation,
        fill_color=7,
    )


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("interpolation", ["bilinear", "random"])
def test_train_transforms(oracle, generated, interpolation):
    _check_transformed(
        oracle, generated, True, [0, 1, 2] * 6, img_size=(96, 64), interpolation=interpolation
    )


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("train", [False, True])
def test_transforms_on_photos(oracle, photos, train):
    _check_transformed(oracle, photos, train, list(range(64)), img_size=256)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_loader_on_photos(oracle, photos):
    images, target = oracle.call(
        "first_batch", ann_file=photos[0], img_dir=photos[1], size=256, batch_size=16
    )
    loader = create_loader(_dataset(photos), (3, 256, 256), 16, num_workers=0, device="cpu")
    our_images, our_target = next(iter(loader))
    assert sorted(our_target) == sorted(target)
    for key in target:
        _same(our_target[key], target[key])
    uint8_images, _ = next(iter(loader.loader))
    _same(uint8_images, images)
    torch.testing.assert_close(our_images, (images.float() - loader.mean) / loader.std)


@pytest.mark.filterwarnings("ignore:.*left out")
def test_ap_on_photos(oracle, photos):
    dataset = _dataset(photos)
    detections = _noisy_detections(dataset)
    img_idx = torch.arange(len(dataset))
    theirs = oracle.call(
        "coco_ap", ann_file=photos[0], img_dir=photos[1], detections=detections, img_idx=img_idx
    )
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(detections, {"img_idx": img_idx})
    assert 0.1 < theirs < 0.9
    assert evaluator.evaluate() == pytest.approx(theirs, abs=1e-12)


def _noisy_detections(dataset: DetectionDatset) -> torch.Tensor:
    """Annotated boxes, moved and sometimes of the wrong class, as rows sorted by score."""
    rng = np.random.default_rng(1)
    rows = torch.zeros(len(dataset), 100, 6)
    for index in range(len(dataset)):
        ann = dataset.parser.get_ann_info(index)
        boxes = ann["bbox"][:, [1, 0, 3, 2]]
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes = boxes + rng.normal(0, 0.06, boxes.shape) * sides
        labels = np.where(rng.random(len(boxes)) < 0.8, ann["cls"], 1)
        scores = np.sort(rng.random(len(boxes)))[::-1]
        image = np.concatenate([boxes, scores[:, None], labels[:, None]], axis=1)
        rows[index, : len(image)] = torch.from_numpy(image).float()
    return rows


VOC_SETTINGS = [
    {},
    {"keep_difficult": False, "bbox_yxyx": False},
    {"classes": ["dog", "car", "person"], "ignore_empty_gt": True, "img_filename": "x/%s.png"},
]


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    objects = [("dog", 0, (1, 2, 20, 30)), ("car", 1, (5, 6, 50, 40)), ("person", 0, (3, 3, 9, 9))]
    for year in ("2007", "2012"):
        root = tmp_path / f"VOC{year}"
        for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
            (root / folder).mkdir(parents=True)
        names = [f"{year}_{count}" for count in range(len(objects) + 1)]
        for count, name in enumerate(names):
            xml = "".join(
                f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
                + "".join(
                    f"<{side}>{value}</{side}>"
                    for side, value in zip(("xmin", "ymin", "xmax", "ymax"), box, strict=True)
                )
                + "</bndbox></object>"
                for label, difficult, box in objects[:count]
            )
            size = "<size><width>60</width><height>50</height></size>"
            (root / "Annotations" / f"{name}.xml").write_text(
                f"<annotation>{size}{xml}</annotation>"
            )
        (root / "ImageSets" / "Main" / "trainval.txt").write_text("\n".join(names) + "\n")
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize("settings", VOC_SETTINGS, ids=str)
def test_voc_parser(oracle, voc, settings):
    root = voc / "VOC2007"
    settings = {
        "split_filename": str(root / "ImageSets/Main/trainval.txt"),
        "ann_filename": str(root / "Annotations/%s.xml"),
        "img_filename": "%s.jpg",
        **settings,
    }
    theirs = oracle.call("voc_parsed", **settings)
    parser = create_parser("voc", cfg=VocParserCfg(**settings))
    for name in set(theirs) - {"anns"}:
        assert getattr(parser, name) == theirs[name], name
    for index, ann in enumerate(theirs["anns"]):
        _same(parser.get_ann_info(index), ann)


def test_voc0712_is_merged(oracle, voc):
    dataset = create_dataset("voc0712", voc, "train")
    ours = [info["file_name"] for info in dataset.parser.img_infos]
    assert ours == oracle.call("voc0712_files", root=str(voc))


def test_dataset_configs(oracle):
    theirs = oracle.call("dataset_configs")
    for name, fields in theirs.items():
        ours = dataclasses.asdict(getattr(dataset_config, name)())
        if fields["parser"] == "voc":
            assert ours.pop("num_classes") == 20  # the peer has 80, which are not VOC's
            fields.pop("num_classes")
        assert ours == fields, name


@pytest.mark.parametrize(
    "model_config", [{}, {"image_size": (256, 128), "fill_color": 7, "interpolation": "bilinear"}]
)
@pytest.mark.parametrize(
    "args",
    [
        {},
        {"mean": [0.5], "std": [1, 2, 3], "fill_color": 3},
        {"interpolation": "bicubic", "mean": None},
    ],
)
def test_input_config(oracle, args, model_config):
    theirs = oracle.call("input_config", args=args, model_config=model_config)
    assert resolve_input_config(args, model_config) == theirs
