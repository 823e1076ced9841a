"""What programs written for PyPI effdet do with data: each test is such a program in small."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import create_dataset, create_evaluator, create_loader, create_model
from effdet.anchors import AnchorLabeler, Anchors
from effdet.data import DetectionDatset, SkipSubset, resolve_fill_color, resolve_input_config
from effdet.data.dataset_config import CocoCfg
from effdet.data.loader import DetectionFastCollate
from effdet.data.parsers import CocoParserCfg, create_parser
from effdet.data.parsers.parser import Parser
from effdet.data.transforms import Compose, ImageToNumpy, ResizePad
from effdet.evaluation.detection_evaluator import PascalDetectionEvaluator

SIZE = 64
BOX = [8, 4, 24, 32]  # x, y, width, height


@pytest.fixture
def root(tmp_path) -> Path:
    """Four pictures of 60 × 50 with a box each, in COCO's format, in folders of their own."""
    (tmp_path / "jpg").mkdir()
    for number in range(1, 5):
        pixels = np.random.default_rng(number).integers(0, 256, (50, 60, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "jpg" / f"{number}.png")
    data = {
        "images": [
            {"id": number, "file_name": f"{number}.png", "width": 60, "height": 50}
            for number in range(1, 5)
        ],
        "annotations": [
            {
                "id": number,
                "image_id": number,
                "category_id": 1 + number % 2,
                "bbox": BOX,
                "area": BOX[2] * BOX[3],
                "iscrowd": 0,
            }
            for number in range(1, 5)
        ],
        "categories": [{"id": 1, "name": "cup"}, {"id": 2, "name": "jar"}],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(data))
    return tmp_path


@pytest.fixture
def dataset(root) -> DetectionDatset:
    parser = create_parser("coco", cfg=CocoParserCfg(ann_filename=str(root / "boxes.json")))
    return DetectionDatset(str(root / "jpg"), parser=parser)


def _bench(labeler: bool, task: str = "train"):
    torch.manual_seed(0)
    return create_model(
        "efficientdet_nano",
        bench_task=task,
        num_classes=2,
        pretrained_backbone=False,
        bench_labeler=labeler,
        image_size=(SIZE, SIZE),
    )


def test_labels_made_in_the_loader_or_in_the_bench(dataset):
    bench = _bench(labeler=False)
    config = bench.config
    labeler = AnchorLabeler(Anchors.from_config(config), config.num_classes, match_threshold=0.5)
    input_config = resolve_input_config({"interpolation": "bilinear"}, model_config=config)
    losses = []
    for of_loader, model in ((labeler, bench), (None, _bench(labeler=True))):
        loader = create_loader(
            dataset,
            input_size=input_config["input_size"],
            batch_size=4,
            is_training=False,
            use_prefetcher=True,
            interpolation=input_config["interpolation"],
            fill_color=input_config["fill_color"],
            mean=input_config["mean"],
            std=input_config["std"],
            num_workers=0,
            distributed=False,
            pin_mem=False,
            anchor_labeler=of_loader,
            transform_fn=None,
            collate_fn=None,
            device="cpu",
        )
        images, target = next(iter(loader))
        assert ("label_num_positives" in target) == (of_loader is not None)
        losses.append(model(images, target)["loss"])
    torch.testing.assert_close(*losses)


def test_a_collate_function_and_transforms_of_their_own(dataset):
    dataset.transform = Compose(
        [
            ResizePad(
                target_size=(SIZE, SIZE),
                interpolation="bilinear",
                fill_color=resolve_fill_color("mean"),
            ),
            ImageToNumpy(),
        ]
    )
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=2, collate_fn=lambda batch: tuple(zip(*batch, strict=True))
    )
    bench = _bench(labeler=True)
    for images, targets in loader:
        x = torch.stack([torch.from_numpy(image).float() / 255 for image in images])
        target = {
            "bbox": [torch.as_tensor(target["bbox"]).float() for target in targets],
            "cls": [torch.as_tensor(target["cls"]).float() for target in targets],
            "img_scale": torch.tensor([target["img_scale"] for target in targets]),
            "img_size": torch.tensor([target["img_size"] for target in targets]).float(),
        }
        assert target["bbox"][0].tolist() == [
            pytest.approx([v * SIZE / 60 for v in (4, 8, 36, 32)])
        ]
        assert target["img_size"].tolist() == [[60, 50]] * 2
        bench.train()(x, target)["loss"].backward()
        with torch.no_grad():
            assert bench.eval()(x, target)["detections"].shape == (2, 100, 6)


def test_the_collate_of_the_library_in_their_loader(dataset):
    dataset.transform = Compose([ResizePad((SIZE, SIZE)), ImageToNumpy()])
    loader = torch.utils.data.DataLoader(dataset, 4, collate_fn=DetectionFastCollate())
    images, target = next(iter(loader))
    assert (images.dtype, images.shape) == (torch.uint8, (4, 3, SIZE, SIZE))
    assert target["bbox"].shape == (4, 100, 4) and target["cls"][:, 0].tolist() == [2, 1, 2, 1]


