"""Roofline plots: what each case reaches, under what the machine was measured to allow.

A mark is a case's best engine, numbered; the key below the plot names the numbers.
"""

from __future__ import annotations

import dataclasses
import html
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from bench import drawing
from bench.drawing import COLOURS, INK, MARKERS, PAPER, RULE
from bench.results import Row
from bench.setups import Setup, name_of, number, plain, timed

_COLUMNS = 4  # of the key
_WIDTH, _TOP, _PLOT, _AROUND, _LINE = 11.0, 0.65, 4.7, 1.1, 0.16  # inches; _LINE: of the key
_NAME_LENGTH = 40
_OFFSETS = [  # in points, of a number from its mark: the nearest first, below right first
    (step * math.cos(turn * math.pi / 8), step * math.sin(turn * math.pi / 8))
    for step in range(7, 120, 3)
    for turn in range(-2, 14)
]
Style = dict[str, tuple[str, str]]  # colour and marker by engine
Ceilings = dict[str, tuple[float, float]]  # lowest and highest by field
Box = tuple[float, float, float, float]  # left, bottom, right, top


@dataclasses.dataclass(frozen=True)
class Mark:
    """The best engine of a case."""

    label: int  # its number
    what: str
    engine: str
    intensity: float  # FLOP per byte
    rate: float  # FLOP per second
    share: float | None  # of the roofline


@dataclasses.dataclass(frozen=True)
class Plot:
    file: str
    title: str  # short; the drawing itself says the machine and the commit
    svg: str
    left_out: int  # cases without operations or bytes, which have no place in the plot


def plots(setups: Sequence[Setup]) -> list[Plot]:
    """A plot per setup, device and dtype that has cases of kernels.

    Raises:
        ValueError: matplotlib is missing.
    """
    measured = [_of_kernels(setup) for setup in setups]
    engines = dict.fromkeys(plain(row["engine"]) for rows in measured for row in rows)
    style = {
        engine: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)])
        for i, engine in enumerate(engines)
    }
    found = []
    for setup, rows in zip(setups, measured, strict=True):
        for device, dtype in dict.fromkeys(map(_device_and_dtype, rows)):
            shown = [row for row in rows if _device_and_dtype(row) == (device, dtype)]
            panels, left_out = _panels(shown)
            if panels:
                on = f"-{setup.label}" if len(setups) > 1 else ""
                name = re.sub(r"[^a-z0-9_-]+", "_", f"roofline-{device}-{dtype}{on}".lower())
                title = f"{dtype} on {device}: {setup.hardware}, commit {setup.commit}"
                svg = _draw(panels, _ceilings(shown), style, title, name)
                on = f", {setup.label}" if len(setups) > 1 else ""
                found.append(Plot(f"{name}.svg", f"{dtype} on {device}{on}", svg, left_out))
    return found


def _of_kernels(setup: Setup) -> list[Row]:
    return [row for row in setup.rows if timed(row) and plain(row["suite"]) == "kernels"]


def _device_and_dtype(row: Row) -> tuple[str, str]:
    return plain(row["device"]), plain(row["dtype"])


def _panels(rows: Iterable[Row]) -> tuple[dict[str, list[Mark]], int]:
    """By direction, the marks; and how many cases have no place."""
    best: dict[tuple[str, ...], Row] = {}
    for row in rows:
        key = name_of(row)[:-1]
        if key not in best or row["median_s"] < best[key]["median_s"]:
            best[key] = row
    panels: dict[str, list[Mark]] = {}
    left_out = 0
    for row in sorted(best.values(), key=lambda row: plain(row["name"])):
        flops, nbytes = number(row, "flops") or 0.0, number(row, "bytes") or 0.0
        if flops <= 0 or nbytes <= 0:
            left_out += 1
            continue
        marks = panels.setdefault(plain(row["direction"]), [])
        what = f"{plain(row['name'])} {plain(row['case'])}"
        rate, share = flops / row["median_s"], number(row, "of_roofline")
        engine = plain(row["engine"])
        marks.append(Mark(len(marks) + 1, what, engine, flops / nbytes, rate, share))
    return panels, left_out


