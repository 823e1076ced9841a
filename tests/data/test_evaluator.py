"""COCO metric: what it is of good, bad, no and odd detections; saving; several processes."""

from __future__ import annotations

import contextlib
import io
import json
import math

import numpy as np
import pytest
import torch
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from effdet.data import coco_folder
from effdet.evaluator import (
    CocoEvaluator,
    OpenImagesEvaluator,
    PascalEvaluator,
    create_evaluator,
)


@pytest.fixture
def dataset(make_coco):
    return coco_folder(make_coco(6), "train")


def _annotated(dataset, indices, noise: float = 0.0) -> torch.Tensor:
    """The annotations as detection rows [B, 4, 6], one of them doubled with a lower score."""
    rng = np.random.default_rng(0)
    rows = torch.zeros(len(indices), 4, 6)
    for row, index in zip(rows, indices, strict=True):
        ann = dataset.parser.get_ann_info(index)
        boxes = torch.from_numpy(ann["bbox"][:, [1, 0, 3, 2]])
        count = len(boxes)
        row[:count, :4] = boxes + torch.from_numpy(rng.normal(0, noise, boxes.shape)).float()
        row[:count, 4] = 0.9
        row[:count, 5] = torch.from_numpy(ann["cls"]).float()
        row[count] = row[0]
        row[count, 4] = 0.1
    return rows


def _evaluator(dataset, noise: float = 0.0, **settings) -> CocoEvaluator:
    evaluator = CocoEvaluator(dataset, **settings)
    for indices in ([0, 1, 2, 3], [4, 5]):
        rows = _annotated(dataset, indices, noise)
        evaluator.add_predictions(rows, {"img_idx": torch.tensor(indices)})
    return evaluator


def test_annotations_themselves(dataset, capsys):
    evaluator = _evaluator(dataset)
    assert evaluator.evaluate() == pytest.approx(1.0)
    assert evaluator.stats["AP50"] == pytest.approx(1.0)
    assert evaluator.stats["AR1"] == pytest.approx(1.0)
    assert evaluator.stats["APlarge"] == -1
    assert set(evaluator.per_class) == {"cup", "jar"}
    assert evaluator.per_class["jar"] == pytest.approx({"AP": 1.0, "AP50": 1.0})
    assert evaluator.summary.count("\n") == 12
    assert capsys.readouterr().out == ""
    evaluator.reset()
    assert evaluator.stats == {} and evaluator.predictions == []


def test_same_as_pycocotools_by_hand(make_coco, tmp_path):
    annotations = [
        {
            "id": n + 1,
            "image_id": n // 2 + 1,
            "category_id": 1 + n % 2 * 4,
            "iscrowd": int(n == 4),
            "bbox": [5 * (n % 5), 6, 10 + 7 * (n % 2), 12 + n],
            "area": (10 + 7 * (n % 2)) * (12 + n),
        }
        for n in range(12)
    ]
    dataset = coco_folder(make_coco(6, annotations), "train")
    evaluator = _evaluator(dataset, noise=2.0)
    ap = evaluator.evaluate(tmp_path / "results.json")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(tmp_path / "instances_train.json"))
        found = truth.loadRes(str(tmp_path / "results.json"))
        by_hand = COCOeval(truth, found, "bbox")
        by_hand.evaluate()
        by_hand.accumulate()
        by_hand.summarize()
    assert 0.2 < ap < 0.95
    assert list(evaluator.stats.values()) == pytest.approx(by_hand.stats.tolist(), abs=1e-12)
    classes = [value["AP"] for value in evaluator.per_class.values()]
    assert np.mean(classes) == pytest.approx(ap)


def test_precision_and_recall_of_a_case_by_hand(make_coco):
    """Hit, miss, and a hit at IoU 0.58: precisions 1, 1/2 and 2/3 at recalls 1/2, 1/2 and 1."""
    boxes = [[2, 2, 20, 20], [30, 2, 20, 20]]
    objects = [{"id": n, "image_id": 1, "bbox": b, "category_id": 1} for n, b in enumerate(boxes)]
    evaluator = CocoEvaluator(coco_folder(make_coco(1, objects), "train"))
    rows = [[2, 2, 22, 22, 0.9, 1], [2, 30, 12, 44, 0.8, 1], [30, 2, 50, 13.6, 0.7, 1]]
    evaluator.add_predictions(torch.tensor([rows]), {"img_idx": torch.tensor([0])})
    evaluator.evaluate()
    found = evaluator.precision_recall
    assert found["recall"] == pytest.approx([n / 100 for n in range(101)])
    assert found["mean"]["AP50"] == pytest.approx([1.0] * 51 + [2 / 3] * 50)
    assert found["mean"]["AP75"] == pytest.approx([1.0] * 51 + [0.0] * 50)
    assert found["mean"]["AP"] == pytest.approx([1.0] * 51 + [2 / 3 * 2 / 10] * 50)
    assert found["per_class"] == {"cup": found["mean"]["AP50"], "jar": None}
    json.dumps(found)