def test_a_layout_of_their_own(root):
    @dataclasses.dataclass
    class OwnCfg(CocoCfg):
        variant: str = "mine"
        splits: dict = dataclasses.field(
            default_factory=lambda: {
                split: {"ann_filename": "boxes.json", "img_dir": "jpg", "has_labels": True}
                for split in ("train", "val")
            }
        )

    train, val = create_dataset("coco", root, custom_dataset_cfg=OwnCfg())
    assert train.parser.max_label == 2 and len(SkipSubset(val, 2)) == 2
    image, target = val[0]
    assert image.size == (60, 50) and target["bbox"].tolist() == [[4, 8, 36, 32]]
    with pytest.raises(ValueError, match="splits: got 'test'; takes train, val"):
        create_dataset("coco", root, "test", custom_dataset_cfg=OwnCfg())


@pytest.mark.parametrize("name", ["coco", "mine"])
def test_evaluation_loop(dataset, name):
    """Their own detector, which finds half of the objects, by the loader's targets."""
    loader = create_loader(dataset, (3, SIZE, SIZE), 2, num_workers=0, device="cpu")
    evaluator = create_evaluator(name, loader.dataset, distributed=False, pred_yxyx=False)
    x, y, width, height = BOX
    for _, target in loader:
        boxes = torch.tensor([x, y, x + width, y + height, 0.9, 0]).repeat(2, 1, 1)
        boxes[:, 0, 5] = 1
        evaluator.add_predictions(boxes, target)
    assert evaluator.evaluate() == pytest.approx(0.5 * 0.5)


class _OwnParser(Parser):
    """Annotations out of a list."""

    def __init__(self, images: list[tuple[str, list]]):
        super().__init__(bbox_yxyx=True)
        self.cat_names = self.cat_ids = ["cup", "jar"]
        self.cat_id_to_label = {"cup": 1, "jar": 2}
        self.img_ids = [name for name, _ in images]
        self.img_infos = [{"id": n, "file_name": n, "width": 60, "height": 50} for n, _ in images]
        self._boxes = [boxes for _, boxes in images]

    def get_ann_info(self, idx: int) -> dict:
        boxes = np.array(self._boxes[idx], dtype=np.float32).reshape(-1, 4)
        return {"bbox": boxes, "cls": np.ones(len(boxes), dtype=np.int64)}


def test_a_parser_of_their_own(root):
    parser = _OwnParser([("1.png", [[4, 8, 36, 32]]), ("2.png", [])])
    dataset = DetectionDatset(root / "jpg", parser=parser)
    loader = create_loader(dataset, SIZE, 2, num_workers=0, device="cpu")
    _, target = next(iter(loader))
    assert (target["cls"] > 0).sum(dim=1).tolist() == [1, 0]
    evaluator = create_evaluator("voc-like", dataset)
    rows = torch.tensor([[[8, 4, 32, 36, 0.9, 1.0]], [[1, 1, 9, 9, 0.95, 1.0]]])
    evaluator.add_predictions(rows, target)
    assert evaluator.evaluate() == 0.5


def test_metrics_over_thresholds():
    """One evaluator for each IoU, whose numbers come from numpy; names are taken apart at slashes."""
    thresholds = np.round(np.arange(0.5, 1.0, 0.05), 2)
    truth = {"bbox": np.array([[0.0, 0, 10, 10]]), "cls": np.array([1])}
    found = {"bbox": np.array([[0.0, 0, 10, 7]]), "cls": np.array([1]), "score": np.array([0.9])}
    table = {}
    for threshold in thresholds:
        evaluator = PascalDetectionEvaluator([{"id": 1, "name": "cup"}], threshold)
        evaluator.add_single_ground_truth_image_info(0, truth)
        evaluator.add_single_detected_image_info(0, found)
        for name, value in evaluator.evaluate().items():
            table[threshold, "mean" if "Precision" in name else name.split("/")[-1]] = value
    assert table[0.65, "cup"] == table[0.7, "mean"] == 1
    assert table[0.75, "cup"] == table[0.95, "mean"] == 0
    assert f"PascalBoxes_Precision/mAP@{0.95}IOU" in evaluator.evaluate()


def test_settings_of_a_program_as_its_arguments(dataset):
    """A namespace's dictionary, with what the model does not say left out."""
    args = SimpleNamespace(mean=[0.5, 0.5, 0.5], std=None, interpolation=None, fill_color="0")
    settings = resolve_input_config(vars(args), model_config=_bench(False).config)
    assert settings["input_size"] == (3, SIZE, SIZE) and settings["mean"] == (0.5, 0.5, 0.5)
