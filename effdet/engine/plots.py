"""Pages of plots of a training run and of an evaluation, by matplotlib where it is installed."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from effdet.files import replacing

CURVES_FILE = "precision_recall.json"
MOST_LINES = 20  # classes that get a line each; more are bars
_MOST_BARS = 80
_LONGEST_NAME = 22
_MARKED = 40  # points of a line at most that each get a dot
_FIGURES = {"AP": "AP, IoU .50:.95", "AP50": "AP50, IoU .50", "AP75": "AP75, IoU .75"}
_COLOURS = {"AP": "C0", "AP50": "C1", "AP75": "C2"}
_DPI = 110


def read_curves(log: str | os.PathLike[str]) -> dict[str, Any] | None:
    """What ``precision_recall.json`` beside the log has; None where there is no such file, or no whole one."""
    try:
        found = json.loads(Path(log).with_name(CURVES_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def training_page(
    records: Sequence[Mapping[str, Any]], curves: Mapping[str, Any] | None = None
) -> Any | None:
    """Losses and learning rate over steps, AP over epochs and of each class, precision over recall.

    Up to 20 classes have a line each, over epochs and over recall; of more the last evaluation is drawn as
    bars in order, of more than 80 the 40 best and the 40 worst.

    Args:
        records: of a log (`effdet.engine.log.read_log`); a field that is missing is left out, and of
            a step or epoch written twice, as by a resumed run, the later counts.
        curves: `effdet.engine.evaluate.Evaluation.precision_recall`, and its "epoch"; None: without these panels.

    Returns:
        a ``matplotlib.figure.Figure``; None when matplotlib is missing.
    """
    steps = {r["step"]: r for r in records if r.get("kind") == "step"}
    epochs = {r["epoch"]: r for r in records if r.get("kind") == "epoch" and "AP" in r}
    last = epochs[max(epochs)].get("per_class", {}) if epochs else {}
    few = len(last) <= MOST_LINES
    panels = _panels(*_training_layout(few, curves is not None))
    if panels is None:
        return None
    figure, axes = panels
    _draw_losses(axes["loss"], steps)
    _draw_rate(axes["rate"], steps)
    _draw_figures(axes["figures"], epochs)
    if curves is not None:
        _draw_mean_curves(axes["recall"], curves)
    if few:
        _draw_classes_over_epochs(axes["classes"], epochs, list(last))
        if curves is not None:
            _draw_class_curves(axes["class recall"], curves)
        _name_classes(figure, last)
    else:
        _draw_bars(axes["classes"], last, f"epoch {max(epochs)}")
    return figure


def _training_layout(few: bool, recall: bool) -> tuple[list[list[str]], tuple[float, float]]:
    """Names of the panels, and the page's size in inches."""
    if few and recall:
        return [["loss", "rate", "figures"], ["recall", "classes", "class recall"]], (16, 9)
    if few:
        return [["loss", "rate"], ["figures", "classes"]], (12, 9)
    curves = ["loss", "rate", "figures", *(["recall"] if recall else [])]
    return [curves, ["classes"] * len(curves)], (19, 10)


def evaluation_page(
    per_class: Mapping[str, Mapping[str, float | None]], curves: Mapping[str, Any]
) -> Any | None:
    """AP of each class, and precision over recall, of one evaluation.

    Args:
        per_class: of an `effdet.engine.evaluate.Evaluation`.
        curves: its ``precision_recall``.

    Returns:
        a ``matplotlib.figure.Figure``; None when matplotlib is missing.
    """
    few = len(per_class) <= MOST_LINES
    rows = [["recall", "class recall"], ["classes"] * 2]
    panels = _panels(rows, (13, 9) if few else (19, 11))
    if panels is None:
        return None
    figure, axes = panels
    _draw_mean_curves(axes["recall"], curves)
    _draw_class_curves(axes["class recall"], curves)
    if few:
        _name_classes(figure, per_class)
    _draw_bars(axes["classes"], per_class)
    return figure


def save(figure: Any, out: str | os.PathLike[str]) -> bool:
    """Write a page as a PNG file, which appears complete or not; True."""
    with replacing(out) as partial, warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # a letter that the font lacks
        figure.savefig(partial, format="png", dpi=_DPI)
    return True