def test_the_mean_precision_is_the_figure(dataset):
    evaluator = _evaluator(dataset, noise=2.0)
    evaluator.evaluate()
    for name, precisions in evaluator.precision_recall["mean"].items():
        assert np.mean(precisions) == pytest.approx(evaluator.stats[name])
    for name, precisions in evaluator.precision_recall["per_class"].items():
        assert np.mean(precisions) == pytest.approx(evaluator.per_class[name]["AP50"])
    evaluator.reset()
    assert evaluator.precision_recall == {}


def test_no_detections(dataset):
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(torch.zeros(6, 100, 6), {"img_idx": torch.arange(6)})
    assert evaluator.evaluate() == 0.0
    assert evaluator.per_class["cup"]["AP"] == 0.0


def test_nothing_added(dataset):
    with pytest.raises(ValueError, match="no predictions were added"):
        CocoEvaluator(dataset).evaluate()


def test_no_annotations(make_coco):
    dataset = coco_folder(make_coco(2, []), "train")
    evaluator = CocoEvaluator(dataset)
    rows = torch.tensor([[[1.0, 2, 30, 40, 0.9, 1]]] * 2)
    evaluator.add_predictions(rows, {"img_idx": torch.arange(2)})
    assert evaluator.evaluate() == -1.0
    assert math.isnan(evaluator.per_class["cup"]["AP"])
    assert evaluator.precision_recall["mean"] == {"AP50": None, "AP75": None, "AP": None}
    assert evaluator.precision_recall["per_class"] == {"cup": None, "jar": None}


def test_only_images_seen_count(dataset):
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(_annotated(dataset, [2]), {"img_idx": torch.tensor([2])})
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_image_seen_twice_counts_once(dataset):
    evaluator = _evaluator(dataset)
    evaluator.add_predictions(_annotated(dataset, [2]), {"img_idx": torch.tensor([2])})
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_yxyx_predictions(dataset):
    rows = _annotated(dataset, range(6))[..., [1, 0, 3, 2, 4, 5]]
    evaluator = CocoEvaluator(dataset, pred_yxyx=True)
    evaluator.add_predictions(rows, {"img_idx": torch.arange(6)})
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_save_leaves_the_predictions_alone(dataset, tmp_path):
    evaluator = _evaluator(dataset)
    path = tmp_path / "results.json"
    evaluator.save(path)
    first = path.read_text()
    evaluator.save(path)
    assert path.read_text() == first
    assert evaluator.evaluate(path) == pytest.approx(1.0)
    assert path.read_text() == first
    assert sorted(file.name for file in tmp_path.glob("results*")) == ["results.json"]
    results = json.loads(first)
    assert results[0] == {
        "image_id": 1,
        "bbox": [4.0, 5.0, 20.0, 30.0],
        "score": pytest.approx(0.9),
        "category_id": 1,
    }
    assert {result["category_id"] for result in results} == {1, 5}  # ids, not labels 1 and 2


def test_image_ids_that_are_not_numbers(make_coco, tmp_path):
    images = [{"id": f"a{n}", "file_name": f"{n}.png", "width": 64, "height": 48} for n in range(6)]
    evaluator = _evaluator(coco_folder(make_coco(images), "train"))
    assert evaluator.evaluate(tmp_path / "results.json") == pytest.approx(1.0)
    assert json.loads((tmp_path / "results.json").read_text())[0]["image_id"] == "a0"


def test_annotation_id_zero(make_coco):
    annotations = [
        {"id": n, "image_id": 1, "bbox": [20 * n, 2, 15, 15], "category_id": 1} for n in range(3)
    ]
    dataset = coco_folder(make_coco(1, annotations), "train")
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(_annotated(dataset, [0]), {"img_idx": torch.tensor([0])})
    assert evaluator.evaluate() == pytest.approx(1.0)


def test_order_of_rows_does_not_matter(dataset):
    rows = _annotated(dataset, range(6), 2.0)
    expected = _ap(dataset, rows)
    assert _ap(dataset, rows.flip(1)) == expected


