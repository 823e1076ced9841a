"""Results as one self-contained page: no network, no file beside it."""

from __future__ import annotations

import base64
import hashlib
import html
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template

from bench import drawing, roofline
from bench.columns import (
    CASE,
    DEVICE,
    DIRECTION,
    DTYPE,
    ENGINE,
    FIGURES,
    GRAPH,
    ROOFLINE,
    SHAPE,
    Column,
)
from bench.results import ABSENT, SKIPPED, TIMED, WRONG, Row
from bench.setups import Setup, plain, status_of

HERE = Path(__file__).parent
SUITE = Column("suite", "suite", "what kind of benchmark")
NAME = Column("name", "name", "op or model")
COLUMNS = (SUITE, NAME, CASE, DIRECTION, DTYPE, DEVICE, ENGINE, *FIGURES, GRAPH, SHAPE)
_CHOICES = (SUITE, DEVICE, DTYPE, DIRECTION, ENGINE)
_STATUSES = (TIMED, WRONG, SKIPPED, ABSENT)


def render(
    setups: Sequence[Setup],
    plots: Sequence[roofline.Plot],
    title: str,
    reading: str,
    notes: Sequence[str] = (),
) -> str:
    """The page's HTML.

    Args:
        setups: whose rows it shows.
        plots: drawn above the table.
        title: its heading.
        reading: how to read the figures.
        notes: sentences below that.
    """
    script = (HERE / "script.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    several = len(setups) > 1
    rows = [row for setup in setups for row in setup.rows]
    columns = [column for column in COLUMNS if any(map(column.cell, rows))]
    body = [line for setup in setups for line in _lines(setup, columns, several)]
    return Template((HERE / "template.html").read_text(encoding="utf-8")).substitute(
        title=_text(title),
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
        style=(HERE / "style.css").read_text(encoding="utf-8"),
        script=script,
        reading=_text(reading),
        notes="\n".join(f"<p class='note'>{_text(note)}</p>" for note in notes),
        counts=_counts(setups),
        machines="\n".join(map(_machine, setups)),
        plots="\n".join(map(_plot, plots)),
        choices="\n".join(_choices(setups, rows)),
        sorts="\n".join(_sorts(columns, several)),
        head="\n".join(_head(columns, several)),
        rows="\n".join(body),
        total=len(body),
    )


def _text(value: object) -> str:
    return html.escape(plain(value))


def _counts(setups: Iterable[Setup]) -> str:
    counts = Counter(status_of(row) for setup in setups for row in setup.rows)
    return " ".join(
        f"<span class='count{f' {status}' if counts[status] else ''}'><b>{counts[status]}</b> {status}</span>"
        for status in _STATUSES
        if counts[status] or status in (TIMED, WRONG)
    )


def _machine(setup: Setup) -> str:
    facts = {"commit": setup.commit, "measured": setup.measured, "rows": len(setup.rows)}
    facts |= {name: value for name, value in setup.machine.items() if name not in facts}
    items = "".join(f"<dt>{_text(k)}</dt><dd>{_text(v)}</dd>" for k, v in facts.items())
    return (
        f"<details class='machine'><summary><span class='on'>{setup.label}</span> "
        f"{_text(setup.hardware)} <span class='dim'>commit {_text(setup.commit)}, "
        f"{_text(setup.measured)}</span></summary><dl>{items}</dl></details>"
    )


def _plot(plot: roofline.Plot) -> str:
    svg = plot.svg[plot.svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="[A-Za-z0-9.]+_\d+"', "", svg)  # of groups; several plots would share them
    for colour, name in ((drawing.INK, "ink"), (drawing.PAPER, "card"), (drawing.RULE, "rule")):
        svg = svg.replace(colour, f"var(--{name})")
    for index, colour in enumerate(drawing.COLOURS):
        svg = svg.replace(colour, f"var(--engine-{index})")
    note = f" Cases without operations, not in it: {plot.left_out}." if plot.left_out else ""
    return (
        f"<details class='plot' open><summary>Roofline: {_text(plot.title)}</summary>"
        f"<p class='dim'>The best engine of each case.{note}</p>"
        f"<div class='scroll' tabindex='0'>{svg}</div></details>"
    )


def _choices(setups: Sequence[Setup], rows: Sequence[Row]) -> Iterable[str]:
    for column in _CHOICES:
        values = sorted({column.cell(row) for row in rows})
        options = "".join(f"<option value='{_text(v)}'>{_text(v)}</option>" for v in values)
        yield _select(column.field, column.title, "<option value=''>all</option>" + options)
    if len(setups) > 1:
        options = "".join(f"<option>{setup.label}</option>" for setup in setups)
        yield _select("on", "on", "<option value=''>all</option>" + options)
    options = (
        "<option value=''>all</option><option value='!absent' selected>all but absent</option>"
    )
    options += "".join(f"<option>{status}</option>" for status in _STATUSES)
    yield _select("status", "status", options)


def _select(field: str, title: str, options: str) -> str:
    return f"<label>{title} <select data-field='{field}'>{options}</select></label>"


def _titles(columns: Sequence[Column], several: bool) -> list[tuple[str, str, bool]]:
    """Of each column: title, meaning, whether it holds numbers."""
    own = [(c.title, c.meaning, c.numeric) for c in columns]
    return [("on", "machine and commit: see above", False), *own] if several else own


def _sorts(columns: Sequence[Column], several: bool) -> Iterable[str]:
    for index, (title, _, _) in enumerate(_titles(columns, several)):
        yield f"<option value='{index}'>{_text(title)}</option>"


def _head(columns: Sequence[Column], several: bool) -> Iterable[str]:
    for title, meaning, numeric in _titles(columns, several):
        kind = "number" if numeric else "text"
        yield (
            f"<th scope='col' data-kind='{kind}' aria-sort='none'>"
            f"<button type='button' title='{_text(meaning)}'>{_text(title)}</button></th>"
        )


def _lines(setup: Setup, columns: Sequence[Column], several: bool) -> Iterable[str]:
    """A table row per result, with what the selectors compare in its data."""
    for row in setup.rows:
        status = status_of(row)
        fields = {column.field: column.cell(row) for column in _CHOICES}
        fields |= {"status": status, "on": setup.label}
        data = " ".join(f"data-{name}='{_text(value)}'" for name, value in fields.items())
        cells = [_cell(column, row, status) for column in columns]
        if several:
            cells.insert(0, f"<td data-label='on'><span class='on'>{setup.label}</span></td>")
        yield f"<tr class='{status}' {data}>{''.join(cells)}</tr>"


def _cell(column: Column, row: Row, status: str) -> str:
    value = column.value(row)
    label = f"data-label='{_text(column.title)}'"
    if column is ENGINE:
        return f"<td class='engine' {label} data-sort='{_text(column.cell(row))}'>{_engine(row, status)}</td>"
    if not column.numeric:
        return f"<td class='{column.field}' {label}>{_text(column.cell(row))}</td>"
    sort = "" if value is None else f" data-sort='{value!r}'"
    body = _text(column.cell(row))
    if column is ROOFLINE and value is not None:
        body = f"<span class='bar'><i style='width:{min(max(value, 0), 1):.1%}'></i></span>{body}"
    if column.field == "error" and value is not None and row.get("error_of"):
        body = f"<span title='of {_text(row['error_of'])}'>{body}</span>"
    return f"<td class='number' {label}{sort}>{body}</td>"


def _engine(row: Row, status: str) -> str:
    name = f"<b>{_text(ENGINE.cell(row))}</b>"
    if status == TIMED:
        return name
    reason = _text(row.get("reason")) or "no reason was given"
    return f"{name} <span class='status'>{status}</span><span class='reason'>{reason}</span>"
