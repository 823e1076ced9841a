"""Programs of torch.export in a file compute what the bench computes, without this package."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

import effdet
from effdet.engine.weights import load_model
from effdet.export import ExportError, ExportOptions, check_pt2, export_pt2
from effdet.export.program import ExportedDetector


@pytest.fixture(scope="module")
def soft(tmp_path_factory):
    """Soft-NMS, any batch and size, boxes of the file."""
    bench = effdet.DetBenchPredict(load_model().model)
    bench.soft_nms = True
    options = ExportOptions(any_size=True, img_info=True)
    path = tmp_path_factory.mktemp("pt2") / "soft.pt2"
    return path, bench, options, export_pt2(bench, path, options, class_names=list("abcde"))


def test_equal_to_the_bench(soft):
    path, bench, options, report = soft
    check = report.check
    assert check.compared > 300 and check.box < 0.01 and check.score < 1e-5
    assert {shape[1:] for shape in check.shapes} == {(256, 256), (384, 512)}
    assert report.nodes > 500 and report.size == path.stat().st_size
    images, scale, size = (
        torch.rand(5, 3, 256, 384) * 255,
        torch.full((5,), 2.0),
        torch.full((5, 2), 300.0),
    )
    with torch.no_grad():
        want = ExportedDetector(bench, options)(images, scale, size)
        got = torch.export.load(path).module()(images, scale, size)
    assert (want[..., 5] > 0).any() and want[..., :4].max() <= 300
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


def test_it_needs_no_package(soft):
    """Loaded and run where neither `effdet` nor `effdet_kernels` can be imported."""
    code = f"""
import sys, torch
sys.modules["effdet"] = sys.modules["effdet_kernels"] = None
program = torch.export.load({str(soft[0])!r}).module()
with torch.no_grad():
    print(program(torch.zeros(1, 3, 256, 256), torch.ones(1), torch.full((1, 2), 256.0)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "torch.Size([1, 100, 6])"


def test_metadata(soft):
    extra = {"effdet.json": ""}
    torch.export.load(soft[0], extra_files=extra)
    facts = json.loads(extra["effdet.json"])
    assert facts["classes"] == list("abcde") and facts["soft_nms"] is True
    assert facts["score_threshold"] == 0.001


def test_sizes_that_do_not_fit_are_refused(soft):
    program = torch.export.load(soft[0]).module()
    for size in ((256, 320), (128, 256)):
        with pytest.raises((AssertionError, RuntimeError)):
            program(torch.zeros(1, 3, *size), torch.ones(1), torch.ones(1, 2))


def test_nothing_is_cropped(soft):
    """By which sizes that do not fit would pass unseen."""
    graph = torch.export.load(soft[0]).graph
    (images,) = [node for node in graph.nodes if node.name == "images"]
    users = {str(user.target) for user in images.users}
    assert users == {"aten.sym_size.int", "aten.sub.Tensor"}


def test_nothing_of_this_machine_is_in_it(soft):
    assert b".py" not in soft[0].read_bytes()
    assert torch.export.load(soft[0]).example_inputs is None


def test_a_full_disk_is_an_error(soft, tmp_path, monkeypatch):
    """Written by Python: where torch's zip writer cannot go on, the process aborts."""
    program = torch.export.load(soft[0])
    monkeypatch.setattr("effdet.export.files.export_program", lambda *_: program)

    def full(path, content):
        assert len(content) > 1e6
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        export_pt2(soft[1], tmp_path / "d.pt2", soft[2], check=False)
    assert not list(tmp_path.iterdir())


def test_a_wrong_file_is_caught(soft, tmp_path):
    path, bench, options, _ = soft
    bench.sigma = 0.1
    with pytest.raises(ExportError, match="picture 1 of 1 of 256x256"):
        check_pt2(path, bench, options)
    bench.sigma = None
    half = tmp_path / "half.pt2"
    half.write_bytes(path.read_bytes()[:100_000])
    with pytest.raises(ExportError, match=r"half\.pt2: torch.export cannot load it"):
        check_pt2(half, bench, options)
    with pytest.raises(FileNotFoundError):
        check_pt2(tmp_path / "none.pt2", bench, options)
