"""ONNX files compute what the bench computes with our kernels, in ONNX's own operators."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch

from effdet.engine.weights import load_model
from effdet.export import (
    ExportError,
    ExportOptions,
    check_onnx,
    export_onnx,
    export_program,
    export_pt2,
)
from effdet.export.program import ExportedDetector

from .conftest import VARIANTS

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")


def nodes(graph):
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from nodes(attribute.g)


@pytest.mark.parametrize("name", VARIANTS)
def test_equal_to_the_bench(written, name):
    file = written(name)
    check = file.report.check
    assert check.box < 0.01 and check.score < 1e-5 and check.at_edge == 0
    assert check.compared >= (20 if name in ("few", "per_class") else 100)
    batches, sizes = {shape[0] for shape in check.shapes}, {shape[1:] for shape in check.shapes}
    assert batches == ({file.options.batch} if file.options.batch else {1, 3})
    assert len(sizes) == (2 if file.options.any_size else 1)


IR = {18: 8, 20: 9, 21: 10, 23: 11}  # of the release of ONNX that brought the opset


@pytest.mark.parametrize("name", VARIANTS)
def test_standard_operators_of_the_opset(written, name):
    proto = onnx.load(written(name).path)
    onnx.checker.check_model(proto, full_check=True)
    opset = VARIANTS[name].arguments.get("opset", 18)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", opset)]
    assert proto.ir_version == IR[opset]
    assert {node.domain for node in nodes(proto.graph)} == {""} and not proto.functions
    kinds = {node.op_type for node in nodes(proto.graph)}
    assert ("NonMaxSuppression" in kinds) == (name not in ("soft", "raw", "raw_any"))
    assert ("Loop" in kinds) == (name == "soft")
    assert written(name).report.nodes == len(list(nodes(proto.graph)))


@pytest.mark.parametrize("name", ["hard", "soft"])
def test_nothing_of_this_machine_is_in_it(written, name):
    content = written(name).path.read_bytes()
    assert b".py" not in content and b"effdet.bench" not in content


def test_norms_are_folded_into_convolutions(written):
    proto = onnx.load(written("hard").path)
    constants = {tensor.name for tensor in proto.graph.initializer}
    convolutions = [node for node in proto.graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 121
    assert all(set(node.input[1:]) <= constants for node in convolutions)
    kinds = {node.op_type for node in proto.graph.node}
    assert not kinds & {"BatchNormalization", "Rsqrt", "Sqrt", "Reciprocal"}


def names_and_shapes(values):
    return {
        v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values
    }


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("hard", {"images": ["batch", 3, 256, 256]}, {"detections": ["batch", 100, 6]}),
        (
            "soft",
            {
                "images": ["batch", 3, "height", "width"],
                "img_scale": ["batch"],
                "img_size": ["batch", 2],
            },
            {"detections": ["batch", 100, 6]},
        ),
        ("agnostic", {"images": [2, 3, 256, 256]}, {"detections": [2, 30, 6]}),
        ("few", {"images": ["batch", 3, 128, 192]}, {"detections": ["batch", 60, 6]}),
        (
            "raw",
            {"images": ["batch", 3, 256, 256]},
            {"boxes": ["batch", 12276, 4], "scores": ["batch", 12276, 5]},
        ),
    ],
)
def test_names(written, name, inputs, outputs):
    graph = onnx.load(written(name).path).graph
    assert names_and_shapes(graph.input) == inputs
    assert names_and_shapes(graph.output) == outputs


def test_no_symbol_of_the_exporter_is_left(written):
    graph = onnx.load(written("raw_any").path).graph
    names = {
        p
        for shape in names_and_shapes(graph.value_info).values()
        for p in shape
        if isinstance(p, str)
    }
    assert "16*(height/128)" in names
    assert not any(
        part.strip("s").isdigit() and "s" in part
        for n in names
        for part in n.replace("*", " ").split()
    )


def test_metadata(written):
    facts = {p.key: p.value for p in onnx.load(written("per_class").path).metadata_props}
    assert facts["model"] == "efficientdet_nano" and facts["outputs"] == "detections"
    values = {
        key: json.loads(value)
        for key, value in facts.items()
        if key not in ("model", "outputs", "effdet_kernels")
    }
    assert values == {
        "classes": [f"class {i}" for i in range(1, 6)],
        "image_size": [256, 256],
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "batch": None,
        "any_size": True,
        "normalise": True,
        "img_info": False,
        "soft_nms": False,
        "max_det": 100,
        "score_threshold": 0.1,
        "iou_threshold": 0.3,
        "sigma": 0.5,
        "class_agnostic": False,
        "max_per_class": 2,
    }
    raw = {p.key for p in onnx.load(written("raw").path).metadata_props}
    assert "outputs" in raw and "max_det" not in raw


def test_boxes_that_are_not_finite_are_left_out(written):
    file = written("few")
    images = torch.rand(2, 3, 128, 192) * 255
    with torch.no_grad():
        raw, _ = ExportedDetector(file.bench, ExportOptions("raw", (128, 192)))(images)
        want = ExportedDetector(file.bench, file.options)(images)
    assert raw.isinf().any() and raw.isfinite().any()
    session = onnxruntime.InferenceSession(file.path)
    (got,) = session.run(None, {"images": images.numpy()})
    found = (want[..., 5] > 0).sum(1)
    assert found.min() > 0 and found.max() < 40  # of 40 candidates
    assert np.isfinite(got).all() and not got[0, int(found[0]) :].any()
    torch.testing.assert_close(torch.from_numpy(got), want, rtol=0, atol=1e-2)


@pytest.mark.parametrize("size", [(256, 320), (320, 256)])
def test_sizes_that_do_not_fit_are_refused(written, size):
    session = onnxruntime.InferenceSession(written("raw_any").path)
    with pytest.raises(Exception, match=r"Reshape|Concat|Add|Mul|broadcast"):
        session.run(None, {"images": np.zeros((1, 3, *size), np.float32)})


def test_the_file_is_as_good_as_its_check(written, tmp_path, monkeypatch):
    """A file that differs does not appear, and what was there before stays."""
    proto = onnx.load(written("hard").path)
    monkeypatch.setattr("effdet.export.files.onnx_model", lambda *_: proto)
    path = tmp_path / "d.onnx"
    path.write_text("before")
    other = load_model().model
    with torch.no_grad():
        other.box_net.predict.conv_pw.bias.add_(0.05)
    with pytest.raises(ExportError, match="picture 1 of 1 of 256x256: detection 1 of the model"):
        export_onnx(other, path)
    assert path.read_text() == "before" and [p.name for p in tmp_path.iterdir()] == ["d.onnx"]
    assert export_onnx(other, path, check=False).check is None
    assert path.stat().st_size > 1e6


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_a_stop_leaves_what_was_there(written, tmp_path, monkeypatch, error):
    file = written("hard")
    proto = onnx.load(file.path)

    def fail(*_):
        assert (tmp_path / "d.onnx.part").stat().st_size > 1e6
        raise error

    monkeypatch.setattr("effdet.export.files.onnx_model", lambda *_: proto)
    monkeypatch.setattr("effdet.export.files.compare", fail)
    (tmp_path / "d.onnx").write_text("before")
    with pytest.raises(error if isinstance(error, type) else type(error)):
        export_onnx(file.bench, tmp_path / "d.onnx", file.options)
    assert [p.name for p in tmp_path.iterdir()] == ["d.onnx"]
    assert (tmp_path / "d.onnx").read_text() == "before"


@pytest.mark.parametrize(("path", "kind"), [("no/d", FileNotFoundError), (".", IsADirectoryError)])
@pytest.mark.parametrize("write", [export_onnx, export_pt2])
def test_a_place_for_no_file_is_found_before_the_work(tmp_path, monkeypatch, write, path, kind):
    for name in ("onnx_model", "export_program"):
        monkeypatch.setattr(f"effdet.export.files.{name}", lambda *_: pytest.fail("worked"))
    with pytest.raises(kind):
        write(load_model().model, tmp_path / path)
    assert not list(tmp_path.iterdir())


def test_without_onnxruntime(written, tmp_path, monkeypatch):
    proto = onnx.load(written("hard").path)
    monkeypatch.setattr("effdet.export.files.onnx_model", lambda *_: proto)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    model = load_model().model
    with pytest.raises(ImportError, match=r"effdet-kernels\[export\]"):
        export_onnx(model, tmp_path / "d.onnx")
    assert export_onnx(model, tmp_path / "d.onnx", check=False).path.exists()
    with pytest.raises(ImportError, match=r"effdet-kernels\[export\]"):
        check_onnx(tmp_path / "d.onnx", model)


@pytest.mark.parametrize(
    ("options", "arguments", "message"),
    [
        ({}, {"opset": 17}, "opset: got 17, takes 18 to 23"),
        ({}, {"opset": 24}, "opset: got 24"),
        ({}, {"opset": "18"}, "opset: got '18'"),
        ({}, {"class_names": ["a"]}, "class_names: got 1, takes 5"),
        ({}, {"images": []}, "images: got none"),
        (
            {"any_size": True, "size": (256, 320)},
            {},
            r"size: got \(256, 320\) with any_size, takes multiples of 128",
        ),
        ({"any_size": True, "size": (128, 256)}, {}, "from 256"),
    ],
)
def test_arguments(tmp_path, options, arguments, message):
    with pytest.raises(ValueError, match=message):
        export_onnx(load_model().model, tmp_path / "d.onnx", ExportOptions(**options), **arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"outputs": "boxes"}, "outputs: got 'boxes'"),
        ({"batch": 0}, "batch: got 0"),
        ({"batch": 2.5}, "batch: got 2.5"),
        ({"batch": "2"}, "batch: got '2'"),
        ({"size": 128}, r"size: got 128, takes \(height, width\)"),
        ({"size": (128, 0)}, r"size: got \(128, 0\)"),
        ({"size": (128.5, 128)}, r"size: got \(128.5, 128\)"),
        ({"size": "12"}, "size: got '12'"),
        ({"outputs": "raw", "img_info": True}, "img_info: got True with raw outputs"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        ExportOptions(**options)


def test_models(tmp_path):
    with pytest.raises(TypeError, match="model: got Linear"):
        export_program(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"model: got weights of torch.bfloat16"):
        export_onnx(load_model().model.bfloat16(), tmp_path / "d.onnx")