def _ap(dataset, rows: torch.Tensor) -> float:
    evaluator = CocoEvaluator(dataset)
    evaluator.add_predictions(rows, {"img_idx": torch.arange(len(rows))})
    return evaluator.evaluate()


def test_non_finite_rows_are_left_out_with_a_warning(dataset):
    rows = _annotated(dataset, range(6))
    bad = torch.full((6, 1, 6), float("nan"))
    bad[0, 0] = torch.tensor([1, 2, float("inf"), 4, 0.95, 1])
    bad[1, 0] = torch.tensor([1, 2, 3, 4, float("nan"), 1])
    with pytest.warns(UserWarning, match="1 of the detections of an image are not finite"):
        ap = _ap(dataset, torch.cat([rows, bad], dim=1))
    assert ap == pytest.approx(1.0)


def test_half_precision_detections(dataset):
    assert _ap(dataset, _annotated(dataset, range(6)).half()) == pytest.approx(1.0)


def test_unknown_class(dataset):
    rows = _annotated(dataset, range(6))
    rows[0, 0, 5] = 7
    with pytest.raises(ValueError, match=r"class 7: the data set has classes 1..2 \(cup, jar\)"):
        _ap(dataset, rows)


def test_bad_arguments(dataset):
    evaluator = CocoEvaluator(dataset)
    with pytest.raises(KeyError, match="lacks 'img_idx'; it has img_size"):
        evaluator.add_predictions(torch.zeros(1, 3, 6), {"img_size": torch.zeros(1, 2)})
    for shape in ((2, 3, 6), (1, 3, 5), (3, 6)):
        with pytest.raises(ValueError, match=r"takes \[1, n, 6\]"):
            evaluator.add_predictions(torch.zeros(shape), {"img_idx": torch.tensor([0])})


@pytest.mark.parametrize("index", [6, -1, 0.5])
def test_a_number_that_is_no_image(dataset, index):
    evaluator = CocoEvaluator(dataset)
    with pytest.raises(ValueError, match=rf"img_idx'\]: got {index}; takes .* less than 6"):
        evaluator.add_predictions(torch.zeros(1, 3, 6), {"img_idx": torch.tensor([index])})
    assert evaluator.img_indices == []


def test_parts_of_unequal_length(dataset):
    with pytest.raises(ValueError, match=r"detections: got a list .*takes \[B, n, 6\]"):
        CocoEvaluator(dataset).add_predictions(
            [torch.zeros(2, 6), torch.zeros(1, 6)], {"img_idx": [0, 1]}
        )


def test_evaluators_by_name(dataset):
    assert isinstance(create_evaluator("COCO2017", dataset), CocoEvaluator)  # as create_dataset
    assert isinstance(create_evaluator("coco2017", dataset), CocoEvaluator)
    assert isinstance(create_evaluator("openimages", dataset), OpenImagesEvaluator)
    assert isinstance(create_evaluator("voc2007", dataset), PascalEvaluator)


def _evaluate_share(rank: int, world_size: int, root: str, file: str) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{file}", rank=rank, world_size=world_size
    )
    dataset = coco_folder(root, "train")
    evaluator = CocoEvaluator(dataset, distributed=True)
    indices = [*range(rank, 6, world_size), 0]  # everybody has the first image
    rows = _annotated(dataset, range(6), 2.0)[indices]
    evaluator.add_predictions(rows, {"img_idx": torch.tensor(indices)})
    ap = evaluator.evaluate(f"{root}/results.json")
    evaluator.save(f"{root}/saved.json")
    found = [ap, evaluator.stats, evaluator.per_class, evaluator.precision_recall]
    torch.save(found, f"{root}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_several_processes_agree_with_one(make_coco, tmp_path):
    root = make_coco(6)
    torch.multiprocessing.spawn(_evaluate_share, (2, str(root), str(tmp_path / "meet")), nprocs=2)
    dataset = coco_folder(root, "train")
    alone = CocoEvaluator(dataset)
    rows = _annotated(dataset, range(6), 2.0)
    alone.add_predictions(rows, {"img_idx": torch.arange(6)})
    expected = [alone.evaluate(), alone.stats, alone.per_class, alone.precision_recall]
    assert 0.2 < expected[0] < 0.95
    for rank in range(2):
        assert torch.load(root / f"{rank}.pt") == expected
    assert (root / "results.json").read_text() == (root / "saved.json").read_text()
    assert len(json.loads((root / "saved.json").read_text())) == 12
