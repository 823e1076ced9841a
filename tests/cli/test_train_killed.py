"""kill -9 at any moment: the checkpoint stays whole, at most one interval is lost, and the end is the same."""

from __future__ import annotations

import random
import time

import pytest
import torch

from effdet.engine import checkpoint as checkpoints
from effdet.engine.log import read_log

_STEPS_AN_EPOCH = 3
_INTERVAL = 2
_LENGTH = ("--epochs", 8, "--save-every", _INTERVAL)
_QUICK = ("--size", 64, "--batch-size", 4, "--threads", 1, "--workers", 1, "--eval-every", 0)


@pytest.fixture(scope="module")
def uninterrupted(scenes, tmp_path_factory):
    from effdet.cli import main

    out = tmp_path_factory.mktemp("uninterrupted")
    args = ["train", scenes, "--out", out, *_LENGTH, *_QUICK, "--quiet"]
    assert main([str(a) for a in args]) == 0
    return checkpoints.read(out / "last.pth")


def _position(path) -> int:
    if not path.exists():
        return 0
    content = checkpoints.read(path)
    return content["epoch"] * _STEPS_AN_EPOCH + content["step_in_epoch"]


def _records(out, kind: str) -> list[dict]:
    log = out / "log.jsonl"
    return [r for r in read_log(log) if r["kind"] == kind] if log.exists() else []


def _killed_and_taken_up_again(cli_process, scenes, out, kills: int, seed: int) -> int:
    """Run the command until it ends by itself, killing it so many times; returns the number of kills."""
    moments = random.Random(seed)
    command = ["train", scenes, "--out", out, *_LENGTH, *_QUICK, "--log-every", 1, "--restart"]
    done = 0
    while True:
        before, started = _position(out / "last.pth"), len(_records(out, "config"))
        process = cli_process(*command)
        if done == kills:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors
            return done
        deadline = time.monotonic() + 120
        while len(_records(out, "config")) == started and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(moments.uniform(0, 0.6))
        process.kill()
        _, errors = process.communicate(timeout=60)
        if process.returncode == 0:
            return done
        assert process.returncode == -9, errors
        done += 1
        after = _position(out / "last.pth")
        assert after >= before
        logged = [r["step"] for r in _records(out, "step")]
        assert after >= (logged[-1] if logged else 0) - _INTERVAL


def _assert_same_end(out, uninterrupted):
    content = checkpoints.read(out / "last.pth")
    for key in ("state_dict", "state_dict_ema"):
        for name, value in uninterrupted[key].items():
            assert torch.equal(content[key][name], value), f"{key} {name}"
    assert not list(out.glob("*.part"))


def test_three_moments(cli_process, scenes, tmp_path, uninterrupted):
    out = tmp_path / "run"
    assert _killed_and_taken_up_again(cli_process, scenes, out, 3, seed=0) == 3
    _assert_same_end(out, uninterrupted)


@pytest.mark.slow
def test_twenty_moments(cli_process, scenes, tmp_path, uninterrupted):
    """In runs of their own where one ends before its kills do."""
    kills = 0
    for run in range(20):
        out = tmp_path / str(run)
        kills += _killed_and_taken_up_again(cli_process, scenes, out, 20 - kills, seed=run)
        _assert_same_end(out, uninterrupted)
        if kills == 20:
            return
    pytest.fail(f"{kills} moments only")
