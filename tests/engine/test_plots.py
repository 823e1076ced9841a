"""Pages of plots: what is drawn, and that nothing is needed which a log may lack."""

from __future__ import annotations

import json
import sys
import warnings

import pytest
from PIL import Image

from effdet.engine import plots
from effdet.engine.evaluate import Evaluation, write_precision_recall
from effdet.engine.log import JsonLog, plot_curves

pytest.importorskip("matplotlib")


def records(count: int, epochs: int = 3) -> list[dict]:
    """A log of ``count`` classes, the last of which has no objects."""
    names = [f"class {n}" for n in range(count)]
    found = [{"kind": "config"}]
    for epoch in range(1, epochs + 1):
        step = {"loss": 2.0 / epoch, "class_loss": 1.0 / epoch, "box_loss": 0.0, "lr": 0.1}
        found.append({"kind": "step", "step": 10 * epoch, "epoch": epoch, **step})
        ap = 0.1 * epoch
        per_class = {name: {"AP": ap, "AP50": 2 * ap} for name in names}
        per_class[names[-1]] = {"AP": None, "AP50": None}
        figures = {"AP": ap, "AP50": 2 * ap, "AP75": ap, "per_class": per_class}
        found.append({"kind": "epoch", "epoch": epoch, "step": 10 * epoch, **figures})
    return found


def curves(count: int, epoch: int | None = 3) -> dict:
    precision = [1.0] * 51 + [0.0] * 50
    of_class: dict = {f"class {n}": precision for n in range(count)}
    of_class[f"class {count - 1}"] = None
    mean = {"AP50": precision, "AP75": precision, "AP": precision}
    recall = [n / 100 for n in range(101)]
    return {"epoch": epoch, "recall": recall, "mean": mean, "per_class": of_class}


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in figure.axes]


def panel(figure, title: str):
    return next(axes for axes in figure.axes if axes.get_title().startswith(title))


def test_few_classes_have_a_line_each():
    figure = plots.training_page(records(4), curves(4))
    assert titles(figure) == [
        "training loss",
        "learning rate",
        "validation, averaged weights",
        "precision and recall, epoch 3",
        "AP of classes, IoU .50:.95",
        "precision and recall of classes, epoch 3",
    ]
    assert len(panel(figure, "AP of classes").lines) == 3  # one has no objects
    assert len(panel(figure, "precision and recall of").lines) == 3
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["class 0", "class 1", "class 2", "class 3\n(no objects)"]
    loss = panel(figure, "training loss")
    assert loss.get_yscale() == "log" and list(loss.lines[0].get_xdata()) == [10, 20, 30]
    figures = [line.get_label() for line in panel(figure, "precision and recall").lines]
    assert figures[0] == "AP50, IoU .50: 0.505"


@pytest.mark.parametrize(("count", "bars"), [(21, 20), (81, 80), (120, 80)])
def test_many_classes_are_bars_of_the_last_evaluation(count, bars):
    figure = plots.training_page(records(count), curves(count))
    axes = panel(figure, "AP of classes, epoch 3")
    assert len(axes.patches) == 2 * bars and not figure.legends
    assert ("40 best and the 40 worst of 119" in axes.get_title()) == (count == 120)


def test_bars_are_in_order():
    per_class = {"low": {"AP": 0.1, "AP50": 0.2}, "high": {"AP": 0.5, "AP50": 0.6}}
    figure = plots.evaluation_page(per_class, curves(2, None))
    axes = panel(figure, "AP of classes")
    assert [label.get_text() for label in axes.get_xticklabels()] == ["high", "low"]
    assert [bar.get_height() for bar in axes.patches] == [0.6, 0.2, 0.5, 0.1]


@pytest.mark.parametrize(
    "found",
    [
        [],
        [{"kind": "config"}],
        [{"kind": "step", "step": 5, "epoch": 1}],
        [{"kind": "step", "step": 5, "loss": float("nan")}, {"kind": "skipped", "step": 6}],
        [{"kind": "epoch", "epoch": 1, "step": 5}],
        [{"kind": "epoch", "epoch": 1, "AP": -1.0, "per_class": {"a": {"AP": None}}}],
    ],
)
def test_what_a_log_lacks_is_left_out(found, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = plots.training_page(found, {"mean": {"AP50": None}, "per_class": {"a": None}})
        assert plots.save(page, tmp_path / "page.png")
    assert "nothing yet" in [text.get_text() for text in page.axes[0].texts]


@pytest.mark.parametrize("classes", [3, 30])
def test_without_precision_and_recall_there_are_no_panels_of_them(classes):
    per_class = {f"class {n}": {"AP": 0.1, "AP50": 0.2} for n in range(classes)}
    found = [{"kind": "epoch", "epoch": 1, "AP": 0.1, "per_class": per_class}]
    titles = [axes.get_title() for axes in plots.training_page(found).axes]
    assert len(titles) == 4 and not [title for title in titles if "recall" in title]


def test_of_a_step_or_epoch_written_twice_the_later_counts():
    twice = [*records(2), {"kind": "step", "step": 10, "loss": 9.0}]
    line = panel(plots.training_page(twice), "training loss").lines[0]
    assert (line.get_xdata()[0], line.get_ydata()[0]) == (10, 9.0)


def test_odd_names_are_drawn(tmp_path):
    names = ["_hidden", "$x_1", "a" * 60, "猫"]
    per_class = {name: {"AP": 0.1, "AP50": 0.2} for name in names}
    found = [{"kind": "epoch", "epoch": 1, "AP": 0.1, "per_class": per_class}]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        page = plots.training_page(found)
        assert plots.save(page, tmp_path / "page.png")
    texts = [text.get_text().strip() for text in page.legends[0].get_texts()]
    assert texts == ["_hidden", r"\$x_1", "a" * 21 + "…", "猫"]


def test_the_file_beside_the_log_is_drawn(tmp_path):
    log = JsonLog(tmp_path / "log.jsonl")
    for record in records(2):
        log.write(**record)
    log.close()
    evaluation = Evaluation({}, {}, {**curves(2), "recall": [n / 100 + 1e-9 for n in range(101)]})
    write_precision_recall(evaluation, tmp_path / "precision_recall.json", epoch=7)
    stored = plots.read_curves(tmp_path / "log.jsonl")
    assert stored["epoch"] == 7 and stored["recall"][3] == 0.03
    assert stored["mean"] == curves(2)["mean"] and stored["per_class"]["class 1"] is None
    assert plot_curves(tmp_path / "log.jsonl", tmp_path / "curves.png")
    assert Image.open(tmp_path / "curves.png").format == "PNG"
    assert {p.name for p in tmp_path.iterdir()} == {
        "log.jsonl",
        "precision_recall.json",
        "curves.png",
    }


@pytest.mark.parametrize("content", ["", "{", "[1]"])
def test_a_broken_file_of_curves_is_left_out(tmp_path, content):
    (tmp_path / "precision_recall.json").write_text(content)
    assert plots.read_curves(tmp_path / "log.jsonl") is None


def test_without_matplotlib_there_is_no_page(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert plots.training_page(records(2)) is None
    assert plots.evaluation_page({}, json.loads("{}")) is None
