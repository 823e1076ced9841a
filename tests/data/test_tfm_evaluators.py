"""Pascal and OpenImages evaluators on data sets: parsers, ids, boxes both ways, several processes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from effdet.data import create_dataset, create_parser
from effdet.data.parsers import VocParserCfg
from effdet.evaluation.detection_evaluator import WeightedPascalDetectionEvaluator
from effdet.evaluator import OpenImagesEvaluator, PascalEvaluator, TfmEvaluator, create_evaluator

SIZE = "<size><width>60</width><height>50</height></size>"
# (name, difficult, box counted from 1) of each image
IMAGES = [
    [("dog", 0, (11, 11, 31, 31)), ("cat", 0, (1, 1, 21, 11))],
    [("dog", 0, (31, 11, 51, 31)), ("dog", 1, (1, 1, 11, 41))],
    [],
]
DOG, CAT = 12, 8


def _voc(root: Path, **settings) -> SimpleNamespace:
    names = [f"{count:06}" for count in range(len(IMAGES))]
    (root / "split.txt").write_text("\n".join(names))
    for name, objects in zip(names, IMAGES, strict=True):
        xml = "".join(
            f"<object><name>{label}</name><difficult>{difficult}</difficult><bndbox>"
            f"<xmin>{x1}</xmin><ymin>{y1}</ymin><xmax>{x2}</xmax><ymax>{y2}</ymax></bndbox></object>"
            for label, difficult, (x1, y1, x2, y2) in objects
        )
        (root / f"{name}.xml").write_text(f"<annotation>{SIZE}{xml}</annotation>")
    cfg = VocParserCfg(str(root / "split.txt"), str(root / "%s.xml"), **settings)
    return SimpleNamespace(parser=create_parser("voc", cfg=cfg))


@pytest.fixture
def voc(tmp_path) -> SimpleNamespace:
    return _voc(tmp_path)


def _rows() -> torch.Tensor:
    """Dogs: a hit, a miss, a difficult one, which does not count, a hit, of two; the cat is found."""
    rows = torch.zeros(3, 4, 6)
    rows[0, 0] = torch.tensor([10, 10, 30, 30, 0.9, DOG])
    rows[0, 1] = torch.tensor([0, 0, 20, 10, 0.0005, CAT])
    rows[1, 0] = torch.tensor([30, 10, 50, 30, 0.5, DOG])
    rows[1, 1] = torch.tensor([0, 0, 10, 40, 0.6, DOG])
    rows[2, 0] = torch.tensor([0, 0, 10, 40, 0.7, DOG])
    return rows


def _filled(evaluator, rows: torch.Tensor | None = None):
    evaluator.add_predictions(_rows() if rows is None else rows, {"img_idx": torch.arange(3)})
    return evaluator


DOGS = (1 + 2 / 3) / 2


def test_pascal(voc):
    evaluator = _filled(PascalEvaluator(voc))
    value = evaluator.evaluate()
    assert isinstance(value, float) and value == pytest.approx((DOGS + 1) / 2)
    assert evaluator.stats == {"AP50": value}
    assert evaluator.per_class["dog"] == {"AP50": pytest.approx(DOGS)}
    assert evaluator.per_class["cat"] == {"AP50": 1.0}
    assert math.isnan(evaluator.per_class["sheep"]["AP50"]) and len(evaluator.per_class) == 20
    assert evaluator.metrics["PascalBoxes_Precision/mAP@0.5IOU"] == value
    assert evaluator.evaluate() == value
    evaluator.reset()
    assert evaluator.stats == {} and evaluator.per_class == {} and evaluator.metrics == {}
    with pytest.raises(ValueError, match="no predictions were added"):
        evaluator.evaluate()
    assert _filled(evaluator, torch.zeros(3, 4, 6)).evaluate() == 0.0


def test_only_images_seen_count(voc):
    evaluator = PascalEvaluator(voc)
    evaluator.add_predictions(_rows()[:1], {"img_idx": torch.tensor([0])})
    assert evaluator.evaluate() == 1.0


def test_boxes_both_ways(tmp_path):
    """The parser and the detections each as (y, x) or (x, y)."""
    swapped = _rows()[..., [1, 0, 3, 2, 4, 5]]
    for bbox_yxyx in (False, True):
        voc = _voc(tmp_path, bbox_yxyx=bbox_yxyx)
        assert _filled(PascalEvaluator(voc)).evaluate() == pytest.approx((DOGS + 1) / 2)
        evaluator = _filled(PascalEvaluator(voc, pred_yxyx=True), swapped)
        assert evaluator.evaluate() == pytest.approx((DOGS + 1) / 2)
        assert _filled(PascalEvaluator(voc), swapped).evaluate() < 0.5


def test_classes_beyond_the_categories_are_padding(voc, tmp_path):
    rows = torch.cat([_rows(), torch.tensor([1.0, 1, 9, 9, 0.99, 21]).expand(3, 1, 6)], dim=1)
    evaluator = _filled(PascalEvaluator(voc), rows)
    assert evaluator.evaluate(tmp_path / "results.json") == pytest.approx((DOGS + 1) / 2)
    assert len(json.loads((tmp_path / "results.json").read_text())) == 5


def test_difficult_objects_do_not_count_even_where_they_are_not_trained_on(tmp_path):
    voc = _voc(tmp_path, keep_difficult=False)
    assert [len(voc.parser.get_ann_info(n)["cls"]) for n in range(3)] == [2, 1, 0]
    truth = voc.parser.get_ground_truth(1)
    assert truth["cls"].tolist() == [DOG, DOG] and truth["difficult"].tolist() == [False, True]
    evaluator = _filled(PascalEvaluator(voc))
    assert evaluator.evaluate() == pytest.approx((DOGS + 1) / 2)


def test_flags_of_another_parser_count(voc):
    """One without `get_ground_truth`, whose annotations tell which objects are difficult, or groups."""
    known = [voc.parser.get_ann_info(index) for index in range(3)]

    def told(**flags):
        told = [{**ann, **{k: v[n] for k, v in flags.items()}} for n, ann in enumerate(known)]
        parser = SimpleNamespace(
            cat_dicts=voc.parser.cat_dicts, max_label=20, get_ann_info=told.__getitem__
        )
        return SimpleNamespace(parser=parser)

    evaluator = _filled(PascalEvaluator(told(difficult=[[1, 0], [0, 0], []])))
    evaluator.evaluate()
    assert evaluator.per_class["dog"]["AP50"] == pytest.approx(2 / 3)
    evaluator = _filled(OpenImagesEvaluator(told(group_of=[[1, 0], [0, 0], []])))
    evaluator.evaluate()
    assert evaluator.per_class["dog"]["AP50"] == pytest.approx(2 / 3)


def test_other_evaluators(voc):
    evaluator = _filled(TfmEvaluator(voc))
    assert evaluator.evaluate() == evaluator.metrics["Precision/mAP@0.5IOU"]
    weighted = _filled(TfmEvaluator(voc, evaluator_cls=WeightedPascalDetectionEvaluator))
    assert weighted.evaluate() != evaluator.evaluate()
    assert weighted.per_class["dog"] == evaluator.per_class["dog"]


def test_save(voc, tmp_path):
    evaluator = _filled(create_evaluator("voc2007", voc))
    evaluator.save(tmp_path / "saved.json")
    saved = json.loads((tmp_path / "saved.json").read_text())
    assert len(saved) == 5
    assert saved[0] == {
        "image_id": "000000",
        "bbox": [10.0, 10.0, 20.0, 20.0],
        "score": pytest.approx(0.9),
        "category_id": "dog",
    }
    value = evaluator.evaluate(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == saved
    assert evaluator.evaluate() == value


@pytest.fixture
def open_images(tmp_path):
    folder = tmp_path / "annotations"
    folder.mkdir()
    (folder / "class-descriptions-boxable.csv").write_text("/m/01,Dog\n/m/02,Cat")
    (folder / "validation-info.csv").write_text("id,width,height\n00a1,50,40\n0e10,100,40\n")
    (folder / "validation-annotations-bbox.csv").write_text(
        "ImageID,LabelName,XMin,XMax,YMin,YMax,IsGroupOf\n"
        "00a1,/m/01,0.2,0.6,0.25,0.75,0\n0e10,/m/02,0,0.5,0,0.5,0\n0e10,/m/02,0.6,1,0,1,1\n"
    )
    return create_dataset("openimages", tmp_path, "val")


def test_open_images_with_ids_of_hexadecimal_digits(open_images, tmp_path):
    evaluator = create_evaluator("openimages", open_images)
    assert isinstance(evaluator, OpenImagesEvaluator)
    rows = torch.tensor([[[10, 10, 30, 30, 0.9, 1]], [[0, 0, 20, 20, 0.8, 2.0]]])
    evaluator.add_predictions(rows, {"img_idx": torch.arange(2)})
    assert evaluator.evaluate(tmp_path / "results.json") == 0.5
    assert evaluator.per_class == {"Dog": {"AP50": 1.0}, "Cat": {"AP50": 0.0}}
    assert "OpenImagesV5_Precision/mAP@0.5IOU" in evaluator.metrics
    assert len(open_images.parser.get_ann_info(1)["cls"]) == 1  # groups are not trained on
    found = [
        (row["image_id"], row["category_id"])
        for row in json.loads((tmp_path / "results.json").read_text())
    ]
    assert found == [("00a1", "/m/01"), ("0e10", "/m/02")]


def test_detections_in_a_group_do_not_count(open_images):
    evaluator = create_evaluator("openimages", open_images)
    rows = torch.zeros(2, 3, 6)
    rows[0, 0] = torch.tensor([10, 10, 30, 30, 0.9, 1])
    rows[1, 0] = torch.tensor([60, 0, 80, 20, 0.8, 2])
    rows[1, 1] = torch.tensor([80, 20, 100, 40, 0.7, 2])
    rows[1, 2] = torch.tensor([0, 0, 50, 20, 0.6, 2])
    evaluator.add_predictions(rows, {"img_idx": torch.arange(2)})
    assert evaluator.evaluate() == 1.0
    rows[1, 0, 5] = 1  # a dog among the cats is wrong, though not before the other dog
    rows[0, 0, 4] = 0.5
    evaluator.reset()
    evaluator.add_predictions(rows, {"img_idx": torch.arange(2)})
    assert evaluator.evaluate() == 0.75


def _evaluate_share(rank: int, world_size: int, root: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{root}/meet", rank=rank, world_size=world_size
    )
    evaluator = PascalEvaluator(_voc(Path(f"{root}/{rank}")), distributed=True)
    indices = [*range(rank, 3, world_size), 0]  # everybody has the first image
    evaluator.add_predictions(_rows()[indices], {"img_idx": torch.tensor(indices)})
    value = evaluator.evaluate(f"{root}/results.json")
    evaluator.save(f"{root}/saved.json")
    torch.save([value, evaluator.stats, evaluator.metrics], f"{root}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_agree_with_one(voc, tmp_path):
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    torch.multiprocessing.spawn(_evaluate_share, (2, str(tmp_path)), nprocs=2)
    alone = _filled(PascalEvaluator(voc))
    expected = [alone.evaluate(), alone.stats, alone.metrics]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert found[:2] == expected[:2]
        np.testing.assert_equal(found[2], expected[2])
    assert (tmp_path / "results.json").read_text() == (tmp_path / "saved.json").read_text()
    assert len(json.loads((tmp_path / "saved.json").read_text())) == 5
