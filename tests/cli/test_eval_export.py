from __future__ import annotations

import importlib.util
import json

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
