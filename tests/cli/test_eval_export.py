from __future__ import annotations

import importlib.util
import json
import re

import numpy as np
import pytest
import torch
from PIL import Image

from effdet import create_model
from effdet.engine import checkpoint as checkpoints
from effdet.engine.weights import load_model
from effdet.tf_names import tf_names


def test_eval_prints_the_coco_table_and_each_class(cli, scenes, weights, tmp_path):
    results = tmp_path / "results.json"
    result = cli("eval", scenes, "--checkpoint", weights, "--results", results, "--workers", 0)
    assert result.code == 0, result.err
    for text in ("AP    @ IoU 0.50:0.95", "AP50", "AP75", "small", "circle", "cross"):
        assert text in result.out
    rows = json.loads(results.read_text())
    assert all(set(row) >= {"image_id", "category_id", "bbox", "score"} for row in rows)


def test_eval_suppresses_as_it_is_told(cli, scenes, weights, tmp_path):
    results = tmp_path / "results.json"
    sums = []
    for options in ([], ["--soft-nms"], ["--soft-nms", "--sigma", 0.05], ["--max-per-class", 1]):
        given = ["eval", scenes, "--checkpoint", weights, "--results", results, "--workers", 0]
        assert cli(*given, *options).code == 0
        rows = json.loads(results.read_text())
        sums.append(sum(row["score"] for row in rows))
    assert sums[0] > sums[1] > sums[2]
    assert len(rows) == len({(row["image_id"], row["category_id"]) for row in rows}) == 4 * 5


def test_eval_writes_precision_over_recall(cli, scenes, weights, tmp_path):
    folder = tmp_path / "new" / "plots"
    result = cli("eval", scenes, "--checkpoint", weights, "--plots", folder, "--workers", 0)
    assert result.code == 0, result.err
    found = json.loads((folder / "precision_recall.json").read_text())
    assert set(found) == {"epoch", "recall", "mean", "per_class"} and len(found["recall"]) == 101
    assert set(found["per_class"]) == {"circle", "square", "triangle", "star", "cross"}
    if importlib.util.find_spec("matplotlib"):
        assert Image.open(folder / "precision_recall.png").format == "PNG"
        assert f"plot: {folder / 'precision_recall.png'}" in result.out
    assert len(list(folder.iterdir())) == 1 + bool(importlib.util.find_spec("matplotlib"))


def test_eval_of_a_missing_split_is_named(cli, scenes, weights):
    result = cli("eval", scenes, "--checkpoint", weights, "--split", "test")
    assert result.code == 1
    assert "instances_test" in result.err


def test_eval_with_other_classes_is_refused(cli, scenes, weights, tmp_path):
    document = json.loads((scenes / "instances_val.json").read_text())
    document["categories"].append({"id": 6, "name": "ring"})
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "instances_val.json").write_text(json.dumps(document))
    result = cli("eval", tmp_path, "--checkpoint", weights)
    assert result.code == 1
    assert "num_classes: got 5" in result.err and "6 categories" in result.err


@pytest.mark.parametrize("content", ["", "{", "[]", '{"images": []}'])
def test_eval_of_broken_annotations_names_the_file(cli, weights, tmp_path, content):
    (tmp_path / "images").mkdir()
    (tmp_path / "instances_val.json").write_text(content)
    result = cli("eval", tmp_path, "--checkpoint", weights)
    assert result.code == 1
    assert "instances_val.json" in result.err


@pytest.fixture
def voc(tmp_path):
    """VOC 2007 in its layout: two pictures, and a model of 20 classes that finds nothing by name."""
    root = tmp_path / "devkit" / "VOC2007"
    for folder in ("ImageSets/Main", "Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Main/val.txt").write_text("000001\n000002\n")
    for name in ("000001", "000002"):
        Image.new("RGB", (60, 50)).save(root / f"JPEGImages/{name}.jpg")
        box = "<xmin>1</xmin><ymin>1</ymin><xmax>41</xmax><ymax>41</ymax>"
        objects = f"<object><name>dog</name><bndbox>{box}</bndbox></object>"
        size = "<size><width>60</width><height>50</height></size>"
        xml = f"<annotation>{size}{objects}</annotation>"
        (root / f"Annotations/{name}.xml").write_text(xml)
    torch.manual_seed(0)
    model = create_model("efficientdet_nano", num_classes=20, pretrained_backbone=False)
    content = {"model": "efficientdet_nano", "image_size": [64, 64]}
    torch.save({**content, "state_dict": model.state_dict()}, tmp_path / "voc.pth")
    return root.parent, "--dataset", "voc2007", "--checkpoint", tmp_path / "voc.pth", "--workers", 0


