"""Speed and accuracy: the AP that was published of a model's weights over the time that its network took here."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from bench import drawing
from bench.drawing import COLOURS, INK, MARKERS
from bench.results import HARDWARE, KEY, Row
from bench.setups import Setup, identity, machine_of, number, plain, timed
from effdet.config.model_config import efficientdet_model_param_dict, get_efficientdet_config

# Percent of COCO val2017, as PyPI effdet's README has it of the weights that it loads (its own evaluation, with NMS).
PUBLISHED_AP = {
    "efficientdet_d0": 33.6,
    "efficientdet_d1": 39.4,
    "efficientdetv2_dt": 46.1,
    "efficientdetv2_ds": 50.1,
    "resdet50": 41.6,
    "cspresdet50": 43.2,
    "cspresdext50pan": 41.2,
    "cspdarkdet53m": 45.2,
    "efficientdet_q0": 35.7,
    "efficientdet_q1": 40.9,
    "efficientdet_q2": 43.1,
    "tf_efficientdet_d0": 34.2,
    "tf_efficientdet_d1": 40.1,
    "tf_efficientdet_d2": 43.4,
    "tf_efficientdet_d3": 47.1,
    "tf_efficientdet_d4": 49.2,
    "tf_efficientdet_d5": 51.2,
    "tf_efficientdet_d6": 52.0,
    "tf_efficientdet_d7": 53.1,
    "tf_efficientdet_d7x": 54.3,
    "tf_efficientdet_d0_ap": 34.8,
    "tf_efficientdet_d1_ap": 40.8,
    "tf_efficientdet_d2_ap": 44.2,
    "tf_efficientdet_d3_ap": 47.7,
    "tf_efficientdet_d4_ap": 50.2,
    "tf_efficientdet_d5_ap": 52.1,
    "tf_efficientdet_lite0": 27.1,
    "tf_efficientdet_lite1": 32.2,
    "tf_efficientdet_lite2": 35.9,
    "tf_efficientdet_lite3": 39.6,
    "tf_efficientdet_lite3x": 43.6,
    "tf_efficientdet_lite4": 44.2,
}
_OURS = "effdet_kernels"
_NOT_SHOWN = ("reference",)  # a check, no engine that anyone would choose
_FEWEST = 2  # models that make a curve
_CAPTION = (
    "COCO AP: val2017, published with the weights that PyPI effdet loads; not measured here.",
    "Time: one image through the network, without NMS; median, and the quartiles' distance, of the latest run of each"
    " model, in which its engines took turns.",
)


@dataclasses.dataclass(frozen=True)
class Point:
    """A model on an engine."""

    model: str
    seconds: float
    spread: float  # the quartiles' distance over the median
    ap: float


def plots(setups: Sequence[Setup]) -> Iterator[tuple[str, str]]:
    """File name and SVG per hardware, device and dtype that has two models at least, of whatever commits.

    Raises:
        ValueError: matplotlib is missing.
    """
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in (row for setup in setups for row in setup.rows if _is_shown(row)):
        where = plain(row["device"]), plain(row["dtype"]), *identity(row, HARDWARE)
        groups.setdefault(where, []).append(row)
    latest = {where: _latest_runs(rows) for where, rows in groups.items()}
    latest = {w: rows for w, rows in latest.items() if len({r["name"] for r in rows}) >= _FEWEST}
    for index, ((device, dtype, *_), rows) in enumerate(latest.items()):
        name = f"accuracy-{device}-{dtype}" + (f"-{index + 1}" if len(latest) > 1 else "")
        name = re.sub(r"[^a-z0-9_-]+", "_", name.lower())
        hardware = Setup("", machine_of(rows[-1]), rows).hardware
        commits = dict.fromkeys(identity(row, ("commit",))[0] for row in rows)
        title = f"{dtype} on {device}: {hardware}, commits {', '.join(commits)}"
        yield f"{name}.svg", _draw(_curves(rows), title, name)


def _is_shown(row: Row) -> bool:
    """A timed forward of one image at the size that the AP was published for."""
    model = plain(row["name"])
    if not timed(row) or plain(row["suite"]) != "model" or plain(row["direction"]) != "forward":
        return False
    if model not in PUBLISHED_AP or model not in efficientdet_model_param_dict:
        return False
    height, width = get_efficientdet_config(model).image_size
    return plain(row["case"]) == f"{height}x{width} b1" and plain(row["engine"]) not in _NOT_SHOWN


def _latest_runs(rows: Iterable[Row]) -> list[Row]:
    """Of each model the rows that were written together last: of engines that took turns."""
    runs: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in rows:
        key = tuple(plain(row[field]) for field in KEY)
        runs.setdefault(key, {}).setdefault(plain(row.get("time")), []).append(row)
    return [row for of_key in runs.values() for row in of_key[max(of_key)]]


def _curves(rows: Iterable[Row]) -> dict[str, list[Point]]:
    """By engine, ours first, its models from the fastest on."""
    curves: dict[str, list[Point]] = {_OURS: []}
    for row in rows:
        model, spread = plain(row["name"]), number(row, "spread") or 0.0
        point = Point(model, row["median_s"], spread, PUBLISHED_AP[model])
        curves.setdefault(plain(row["engine"]), []).append(point)
    return {
        engine: sorted(points, key=lambda p: p.seconds)
        for engine, points in curves.items()
        if points
    }


def _draw(curves: dict[str, list[Point]], title: str, salt: str) -> str:
    def draw(figure: Any) -> None:
        figure.text(0.07, 0.955, title, fontsize=11, parse_math=False)
        axes = figure.add_axes((0.07, 0.2, 0.91, 0.72))
        axes.set_xscale("log")
        drawing.style(axes, "milliseconds per image, logarithmic", "COCO AP, percent")
        for index, (engine, points) in enumerate(curves.items()):
            _curve(
                axes, engine, points, COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]
            )
        _plain_ticks(axes)
        axes.margins(0.06, 0.1)
        axes.legend(loc="lower right", fontsize=8, frameon=False)
        for line, text in enumerate(_CAPTION):
            figure.text(0.07, 0.06 - 0.035 * line, text, fontsize=7.4, parse_math=False)

    return drawing.svg(10, 5.6, salt, draw)


def _curve(axes: Any, engine: str, points: Sequence[Point], colour: str, marker: str) -> None:
    xs, ys = [1e3 * p.seconds for p in points], [p.ap for p in points]
    half = [500 * p.seconds * p.spread for p in points]
    of_ours = engine == _OURS
    label = f"PyPI {engine}" if engine.startswith("effdet ") else engine
    style: dict[str, Any] = {"linewidth": 2 if of_ours else 1, "markersize": 6 if of_ours else 4.5}
    axes.errorbar(
        xs, ys, xerr=half, label=label, color=colour, marker=marker, elinewidth=0.8, **style
    )  # fmt: skip
    for point, x in zip(points, xs, strict=True) if of_ours else ():
        name = point.model.removeprefix("tf_").removeprefix("efficientdet_").capitalize()
        at = {"xytext": (-7, 5), "textcoords": "offset points", "ha": "right", "color": INK}
        axes.annotate(name, (x, point.ap), fontsize=8, parse_math=False, **at)


def _plain_ticks(axes: Any) -> None:
    """Milliseconds as people write them: 5, 10, 20, 50, …"""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
