"""Training in two processes, as torchrun starts them, against one with the whole batch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from effdet.cli import main
from effdet.data import coco_folder
from effdet.engine import checkpoint as checkpoints
from effdet.engine.config import TrainConfig
from effdet.engine.data import eval_loader, train_loader
from effdet.engine.evaluate import evaluate
from effdet.engine.log import read_log
from effdet.engine.weights import load_model
from effdet.scenes import generate_scenes

CPU = torch.device("cpu")
_ROOT = Path(__file__).resolve().parents[2]
_WORKER = str(Path(__file__).with_name("float64_run.py"))
_TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
_TWO = [*_TORCHRUN, "--nproc-per-node", "2"]
_QUICK = ("--size", 64, "--batch-size", 4, "--threads", 1, "--workers", 0, "--device", "cpu")


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    generate_scenes(folder, 12, seed=0, size=64)
    generate_scenes(folder, 5, seed=0, size=64, split="val")
    return folder


def _start(command: list[object]) -> subprocess.Popen[str]:
    paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([str(c) for c in command], text=True, env=environment, **pipes)


def _run(command: list[object]) -> str:
    process = _start(command)
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return out


def _losses(out: Path) -> list[float]:
    return [r["loss"] for r in read_log(out / "log.jsonl") if r["kind"] == "step"]


def _worst(first: Path, second: Path) -> float:
    """The largest difference of a tensor of the two checkpoints, as a share of its norm (or 1 of a small one)."""
    a, b = (checkpoints.read(folder / "last.pth") for folder in (first, second))
    worst = 0.0
    for key in ("state_dict", "state_dict_ema"):
        for name, value in a[key].items():
            if value.is_floating_point():
                assert value.dtype == torch.float64
                off = (value - b[key][name]).norm() / value.norm().clamp(min=1e-3)
                worst = max(worst, float(off))
            else:
                assert torch.equal(value, b[key][name]), name
    return worst


@pytest.fixture(scope="module")
def whole(scenes, tmp_path_factory):
    """Six float64 steps of one process with batches of four."""
    out = tmp_path_factory.mktemp("whole")
    _run([sys.executable, _WORKER, scenes, out, 4])
    return out


@pytest.mark.parametrize("flags", [(), ("again",)])
def test_two_processes_take_the_steps_of_one(scenes, tmp_path, whole, flags):
    _run([*_TWO, _WORKER, scenes, tmp_path, 4, *flags])
    assert _losses(tmp_path) == pytest.approx(_losses(whole), rel=1e-6, abs=1e-6)
    assert len(_losses(whole)) == 6
    assert _worst(whole, tmp_path) < 1e-6


@pytest.mark.parametrize("flag", ["own_norms", "own_loss"])
def test_each_half_of_it_matters(scenes, tmp_path, whole, flag):
    _run([*_TWO, _WORKER, scenes, tmp_path, 4, flag])
    assert _worst(whole, tmp_path) > 1e-4


def test_evaluation_is_gathered_and_the_run_goes_on_alone(scenes, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "effdet", "train", scenes, "--out", out, *_QUICK, "--epochs", 2, "--quiet"]
    printed = _run([*_TWO, *command, "--save-every", 3, "--keep", 2])
    assert printed.count("done, best AP") == 1
    epochs = [r for r in read_log(out / "log.jsonl") if r["kind"] == "epoch"]
    loaded = load_model(checkpoint=out / "last.pth")
    dataset = coco_folder(scenes, "val")
    alone = evaluate(loaded.model, eval_loader(dataset, loaded.model.config, 4, 0, CPU), dataset)
    assert epochs[-1]["AP50"] > 0
    assert {name: epochs[-1][name] for name in alone.stats} == pytest.approx(alone.stats)
    again = ["train", "--resume", out / "epoch-1.pth", "--out", tmp_path / "alone", "--quiet"]
    assert main([str(a) for a in again]) == 0
    assert checkpoints.read(tmp_path / "alone/last.pth")["epoch"] == 2


def _step_logged(out: Path, step: int) -> bool:
    log = out / "log.jsonl"
    return log.exists() and any(r.get("step", 0) >= step for r in read_log(log))


def _wait_for(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while not _step_logged(out, step):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_signal_stops_all_at_the_same_step(scenes, tmp_path):
    out = tmp_path / "run"
    command = ["-m", "effdet", "train", scenes, "--out", out, *_QUICK, "--epochs", 500]
    process = _start([*_TWO, *command, "--eval-every", 0, "--log-every", 1, "--quiet"])
    _wait_for(process, out, 4)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    content = checkpoints.read(out / "last.pth")
    steps = [r["step"] for r in read_log(out / "log.jsonl") if r["kind"] == "step"]
    assert content["epoch"] * 3 + content["step_in_epoch"] == steps[-1] >= 4


def _workers(parent: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == parent:
            found.append(int(stat.parent.name))
    return sorted(found)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds the processes in /proc")
@pytest.mark.parametrize("victim", [0, 1])
def test_all_go_on_when_one_dies(scenes, tmp_path, victim):
    arguments = [*_QUICK, "--epochs", 4, "--eval-every", 0, "--save-every", 1, "--log-every", 1]
    command = ["-m", "effdet", "train", scenes, "--quiet", *arguments]
    _run([*_TWO, *command, "--out", tmp_path / "whole"])
    out = tmp_path / "run"
    process = _start([*_TWO, "--max-restarts", 1, *command, "--out", out, "--restart"])
    _wait_for(process, out, 3)
    os.kill(_workers(process.pid)[victim], signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    resumed = [r["resumed_at_step"] for r in read_log(out / "log.jsonl") if r["kind"] == "config"]
    assert len(resumed) == 2 and resumed[0] == 0 and resumed[1] >= 2
    first, second = (checkpoints.read(tmp_path / n / "last.pth") for n in ("whole", "run"))
    for name, value in first["state_dict"].items():
        assert torch.equal(second["state_dict"][name], value), name


def test_a_batch_that_cannot_be_shared_out_is_named(scenes, monkeypatch):
    monkeypatch.setattr("effdet.engine.data.get_world_size", lambda: 3)
    config = TrainConfig(str(scenes), "out", batch_size=4, accumulate=2)
    with pytest.raises(ValueError, match="batch_size: got 4, takes a multiple of 6: 3 processes"):
        train_loader(coco_folder(scenes, "train"), None, config, CPU)
