"""The speed/accuracy plot: which rows are in it, and what it says of them."""

from __future__ import annotations

import pytest

from bench import accuracy
from bench.setups import split


def row(name="tf_efficientdet_d0", case="512x512 b1", engine="effdet_kernels", **fields):
    machine = {"cpu": "Some CPU", "threads": 2, "commit": "abc1234", **fields.pop("machine", {})}
    base = {"suite": "model", "name": name, "case": case, "direction": "forward", "dtype": "fp32"}
    timed = {"device": "cpu", "status": "timed", "median_s": 0.02, "spread": 0.1}
    time = {"time": "2026-01-02T10:00:00+00:00"}
    return {**base, "engine": engine, **timed, **time, **fields, "machine": machine}


def d1(**fields):
    return row("tf_efficientdet_d1", "640x640 b1", **fields)


def drawn(*rows):
    return dict(accuracy.plots(split(rows)))


def curves(monkeypatch, *rows):
    found = []
    monkeypatch.setattr(accuracy, "_draw", lambda curves, title, name: found.append(curves) or "")
    drawn(*rows)
    return [
        {engine: [(p.model[-2:], p.seconds) for p in points] for engine, points in of.items()}
        for of in found
    ]


def test_it_says_what_was_measured_and_what_was_not():
    plots = drawn(
        row(), d1(machine={"commit": "def5678"}), row(engine="effdet nchw", median_s=0.09)
    )
    (svg,) = plots.values()
    assert list(plots) == ["accuracy-cpu-fp32.svg"]
    for text in (
        "fp32 on cpu: Some CPU, 2 threads, commits abc1234, def5678",
        "not measured here",
        "milliseconds per image",
        "COCO AP, percent",
        ">D0<",
        ">D1<",
        "PyPI effdet nchw",
    ):
        assert text in svg


def test_the_same_rows_make_the_same_bytes():
    assert drawn(row(), d1()) == drawn(row(), d1())


@pytest.mark.parametrize(
    "other",
    [
        row("tf_efficientdet_d1", "512x512 b1"),  # not its size
        row("tf_efficientdet_d1", "640x640 b8"),
        row("efficientdet_d2", "768x768 b1"),  # no AP was published
        row("someone_elses", "640x640 b1"),
        d1(status="wrong"),
        d1(status="absent", median_s=None),
        d1(engine="reference"),
        d1(suite="train"),
        d1(direction="predict"),
    ],
)
def test_other_rows_are_not_in_it(other):
    assert drawn(row(), other) == {}  # of one model there is no curve


def test_machines_threads_devices_and_dtypes_have_a_plot_each():
    kinds = [{}, {"machine": {"threads": 1}}, {"machine": {"cpu": "Other"}}, {"dtype": "bf16"}]
    plots = drawn(*(make(**kind) for kind in kinds for make in (row, d1)))
    assert sorted(plots) == [
        "accuracy-cpu-bf16-2.svg",
        "accuracy-cpu-fp32-1.svg",
        "accuracy-cpu-fp32-3.svg",
        "accuracy-cpu-fp32-4.svg",
    ]


def test_engines_of_a_model_are_those_of_its_latest_run(monkeypatch):
    later = {"time": "2026-01-03T10:00:00+00:00", "machine": {"commit": "def5678"}}
    rows = [row(median_s=0.01), row(engine="openvino", median_s=0.005), row(median_s=0.02, **later)]
    rows += [row(engine="onnxruntime", median_s=0.03, **later), d1(median_s=0.05)]
    (found,) = curves(monkeypatch, *rows)
    assert found == {"effdet_kernels": [("d0", 0.02), ("d1", 0.05)], "onnxruntime": [("d0", 0.03)]}


def test_published_figures_are_of_models_that_there_are():
    known = accuracy.efficientdet_model_param_dict
    assert set(accuracy.PUBLISHED_AP) <= set(known)
    assert all(known[name].get("url") for name in accuracy.PUBLISHED_AP)
