"""``effdet export`` to .onnx and .pt2."""

from __future__ import annotations

import json

import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")


def facts_of(path):
    return {p.key: p.value for p in onnx.load(path).metadata_props}


def test_onnx_of_a_checkpoint(cli, scenes, weights, tmp_path, recwarn):
    out = tmp_path / "d.onnx"
    options = ["--batch", 2, "--img-info", "--no-normalise", "--opset", 19, "--max-det", 7]
    options += ["--iou", 0.4, "--max-per-class", 3, "--size", "128", "--check", scenes / "images"]
    result = cli("export", weights, "--out", out, *options)
    assert result.code == 0, result.err
    assert result.err == "" and not recwarn.list
    assert f"{out} ({out.stat().st_size:,} bytes" in result.out
    assert "checked with ONNX Runtime" in result.out and "2 of 128x128" in result.out
    facts = facts_of(out)
    assert json.loads(facts["classes"]) == ["circle", "square", "triangle", "star", "cross"]
    wanted = {"batch": 2, "img_info": True, "normalise": False, "max_det": 7, "iou_threshold": 0.4}
    wanted |= {"max_per_class": 3, "image_size": [128, 128], "soft_nms": False}
    assert {name: json.loads(facts[name]) for name in wanted} == wanted
    assert onnx.load(out).opset_import[0].version == 19


def test_pt2_of_a_named_model(cli, weights, tmp_path):
    """The model's name, and a checkpoint of it behind the options."""
    out = tmp_path / "d.pt2"
    given = ["--model", "efficientdet_nano", "--size", "64", "--outputs", "raw", "--no-check"]
    result = cli("export", "--out", out, *given, weights)
    assert result.code == 0, result.err
    assert out.exists() and "not checked" in result.out and result.err == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "d.tflite"], "--out: got d.tflite, takes .pth, .safetensors, .onnx, .pt2"),
        (["--out", "d.pth", "--batch", 2], "--batch: goes with .onnx and .pt2"),
        (["--out", "d.safetensors", "--size", 64], "--size: goes with .onnx and .pt2"),
        (["--out", "d.pth", "--soft-nms"], "--soft-nms: goes with .onnx and .pt2"),
        (["--out", "d.pt2", "--opset", 20], "--opset: goes with .onnx, got --out d.pt2"),
        (["--out", "d.onnx", "--outputs", "raw", "--iou", 0.3], "--iou: goes with --outputs det"),
        (["--out", "d.onnx", "--outputs", "raw", "--img-info"], "img_info: got True with raw"),
        (["--out", "d.onnx", "--check", "a.jpg", "--no-check"], "--check: got pictures with"),
        (["--out", "d.onnx", "--check", "no.jpg"], "no.jpg"),
        (["--out", "d.onnx", "--opset", 17], "opset: got 17, takes 18 to 23"),
        (["--out", "d.onnx", "--checkpoint", "other.pth"], "takes one"),
    ],
)
def test_options_that_do_not_go_together(cli, weights, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    result = cli("export", weights, *options)
    assert result.code == 1 and message in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["one.pth", "two.pth"], ["--ou", "x"], ["--nothing"]])
def test_wrong_usage(cli, more):
    assert cli("export", "--out", "d.onnx", "--no-check", *more).code in (1, 2)
    assert cli("export", "--out", "d.onnx", "--no-check", "--opset", 17, "--nothing").code == 2


def test_weights_need_a_checkpoint(cli, tmp_path):
    result = cli("export", "--out", tmp_path / "d.pth")
    assert result.code == 1 and "CHECKPOINT: is missing" in result.err
