from __future__ import annotations

import sys

import pytest
from PIL import Image

from effdet.engine.log import JsonLog, plot_curves, read_log


def _write_log(path):
    log = JsonLog(path)
    log.write("config", model="m")
    for step in (10, 20, 20, 30):  # a resumed run writes a step again
        log.write("step", step=step, loss=10 / step, class_loss=1.0, box_loss=0.1)
    log.write("epoch", epoch=1, AP=0.1, AP50=0.2, AP75=0.05)
    log.write("epoch", epoch=2)
    log.close()


def test_records_come_back_and_a_cut_line_is_left_out(tmp_path):
    path = tmp_path / "log.jsonl"
    _write_log(path)
    with open(path, "a") as file:
        file.write('{"kind": "step", "st')
    records = read_log(path)
    assert [r["kind"] for r in records] == ["config", *["step"] * 4, *["epoch"] * 2]
    assert records[0]["model"] == "m"
    again = JsonLog(path)
    again.write("config", model="n")
    again.close()
    assert [r["kind"] for r in read_log(path)] == [*(r["kind"] for r in records), "config"]


def test_a_second_run_appends(tmp_path):
    _write_log(tmp_path / "log.jsonl")
    _write_log(tmp_path / "log.jsonl")
    assert len(read_log(tmp_path / "log.jsonl")) == 14


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    _write_log(tmp_path / "log.jsonl")
    assert plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    # without the column of precision over recall, which there is none of
    assert Image.open(tmp_path / "curves.png").size == (1320, 990)
    assert not list(tmp_path.glob("*.part"))


def test_without_matplotlib_the_answer_is_false(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _write_log(tmp_path / "log.jsonl")
    assert not plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
