"""Models and benches on fake CUDA tensors: shapes, dtypes and devices come out right, eager, compiled and exported;
detection does not wait for the device.

Fake tensors hold no values, so that no GPU is needed; code that touches a device or reads a value fails on them. They
run in a process of their own, because a torch without CUDA needs a stand-in for its device guard, and that stays.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "fake_cuda"
COMPILER = shutil.which(os.environ.get("CXX", "g++"))
FLOAT, CUDA = "torch.float32", "cuda:0"
BATCH, CLASSES = 2, 3
SIZES = [(12, 16), (6, 8), (3, 4), (2, 2), (1, 1)]  # of the levels, for 96 x 128

MAPS = {
    f"[{i}][{level}]": [[BATCH, 9 * width, *size], FLOAT, CUDA]
    for i, width in enumerate((CLASSES, 4))
    for level, size in enumerate(SIZES)
}
ROWS = [[BATCH, 100, 6], FLOAT, CUDA]
LOSSES = {f"['{name}']": [[], FLOAT, CUDA] for name in ("loss", "class_loss", "box_loss")}
OUTPUTS = {"model": MAPS, "predict": {"": ROWS}, "train": {**LOSSES, "['detections']": ROWS}}


@pytest.fixture(scope="module")
def guard(tmp_path_factory) -> list[str]:
    """The compiled stand-in, if this torch needs it."""
    if torch.backends.cuda.is_built():
        return []
    if COMPILER is None:
        pytest.skip("this torch is built without CUDA, and there is no C++ compiler (g++, or CXX)")
    library = tmp_path_factory.mktemp("guard") / "guard.so"
    torch_folder = Path(torch.__file__).parent
    flags = ["-std=c++20", "-shared", "-fPIC", f"-I{torch_folder / 'include'}"]
    libraries = [f"-L{torch_folder / 'lib'}", "-lc10"]
    source = str(FOLDER / "guard.cpp")
    subprocess.run([COMPILER, *flags, source, *libraries, "-o", library], check=True)
    return [str(library)]


def printed(script: str, guard: list[str]) -> dict:
    command = [sys.executable, str(FOLDER / script), *guard]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def found(guard):
    return printed("run.py", guard)


@pytest.fixture(scope="module")
def syncs(guard):
    return printed("syncs.py", guard)


@pytest.mark.parametrize("task", OUTPUTS)
@pytest.mark.parametrize("call", ["eager", "compiled", "exported", "with gradients"])
def test_outputs(found, call, task):
    assert found[f"{call} {task}"] == OUTPUTS[task]


def test_losses_in_training_mode(found):
    assert found["training mode"] == LOSSES


@pytest.mark.parametrize("call", ["hard", "soft", "hard, img_info", "soft, img_info"])
def test_detection_waits_for_nothing(syncs, call):
    launched = syncs["detection"][call]
    assert isinstance(launched, list), launched
    for op in "decode_topk", "soft_nms":
        assert {f"{op} triton", f"{op} cuda"} <= set(launched)


def test_what_waits_is_seen(syncs):
    assert [call for call, words in syncs["planted"].items() if words is None] == []
    assert len(syncs["planted"]) > 15


def test_what_does_not_wait_is_let_pass(syncs):
    assert set(syncs["harmless"].values()) == {None}
