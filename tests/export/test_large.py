"""The largest models, at their own size: minutes each; with -s the figures of docs/export.md."""

from __future__ import annotations

import resource
import time

import pytest

from effdet.export import ExportOptions, check_onnx, check_pt2, export_onnx, export_pt2

from .conftest import spread

KINDS = {"onnx": (export_onnx, check_onnx), "pt2": (export_pt2, check_pt2)}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["tf_efficientdet_d7", "tf_efficientdet_d7x"])
def test_equal_to_the_model(tmp_path, name, kind):
    pytest.importorskip("onnxruntime")
    export, check = KINDS[kind]
    model, path = spread(name), tmp_path / f"{name}.{kind}"
    times = [time.perf_counter()]
    report = export(model, path, ExportOptions(batch=1), check=False)
    times.append(time.perf_counter())
    seen = check(path, model, ExportOptions(batch=1))
    times.append(time.perf_counter())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # of all so far
    print(
        f"\n{path.name}: written in {times[1] - times[0]:.0f} s, checked in {times[2] - times[1]:.0f} s,"
        f" {peak:.1f} GiB, {report.size / 1e6:.0f} MB, {seen}"
    )
    assert seen.compared >= 100 and seen.box < 0.05 and seen.score < 1e-4
