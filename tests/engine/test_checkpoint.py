from __future__ import annotations

import hashlib
import os
import pickle
import random

import pytest
import torch

from effdet.engine import checkpoint as checkpoints


class _RunsCode:
    def __reduce__(self):
        return os.mkdir, ("created-by-a-checkpoint",)


def test_roundtrip_leaves_no_partial_file(tmp_path):
    path = tmp_path / "a.pth"
    checkpoints.save_atomically({"x": torch.arange(3), "names": ["a"], "n": 2}, path)
    content = checkpoints.read(path)
    assert content["x"].tolist() == [0, 1, 2] and content["names"] == ["a"] and content["n"] == 2
    assert os.listdir(tmp_path) == ["a.pth"]


def test_a_failed_save_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    checkpoints.save_atomically({"x": 1}, path)
    with pytest.raises((AttributeError, pickle.PicklingError)):
        checkpoints.save_atomically({"x": lambda: None}, path)
    assert checkpoints.read(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full on this system")
def test_a_full_disk_is_a_clear_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.pth"
    checkpoints.save_atomically({"x": 1}, path)
    (tmp_path / "a.pth.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left.*a\.pth was not written.*kept as"):
        checkpoints.save_atomically({"x": torch.zeros(100_000)}, path)
    assert checkpoints.read(path) == {"x": 1}
    assert os.listdir(tmp_path) == ["a.pth"]


def test_the_last_files_are_kept_by_number(tmp_path):
    path = tmp_path / "last.pth"
    (tmp_path / "epoch-best.pth").touch()  # not one of them
    for number in (9, 10, 11):
        checkpoints.save_atomically({"x": number}, path)
        checkpoints.keep_epoch(path, number, most=2)
    assert sorted(os.listdir(tmp_path)) == [
        "epoch-10.pth", "epoch-11.pth", "epoch-best.pth", "last.pth"
    ]  # fmt: skip
    assert checkpoints.read(tmp_path / "epoch-10.pth") == {"x": 10}


def test_keeping_none_writes_none(tmp_path):
    checkpoints.save_atomically({"x": 1}, tmp_path / "last.pth")
    checkpoints.keep_epoch(tmp_path / "last.pth", 1, most=0)
    assert os.listdir(tmp_path) == ["last.pth"]


def test_pickled_code_is_refused_and_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": _RunsCode()}, "evil.pth")
    with pytest.raises(checkpoints.CheckpointError, match=r"evil\.pth.*can run code"):
        checkpoints.read("evil.pth")
    assert not os.path.exists("created-by-a-checkpoint")


@pytest.mark.parametrize("keep", [0, 1, 100, -1])
def test_a_truncated_file_is_named(tmp_path, keep):
    path = tmp_path / "cut.pth"
    torch.save({"x": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(checkpoints.CheckpointError, match=r"cut\.pth"):
        checkpoints.read(path)


def test_missing_and_foreign_files_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        checkpoints.read(tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(checkpoints.CheckpointError, match=r"text\.pth"):
        checkpoints.read(tmp_path / "text.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(checkpoints.CheckpointError, match="holds a list, expected a dict"):
        checkpoints.read(tmp_path / "list.pth")


def test_random_state_roundtrip_through_a_file(tmp_path):
    torch.manual_seed(3)
    random.seed(4)
    checkpoints.save_atomically({"rng": checkpoints.rng_state()}, tmp_path / "r.pth")
    expected = torch.rand(3).tolist(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    checkpoints.restore_rng_state(checkpoints.read(tmp_path / "r.pth")["rng"])
    assert (torch.rand(3).tolist(), random.random()) == expected


def _training_checkpoint(weight: torch.Tensor) -> dict:
    return {
        "format": checkpoints.FORMAT,
        "model": "efficientdet_nano",
        "image_size": [256, 256],
        "class_names": ["a"],
        "category_ids": [1],
        "state_dict": {"w": torch.zeros_like(weight)},
        "state_dict_ema": {"w": weight, "n": torch.tensor(7)},
        "optimizer": {"large": torch.zeros(10_000)},
    }


def test_export_keeps_the_averaged_weights_in_half_precision_under_a_hashed_name(tmp_path):
    weight = torch.randn(3, 2)
    checkpoints.save_atomically(_training_checkpoint(weight), tmp_path / "best.pth")
    path = checkpoints.export_half(tmp_path / "best.pth", tmp_path / "small.pth")
    assert path.name == f"small-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth"
    content = checkpoints.read(path)
    assert torch.equal(content["state_dict"]["w"], weight.half())
    assert int(content["state_dict"]["n"]) == 7
    assert content["class_names"] == ["a"] and content["image_size"] == [256, 256]
    assert "optimizer" not in content
    assert sorted(os.listdir(tmp_path)) == sorted(["best.pth", path.name])


def test_export_refuses_what_half_cannot_hold_and_other_files(tmp_path):
    checkpoints.save_atomically(_training_checkpoint(torch.tensor([1e6])), tmp_path / "big.pth")
    with pytest.raises(checkpoints.CheckpointError, match="w does not fit half precision"):
        checkpoints.export_half(tmp_path / "big.pth", tmp_path / "out.pth")
    torch.save({"w": torch.zeros(1)}, tmp_path / "plain.pth")
    with pytest.raises(checkpoints.CheckpointError, match="not written by `effdet train`"):
        checkpoints.export_half(tmp_path / "plain.pth", tmp_path / "out.pth")
