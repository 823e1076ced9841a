"""ONNX files on real photos (--data): boxes to 0.05 px, scores to 1e-4, classes equal to the bench's."""

from __future__ import annotations

import pytest
import torch

import effdet
from effdet.data.input_config import resolve_input_config
from effdet.engine.weights import load_model
from effdet.export import ExportOptions, export_onnx
from effdet.export.pictures import batches

from .conftest import spread

pytest.importorskip("onnxscript")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def photos(data_dir):
    return sorted((data_dir / "photos" / "images").glob("*.jpg"))


@pytest.mark.parametrize(
    ("make", "count"),
    [(lambda: spread("tf_efficientdet_d0"), 7), (lambda: load_model().model, 31)],
    ids=["d0", "nano"],
)
def test_photos(photos, tmp_path, make, count):
    model = make()
    options = ExportOptions(img_info=True)
    paths = photos[:count]
    assert len(paths) == count
    report = export_onnx(model, tmp_path / "d.onnx", options, images=paths)
    check = report.check
    print(check)  # pytest -s shows it
    assert check.compared + check.at_edge >= 90 * count
    assert check.box <= 0.05 and check.score <= 1e-4 and check.at_edge <= count
    # The rows themselves, of one photo, by position.
    bench = effdet.DetBenchPredict(model)
    images, scale, size = batches(bench, options, paths[:1])[0]
    inputs = resolve_input_config({}, bench.config)
    mean, std = (torch.tensor(inputs[k]).view(1, 3, 1, 1) * 255 for k in ("mean", "std"))
    with torch.no_grad():
        want = bench((images - mean) / std, {"img_scale": scale, "img_size": size})[0]
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    fed = {"images": images, "img_scale": scale, "img_size": size}
    (got,) = session.run(None, {k: v.numpy() for k, v in fed.items()})
    assert want[0, 4] > 0.5 and want[:, 4].unique().numel() > 50
    assert len({round(float(x), 3) for x in (want[:, 2] - want[:, 0])}) > 50
    torch.testing.assert_close(torch.from_numpy(got[0, :10]), want[:10], rtol=0, atol=0.05)