def _ceilings(rows: Sequence[Row]) -> Ceilings:
    """The lowest and the highest measured bandwidth and matrix rate; on a CPU, small cases fit in a faster cache."""
    ceilings = {}
    for field in ("bandwidth", "matrix_rate"):
        values = [v for row in rows if (v := number(row, field)) is not None and v > 0]
        if values:
            ceilings[field] = (min(values), max(values))
    return ceilings


def _draw(
    panels: dict[str, list[Mark]],
    ceilings: Ceilings,
    style: Style,
    title: str,
    salt: str,
) -> str:
    keys = [math.ceil(len(marks) / _COLUMNS) * _LINE for marks in panels.values()]
    height = _TOP + sum(keys) + (_PLOT + _AROUND) * len(panels)
    tooltips: dict[str, str] = {}

    def draw(figure: Any) -> None:
        figure.text(0.06, 1 - 0.2 / height, title, va="center", fontsize=11, parse_math=False)
        top = height - _TOP
        for index, ((direction, marks), key) in enumerate(zip(panels.items(), keys, strict=True)):
            gid = f"{salt}-{index}"
            plot = figure.add_axes((0.06, (top - _PLOT) / height, 0.93, _PLOT / height))
            _panel(plot, direction, marks, ceilings, style, gid)
            top -= _PLOT + 0.5 * _AROUND
            _key(figure.add_axes((0.06, (top - key) / height, 0.93, key / height)), marks, style)
            top -= key + 0.5 * _AROUND
            tooltips.update({f"{gid}-{m.label}": _tooltip(m, direction) for m in marks})

    return _titled(drawing.svg(_WIDTH, height, salt, draw), tooltips)


def _panel(
    axes: Any,
    direction: str,
    marks: Sequence[Mark],
    ceilings: Ceilings,
    style: Style,
    gid: str,
) -> None:
    axes.set(xscale="log", yscale="log")
    drawing.style(axes, "FLOP per byte that must be moved", "GFLOP/s")
    axes.set_title(direction, loc="left", color=INK, fontsize=9, parse_math=False)
    _limits(axes, marks, ceilings)
    roof = _roof(axes, ceilings)
    for mark in marks:
        colour, marker = style[mark.engine]
        axes.plot(
            mark.intensity,
            mark.rate / 1e9,
            marker,
            color=colour,
            markersize=5,
            markeredgecolor=PAPER,
            markeredgewidth=0.5,
            zorder=4,
            gid=f"{gid}-{mark.label}",
        )
    _number(axes, marks, roof, style)
    for place, engine in enumerate(reversed(list(dict.fromkeys(m.engine for m in marks)))):
        colour, marker = style[engine]
        y = 0.04 + 0.045 * place
        axes.plot(0.86, y, marker, color=colour, markersize=5, transform=axes.transAxes)
        at = {"transform": axes.transAxes, "va": "center", "fontsize": 8, "parse_math": False}
        axes.text(0.872, y, engine[:24], **at)


def _limits(axes: Any, marks: Sequence[Mark], ceilings: Ceilings) -> None:
    """All marks, and the corner of the roof."""
    xs, ys = [m.intensity for m in marks], [m.rate / 1e9 for m in marks]
    if len(ceilings) == 2:
        low, high = ceilings["bandwidth"][0], ceilings["matrix_rate"][1]
        xs.append(high / low)
        ys.append(high / 1e9)
    axes.set_xlim(min(xs) / 1.8, max(xs) * 2.5)
    axes.set_ylim(min(ys) / 2.5, max(ys) * 2.2)


