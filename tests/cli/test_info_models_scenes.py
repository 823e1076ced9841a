from __future__ import annotations

import json

import torch

import effdet_kernels._dispatch as dispatch
from effdet_kernels import _native


def test_info_names_versions_threads_and_each_backend_with_a_reason(cli):
    result = cli("info")
    assert result.code == 0
    assert torch.__version__ in result.out
    assert f"{torch.get_num_threads()} threads" in result.out
    for backend in dispatch.BACKENDS:
        reason = dispatch.unavailable_reason(backend)
        line = next(x for x in result.out.splitlines() if x.startswith(f"  {backend} "))
        assert (f"missing: {reason}" if reason else "available") in line
    assert "  soft_nms           cpu, triton, cuda, reference\n" in result.out
    assert "  label_anchors      cpu, triton, reference\n" in result.out


def test_info_says_when_the_kernels_have_one_thread(cli, monkeypatch):
    line = "the C++ kernels use one: they were built without OpenMP"
    assert line not in cli("info").out
    monkeypatch.setattr(_native.module(), "BUILT_WITH_OPENMP", False)
    assert line in cli("info").out


def test_models_lists_size_parameters_anchors_and_weights(cli):
    result = cli("models", "tf_efficientdet_d0", "*nano")
    assert result.code == 0
    lines = {line.split()[0]: line.split() for line in result.out.splitlines()[1:]}
    assert sorted(lines) == ["efficientdet_nano", "tf_efficientdet_d0"]
    assert lines["tf_efficientdet_d0"][1:] == [
        "512x512",
        "3,880,067",
        "49,104",
        "tf_efficientdet_d0_34-f153e0cf.pth",
    ]
    assert lines["efficientdet_nano"][3:] == ["12,276", "bundled", "(scenes)"]


def test_models_without_a_match(cli):
    result = cli("models", "yolo*")
    assert result.code == 1
    assert "no model matches yolo*" in result.err


def test_scenes(cli, tmp_path):
    result = cli("scenes", tmp_path, "--count", 3, "--seed", 4, "--size", 64, "--split", "test")
    assert result.code == 0
    document = json.loads((tmp_path / "instances_test.json").read_text())
    assert len(document["images"]) == 3
    assert all((tmp_path / "images" / i["file_name"]).is_file() for i in document["images"])
    assert not list(tmp_path.rglob("*.part"))


def test_scenes_into_a_file_is_a_clear_error(cli, tmp_path):
    (tmp_path / "file").write_text("")
    result = cli("scenes", tmp_path / "file", "--count", 1)
    assert result.code == 1
    message = result.err.splitlines()[-1]
    assert "effdet scenes: error:" in message and str(tmp_path / "file") in message