def _panels(
    rows: list[list[str]], inches: tuple[float, float]
) -> tuple[Any, dict[str, Any]] | None:
    """A figure, and its axes by name."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError:
        return None
    figure: Any = Figure(figsize=inches, layout=ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12))
    FigureCanvasAgg(figure)
    return figure, figure.subplot_mosaic(rows)


def _draw_losses(axes: Any, steps: Mapping[int, Mapping[str, Any]]) -> None:
    names = {
        "loss": "loss (class + weighted box)",
        "class_loss": "class loss",
        "box_loss": "box loss",
    }
    for field, label in names.items():
        points = _points(steps, field)
        if points:
            axes.plot(*zip(*points, strict=True), label=label, linewidth=1)
    axes.set_yscale("log", nonpositive="mask")
    if axes.lines:
        bottom, top = axes.get_ylim()
        axes.set_ylim(bottom, top * (top / bottom) ** 0.25)  # room for the legend
    _finish(axes, "training loss", "step", "loss, logarithmic", legend="upper right")


def _draw_rate(axes: Any, steps: Mapping[int, Mapping[str, Any]]) -> None:
    points = _points(steps, "lr")
    if points:
        axes.plot(*zip(*points, strict=True), linewidth=1.5)
    axes.set_ylim(bottom=0)
    axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _finish(axes, "learning rate", "step", "learning rate")


def _draw_figures(axes: Any, epochs: Mapping[int, Mapping[str, Any]]) -> None:
    for field, label in _FIGURES.items():
        points = _points(epochs, field)
        if points:
            style = {"label": label, "color": _COLOURS[field], "marker": _marker(points)}
            axes.plot(*zip(*points, strict=True), **style)
    axes.set_ylim(0, 1)
    _whole_epochs(axes)
    _finish(axes, "validation, averaged weights", "epoch", "COCO AP", legend="best")


def _draw_mean_curves(axes: Any, curves: Mapping[str, Any] | None) -> None:
    for field, values in ((curves or {}).get("mean") or {}).items():
        if values is not None:
            label = f"{_FIGURES.get(field, field)}: {sum(values) / len(values):.3f}"
            axes.plot(_recall(curves), values, label=label, color=_COLOURS.get(field))
    _finish_recall(axes, f"precision and recall{_epoch_of(curves)}", "precision, mean of classes")


def _draw_class_curves(axes: Any, curves: Mapping[str, Any] | None) -> None:
    of_class = (curves or {}).get("per_class") or {}
    few = len(of_class) <= MOST_LINES
    for number, values in enumerate(of_class.values()):
        if values is not None:
            style = _line(number) if few else {"color": "C0", "alpha": 0.3, "linewidth": 0.8}
            axes.plot(_recall(curves), values, **style)
    title = "precision and recall of " + ("classes" if few else "each class")
    _finish_recall(axes, title + _epoch_of(curves), "precision at IoU .50", False)


def _draw_classes_over_epochs(
    axes: Any, epochs: Mapping[int, Mapping[str, Any]], names: Sequence[str]
) -> None:
    for number, name in enumerate(names):
        of_class = {n: r.get("per_class", {}).get(name, {}) for n, r in epochs.items()}
        points = _points(of_class, "AP")
        if points:
            axes.plot(*zip(*points, strict=True), **_line(number), marker=_marker(points))
    axes.set_ylim(0, 1)
    _whole_epochs(axes)
    _finish(axes, "AP of classes, IoU .50:.95", "epoch", "COCO AP")


def _draw_bars(
    axes: Any, per_class: Mapping[str, Mapping[str, float | None]], when: str = ""
) -> None:
    """AP and AP50 of classes, the best first."""
    known = [
        (overall, half, name)
        for name, figures in per_class.items()
        if _is_figure(overall := figures.get("AP")) and _is_figure(half := figures.get("AP50"))
    ]
    known.sort(reverse=True)
    title = "AP of classes" + (f", {when}" if when else "")
    if len(known) > _MOST_BARS:
        half = _MOST_BARS // 2
        title += f": the {half} best and the {half} worst of {len(known)}"
        known = known[:half] + known[-half:]
    if known:
        of_all, of_half, names = zip(*known, strict=True)
        places = range(len(known))
        axes.bar(places, of_half, 0.8, color="C1", alpha=0.45, label=_FIGURES["AP50"])
        axes.bar(places, of_all, 0.5, color="C0", label=_FIGURES["AP"])
        turned = {"rotation": 90, "fontsize": 8} if len(known) > 10 else {}
        axes.set_xticks(places, [_shown(name) for name in names], **turned)
        axes.set_xlim(-1, len(known))
    axes.set_ylim(0, 1)
    _finish(axes, title, "", "COCO AP", legend="upper right")
    axes.grid(visible=False, axis="x")


def _name_classes(figure: Any, per_class: Mapping[str, Mapping[str, float | None]]) -> None:
    """A legend of the classes' lines, right of all panels."""
    from matplotlib.lines import Line2D

    if per_class:
        lines = [Line2D([], [], **_line(number)) for number in range(len(per_class))]
        labels = [
            _shown(name) + ("" if _is_figure(figures.get("AP")) else "\n(no objects)")
            for name, figures in per_class.items()
        ]
        figure.legend(lines, labels, loc="outside right center", title="classes", handlelength=3)


def _finish(axes: Any, title: str, x: str, y: str, legend: str = "") -> None:
    axes.set_title(title)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    axes.set_axisbelow(True)
    if not (axes.lines or axes.patches):
        axes.text(0.5, 0.5, "nothing yet", transform=axes.transAxes, ha="center", color="grey")
    elif legend:
        axes.legend(loc=legend)


def _finish_recall(axes: Any, title: str, y: str, legend: bool = True) -> None:
    axes.set_xlim(0, 1)
    axes.set_ylim(0, 1.03)
    _finish(axes, title, "recall", y, legend="lower left" if legend else "")


def _whole_epochs(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _points(records: Mapping[int, Mapping[str, Any]], field: str) -> list[tuple[int, float]]:
    """The records' numbers and their field, in order; -1 stands for no objects and is left out."""
    found = [(number, records[number].get(field)) for number in sorted(records)]
    return [(number, value) for number, value in found if _is_figure(value)]


def _is_figure(value: Any) -> TypeGuard[float]:
    return isinstance(value, (int, float)) and math.isfinite(value) and value >= 0


def _recall(curves: Mapping[str, Any] | None) -> list[float]:
    return list((curves or {}).get("recall", []))


def _epoch_of(curves: Mapping[str, Any] | None) -> str:
    epoch = (curves or {}).get("epoch")
    return "" if epoch is None else f", epoch {epoch}"


def _line(number: int) -> dict[str, Any]:
    """Ten colours, drawn through and then dashed: told apart without shades of one colour."""
    return {"color": f"C{number % 10}", "linestyle": "-" if number < 10 else (0, (4, 1.5))}


def _marker(points: Sequence[Any]) -> str | None:
    return "." if len(points) <= _MARKED else None


def _shown(name: str) -> str:
    """A class name as a label: short, no formula, and never hidden by a leading underscore."""
    short = name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
    return (" " if short.startswith("_") else "") + short.replace("$", r"\$")