def _roof(axes: Any, ceilings: Ceilings) -> list[tuple[float, float]]:
    """Draws the measured ceilings, a band where rows measured different ones; returns points on the lines."""
    if len(ceilings) < 2:
        return []
    corners = [r / b for r, b in zip(ceilings["matrix_rate"], ceilings["bandwidth"], strict=True)]
    left, right = axes.get_xlim()
    xs = sorted([*corners, *(left * (right / left) ** (i / 200) for i in range(201))])
    roofs = [
        [min(x * ceilings["bandwidth"][end], ceilings["matrix_rate"][end]) / 1e9 for x in xs]
        for end in (0, 1)
    ]
    axes.fill_between(xs, *roofs, color=RULE, alpha=0.45, linewidth=0, zorder=1)
    for roof in roofs:
        axes.plot(xs, roof, color=INK, linewidth=1.1, zorder=2)
    bandwidths = " to ".join(dict.fromkeys(f"{b / 1e9:,.0f}" for b in ceilings["bandwidth"]))
    rates = " to ".join(dict.fromkeys(f"{r / 1e12:.3g}" for r in ceilings["matrix_rate"]))
    text = f"measured: copy {bandwidths} GB/s, matrix product {rates} TFLOP/s"
    axes.text(0.01, 0.97, text, transform=axes.transAxes, va="top", fontsize=8, zorder=5)
    return [(x, y) for roof in roofs for x, y in zip(xs, roof, strict=True)]


def _number(
    axes: Any,
    marks: Sequence[Mark],
    roof: Sequence[tuple[float, float]],
    style: Style,
) -> None:
    """A number beside each mark, clear of marks, roof and other numbers; a thin line leads far ones back."""
    point = axes.figure.dpi / 72  # pixels
    at = [axes.transData.transform((m.intensity, m.rate / 1e9)) for m in marks]
    taken = [_box(x, y, 3 * point, 3 * point) for x, y in at]
    on_roof = map(axes.transData.transform, roof)
    taken += [_box(x, y, 2 * point, point) for x, y in on_roof]
    for mark, (x, y) in zip(marks, at, strict=True):
        half = (0.75 + 2.1 * len(str(mark.label))) * point, 3.75 * point
        dx, dy = next(
            (
                offset
                for offset in _OFFSETS
                if not _overlaps(_box(x + offset[0] * point, y + offset[1] * point, *half), taken)
            ),
            _OFFSETS[0],
        )
        taken.append(_box(x + dx * point, y + dy * point, *half))
        far = math.hypot(dx, dy) > 11
        axes.annotate(
            str(mark.label),
            (mark.intensity, mark.rate / 1e9),
            xytext=(dx, dy),
            textcoords="offset points",
            ha="center",
            va="center_baseline",
            fontsize=6.8,
            color=style[mark.engine][0],
            arrowprops={"arrowstyle": "-", "color": INK, "linewidth": 0.3} if far else None,
            zorder=5,
        )


def _box(x: float, y: float, half_width: float, half_height: float) -> Box:
    return x - half_width, y - half_height, x + half_width, y + half_height


def _overlaps(box: Box, others: Iterable[Box]) -> bool:
    left, bottom, right, top = box
    return any(left < o[2] and o[0] < right and bottom < o[3] and o[1] < top for o in others)


def _key(axes: Any, marks: Sequence[Mark], style: Style) -> None:
    axes.set_axis_off()
    at = {"transform": axes.transAxes, "fontsize": 7.4, "va": "center", "parse_math": False}
    lines = math.ceil(len(marks) / _COLUMNS)
    for index, mark in enumerate(marks):
        column, line = divmod(index, lines)
        x, y = column / _COLUMNS + 0.012, 1 - (line + 0.5) / lines
        share = "" if mark.share is None else f"\u2002{mark.share:.0%}"
        what = mark.what if len(mark.what) <= _NAME_LENGTH else mark.what[: _NAME_LENGTH - 1] + "…"
        axes.text(x, y, str(mark.label), ha="right", color=style[mark.engine][0], **at)
        axes.text(x + 0.006, y, what + share, **at)


def _tooltip(mark: Mark, direction: str) -> str:
    share = "" if mark.share is None else f", {mark.share:.0%} of the roofline"
    return f"{mark.label}: {mark.what} {direction}, {mark.engine}{share}"


def _titled(svg: str, tooltips: dict[str, str]) -> str:
    """The SVG with a tooltip on each mark."""
    for gid, text in tooltips.items():
        opening = f'<g id="{gid}">'
        svg = svg.replace(opening, f"{opening}<title>{html.escape(text)}</title>", 1)
    return svg
