"""Scalars for TensorBoard: by a stand-in for its writer, and by itself where it is installed."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import ClassVar

import pytest

from effdet.engine.tensorboard import TensorBoardLog

RECORDS = [
    ("config", {"model": "m", "epochs": 3}),
    ("step", {"step": 20, "epoch": 1, "lr": 0.5, "loss": 2.0, "box_loss": float("nan")}),
    ("skipped", {"step": 21, "where": "stem", "images": ["a.png"]}),
    (
        "epoch",
        {
            "epoch": 1,
            "step": 25,
            "AP": 0.25,
            "APsmall": -1.0,
            "per_class": {"cup": {"AP": 0.25, "AP50": 0.5}, "jar": {"AP": None, "AP50": None}},
        },
    ),
    ("epoch", {"epoch": 2, "step": 50}),
]
SCALARS = {
    "train/lr": [(20, 0.5)],
    "train/loss": [(20, 2.0)],
    "val/AP": [(1, 0.25)],
    "val AP/cup": [(1, 0.25)],
    "val AP50/cup": [(1, 0.5)],
}


class Writer:
    """In the place of ``SummaryWriter``."""

    made: ClassVar[list[Writer]] = []

    def __init__(self, folder: str) -> None:
        self.folder, self.scalars, self.flushed, self.closed = folder, {}, 0, False
        Writer.made.append(self)

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.scalars.setdefault(tag, []).append((step, value))

    def flush(self) -> None:
        self.flushed += 1

    def close(self) -> None:
        self.closed = True


def write(folder) -> None:
    log = TensorBoardLog(folder)
    for kind, fields in RECORDS:
        log.write(kind, **fields)
    log.close()


def test_numbers_of_steps_and_epochs_are_scalars(monkeypatch, tmp_path):
    module = ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    write(tmp_path / "tensorboard")
    writer = Writer.made.pop()
    assert writer.folder == str(tmp_path / "tensorboard") and writer.scalars == SCALARS
    assert writer.flushed == 2 and writer.closed


def test_without_tensorboard_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ImportError, match=r'pip install "effdet-kernels\[tensorboard\]"'):
        TensorBoardLog(tmp_path)


def test_tensorboard_reads_what_is_written(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    write(tmp_path)
    found = events.EventAccumulator(str(tmp_path)).Reload()
    tags = found.Tags()["scalars"]
    assert {tag: [(e.step, e.value) for e in found.Scalars(tag)] for tag in tags} == SCALARS