def test_eval_of_voc_prints_its_metric(cli, voc, tmp_path):
    result = cli("eval", *voc, "--results", tmp_path / "results.json")
    assert result.code == 0, result.err
    assert "AP50  @ IoU 0.50  " in result.out and "0.50:0.95" not in result.out
    assert "2 images of" in result.out and "20 classes have other names" in result.out
    assert re.search(r"class +AP50\n", result.out)
    assert re.search(r"dog +0\.\d{4}\n", result.out) and re.search(r"cat +no obj", result.out)
    rows = json.loads((tmp_path / "results.json").read_text())
    assert {row["image_id"] for row in rows} == {"000001", "000002"}
    for path in voc[0].glob("VOC2007/Annotations/*.xml"):
        path.write_text(path.read_text().replace("object>", "part>"))
    assert re.search(r"IoU 0\.50 +no objects", cli("eval", *voc).out)


def test_eval_of_voc_names_what_does_not_fit(cli, voc, weights, tmp_path):
    given = ("eval", *voc)
    assert "--plots: got --dataset voc2007; takes coco" in cli(*given, "--plots", "x").err
    assert "splits: got 'test'; takes train, val" in cli(*given, "--split", "test").err
    assert "has 20 classes; the model has 5" in cli(*given, "--checkpoint", weights).err
    assert "Pascal VOC is read by" in cli("eval", voc[0]).err
    (voc[0] / "VOC2007/JPEGImages/000002.jpg").unlink()
    result = cli(*given)
    assert result.code == 1 and "1 of 2 pictures are missing" in result.err
    (voc[0] / "VOC2007/ImageSets/Main/val.txt").write_text("")
    assert "split val: has no annotated images" in cli(*given).err
    assert cli("eval", tmp_path, "--dataset", "yolo").code == 2


def test_eval_says_which_classes_have_other_names(cli, scenes, weights, tmp_path):
    """Also where the names are the same in another order, which no figure tells from a bad model."""
    assert "note" not in cli("eval", scenes, "--checkpoint", weights, "--workers", 0).out
    document = json.loads((scenes / "instances_val.json").read_text())
    first, second = document["categories"][:2]
    first["name"], second["name"] = second["name"], first["name"]
    (tmp_path / "images").symlink_to(scenes / "images")
    (tmp_path / "instances_val.json").write_text(json.dumps(document))
    result = cli("eval", tmp_path, "--checkpoint", weights, "--workers", 0)
    assert "note: 2 classes have other names than the model's: square (circle of" in result.out


def test_exported_weights_detect_like_the_checkpoint(cli, scenes, weights, tmp_path):
    training = torch.load(weights, weights_only=True)
    training.update(format=checkpoints.FORMAT, state_dict_ema=training["state_dict"])
    torch.save(training, tmp_path / "best.pth")
    result = cli("export", tmp_path / "best.pth", "--out", tmp_path / "small.pth")
    assert result.code == 0, result.err
    (small,) = tmp_path.glob("small-*.pth")
    assert small.stat().st_size < 0.6 * (tmp_path / "best.pth").stat().st_size
    assert cli("eval", scenes, "--checkpoint", small, "--workers", 0).code == 0


def test_export_of_other_files_is_refused(cli, weights, tmp_path):
    result = cli("export", weights, "--out", tmp_path / "small.pth")
    assert result.code == 1
    assert "not written by `effdet train`" in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_variables_of_tensorflow_become_a_file_that_says_what_it_is(cli, tmp_path, suffix):
    if suffix == ".safetensors":
        pytest.importorskip("safetensors")
    torch.manual_seed(0)
    model = create_model("tf_efficientdet_d0", num_classes=2, pretrained_backbone=False)
    np.savez(tmp_path / "d0.npz", **as_tensorflow(model))
    out = tmp_path / f"d0{suffix}"
    result = cli("export", tmp_path / "d0.npz", "--model", "tf_efficientdet_d0", "--out", out)
    assert result.code == 0, result.err
    loaded = load_model(checkpoint=out)
    assert loaded.name == "tf_efficientdet_d0" and loaded.class_names == ["class 1", "class 2"]
    found = loaded.model.state_dict()
    assert all(torch.equal(found[key], value) for key, value in model.state_dict().items())


def test_other_arrays_and_models_are_refused(cli, tmp_path):
    np.savez(tmp_path / "x.npz", a=np.zeros(3))
    given = ["export", tmp_path / "x.npz", "--out", tmp_path / "x.pth", "--model"]
    assert "has no variable class_net/class-predict/bias" in cli(*given, "tf_efficientdet_d0").err
    assert "tf_efficientdet_d9" in cli(*given, "tf_efficientdet_d9").err
    assert not (tmp_path / "x.pth").exists()


def as_tensorflow(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """The variables of a model as TensorFlow has them."""
    arrays = {}
    for key, names in tf_names(model).items():
        value = model.state_dict()[key]
        if value.ndim == 4:
            value = value.permute((2, 3, 0, 1) if "depthwise" in names[0] else (2, 3, 1, 0))
        parts = value if len(names) > 1 else [value]
        arrays |= {name: part.numpy() for name, part in zip(names, parts, strict=False)}
    return arrays
