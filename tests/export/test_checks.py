"""The check of exported files catches files that are wrong, and only those."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from effdet.engine.weights import load_model
from effdet.export import Check, ExportError, check_onnx
from effdet.export.checks import _compare_raw, _compare_rows

ROWS = np.array(
    [
        [10, 10, 50, 50, 0.9, 1],
        [20, 20, 70, 60, 0.50003, 2],
        [5, 5, 15, 15, 0.5, 1],
        [0, 0, 9, 9, 0.2, 3],
        [0, 0, 0, 0, 0, 0],
    ],
    np.float32,
)
FULL = ROWS[:4]


def compare(got, want, least=0.0):
    check = Check("here")
    _compare_rows(check, np.array(got, np.float32), np.array(want, np.float32), least, "there")
    return check


def changed(rows, row, column, by):
    rows = rows.copy()
    rows[row, column] += by
    return rows


def test_equal_rows():
    check = compare(ROWS, ROWS)
    assert (check.compared, check.box, check.score, check.at_edge) == (4, 0, 0, 0)


def test_rows_of_nearly_the_same_score_may_swap():
    check = compare(ROWS[[0, 2, 1, 3, 4]], ROWS)
    assert check.compared == 4 and check.box == 0
    with pytest.raises(ExportError, match="detection 1 of the model"):
        compare(ROWS[[0, 1, 2, 3, 4]], changed(ROWS, 0, 4, -0.001))


@pytest.mark.parametrize(
    ("row", "column", "by"),
    [(0, 0, 0.06), (1, 3, -0.06), (2, 4, 2e-4), (0, 5, 1), (3, 2, np.nan), (3, 2, np.inf)],
)
def test_differences(row, column, by):
    if column < 5 and abs(by) < 1:
        assert compare(changed(ROWS, row, column, by / 3), ROWS).compared == 4
    with pytest.raises(ExportError, match=f"there: detection {row + 1} of the model is not in"):
        compare(changed(ROWS, row, column, by), ROWS)


def test_rows_too_many_and_too_few():
    with pytest.raises(ExportError, match="detection 4 of the model"):
        compare(ROWS[[0, 1, 2, 4, 4]], ROWS)
    with pytest.raises(ExportError, match="detection 4 of the file"):
        compare(ROWS, ROWS[[0, 1, 2, 4, 4]])


def test_the_last_row_that_is_kept_may_be_another():
    other = FULL.copy()
    other[3] = [30, 30, 40, 40, 0.20005, 2]
    check = compare(other, FULL)
    assert check.compared == 3 and check.at_edge == 1
    other[3, 4] = 0.2002
    with pytest.raises(ExportError, match="detection 4 of the file"):
        compare(other, FULL)
    assert compare(ROWS[[0, 1, 2, 4, 4]], ROWS, least=0.19995).at_edge == 1


def test_far_coordinates_are_compared_relatively():
    far = changed(ROWS, 0, 2, 1e5)
    assert compare(changed(far, 0, 2, 0.7), far).box == pytest.approx(0.7 / 20, rel=0.02)
    with pytest.raises(ExportError):
        compare(changed(far, 0, 2, 1.2), far)


def test_raw():
    boxes, scores = torch.rand(7, 4).numpy(), torch.rand(7, 2).numpy()
    boxes[3, 2] = np.inf
    check = Check("here")
    _compare_raw(check, [boxes + 0.01, scores], [boxes, scores], "there")
    assert check.compared == 7 and check.box == pytest.approx(0.01, rel=0.01) and check.score == 0
    with pytest.raises(ExportError, match=r"there: score of anchor 5 differs by 0.0002"):
        _compare_raw(check, [boxes, changed(scores, 5, 1, 2e-4)], [boxes, scores], "there")
    finite = boxes.copy()
    finite[3, 2] = 1e30
    with pytest.raises(ExportError, match=r"box of anchor 3 differs by inf"):
        _compare_raw(check, [finite, scores], [boxes, scores], "there")


def scaled(proto, name, by):
    onnx = pytest.importorskip("onnx")
    (tensor,) = [t for t in proto.graph.initializer if t.name == name]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) * by, name))


def of_last_convolution(proto):
    return [node for node in proto.graph.node if node.op_type == "Conv"][-1].input[1]


def of_suppression(proto):
    (node,) = [node for node in proto.graph.node if node.op_type == "NonMaxSuppression"]
    return node.input[3]


def of_anchors(proto):
    (name,) = [tensor.name for tensor in proto.graph.initializer if 12276 in tensor.dims]
    return name


MUTANTS = {
    "weights": lambda proto: scaled(proto, of_last_convolution(proto), np.float32(1.01)),
    "mean": lambda proto: scaled(proto, "mean", np.float32(1.02)),
    "anchors": lambda proto: scaled(proto, of_anchors(proto), np.float32(1.001)),
    "iou": lambda proto: scaled(proto, of_suppression(proto), np.float32(1.4)),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_of_a_file(written, tmp_path, name):
    onnx = pytest.importorskip("onnx")
    file = written("hard")
    proto = onnx.load(file.path)
    MUTANTS[name](proto)
    onnx.save(proto, tmp_path / "mutant.onnx")
    with pytest.raises(ExportError, match=r"picture . of .* detection"):
        check_onnx(tmp_path / "mutant.onnx", file.bench, file.options)


def test_other_weights_and_options(written):
    pytest.importorskip("onnx")
    file = written("hard")
    other = load_model().model
    with torch.no_grad():
        other.class_net.predict.conv_pw.bias.add_(0.01)
    with pytest.raises(ExportError, match="detection 1 of the model"):
        check_onnx(file.path, other)
    file = written("agnostic")
    with pytest.raises(ExportError, match="the file cannot be run"):
        check_onnx(file.path, file.bench)


def test_half_a_file(written, tmp_path):
    pytest.importorskip("onnx")
    file = written("hard")
    half = tmp_path / "half.onnx"
    half.write_bytes(file.path.read_bytes()[:100_000])
    with pytest.raises(ExportError, match=r"half\.onnx: ONNX Runtime cannot load it"):
        check_onnx(half, file.bench)


def test_nothing_to_compare(written):
    pytest.importorskip("onnx")
    file = written("few")
    file.bench.score_threshold = 1.0
    try:
        with pytest.raises(ExportError, match=r"of the file is not one|nothing to compare"):
            check_onnx(file.path, file.bench, file.options)
    finally:
        file.bench.score_threshold = None
