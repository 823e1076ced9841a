"""``python -m bench report``: tables, plots and one self-contained page from rows of results.

Rows of different machines, commits or versions are told apart. Where one of these has several rows with the same key
and engine, the latest counts. A row that was not timed is listed with its reason.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from bench import accuracy, page, roofline
from bench.columns import CASE, DEVICE, DIRECTION, DTYPE, ENGINE, FIGURES, GRAPH, SHAPE
from bench.results import Row, load
from bench.setups import (
    NOT_TIMED,
    Setup,
    machine_of,
    name_of,
    number,
    plain,
    split,
    status_of,
    timed,
    usable,
)
from bench.table import duration

READING = (
    "Each median is over rounds in which the engines of a case took turns; spread is the interquartile range of the"
    " rounds over their median. Two engines whose medians differ by less than their spreads are not told apart here."
    " An engine whose outputs were outside their bound was not timed."
)
_UNNAMED = "do not say what they measured (an older format, or no results)"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="*.jsonl, or a folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="written here")
    parser.add_argument("--title", default="effdet-kernels: benchmarks")
    parser.add_argument("--no-plot", action="store_true", help="no plots; needs no matplotlib")


def run(args: argparse.Namespace) -> int:
    """Writes tables.md, rows.csv, index.html, roofline-<device>-<dtype>.svg and accuracy-<device>-<dtype>.svg.

    Raises:
        ValueError: there is no row at a path, or matplotlib is missing.
    """
    rows, left_out = usable(load(*args.paths))
    if not rows:
        others = f" ({left_out} lines that {_UNNAMED})" if left_out else ""
        raise ValueError(f"no rows of results in {', '.join(map(str, args.paths))}{others}")
    setups = split(rows)
    plots = [] if args.no_plot else roofline.plots(setups)
    args.out.mkdir(parents=True, exist_ok=True)
    notes = [f"Rows left out, because they {_UNNAMED}: {left_out}."] if left_out else []
    files = {plot.file: plot.svg for plot in plots}
    files |= {} if args.no_plot else dict(accuracy.plots(setups))
    files["tables.md"] = tables(setups, args.title, notes)
    files["rows.csv"] = _csv(setups)
    files["index.html"] = page.render(setups, plots, args.title, READING, notes)
    for name, text in files.items():
        (args.out / name).write_text(text, encoding="utf-8")
    for note in notes:
        print(note, file=sys.stderr)
    print(f"{', '.join(files)} in {args.out}")
    return 0


def _csv(setups: Sequence[Setup]) -> str:
    """A line per row, a column per field; what is not a number or a text (the floors, versions) as JSON."""
    rows = [
        {
            plain(key): _cell(value)
            for key, value in {**row, **machine_of(row), "machine": setup.label}.items()
        }
        for setup in setups
        for row in setup.rows
    ]
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in rows for key in row)))
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, (dict, list)):
        return json.dumps(value)
    return plain(value) if isinstance(value, str) else value


def tables(setups: Sequence[Setup], title: str, notes: Sequence[str] = ()) -> str:
    """All rows as Markdown: a section per suite and setup, a table per op or model."""
    parts = [f"# {escape(plain(title))}", READING, *notes, _setups_table(setups)]
    for suite in dict.fromkeys(plain(row["suite"]) for s in setups for row in s.rows):
        for setup in setups:
            rows = [row for row in setup.rows if plain(row["suite"]) == suite]
            if rows:
                on = f" on {setup.label}: {escape(setup.hardware)}, commit {escape(setup.commit)}"
                parts += [f"## {escape(suite)}{on}", *_suite(rows)]
    return "\n\n".join(parts) + "\n"


def _setups_table(setups: Sequence[Setup]) -> str:
    head = ("", "machine", "processor", "threads", "commit", "versions", "measured", "rows")
    body = [
        (
            setup.label,
            setup.hardware,
            plain(setup.machine.get("cpu")),
            plain(setup.machine.get("threads")),
            setup.commit,
            setup.versions,
            setup.measured,
            str(len(setup.rows)),
        )
        for setup in setups
    ]
    return _markdown(head, [[escape(cell) for cell in line] for line in body])


def _suite(rows: Sequence[Row]) -> Iterable[str]:
    for name in dict.fromkeys(plain(row["name"]) for row in rows):
        of_name = [row for row in rows if plain(row["name"]) == name]
        yield f"### {escape(name)}"
        measured = by_job(row for row in of_name if timed(row))
        if measured:
            yield _figures(measured)
            yield from _floors(measured)
            yield from _errors(measured)
        yield from _not_timed(of_name)


def by_job(rows: Iterable[Row]) -> list[list[Row]]:
    """Rows of the same job together, in order of first appearance; the fastest engine first."""
    jobs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        jobs.setdefault(name_of(row)[:-1], []).append(row)
    return [sorted(job, key=lambda row: row["median_s"]) for job in jobs.values()]


def _figures(jobs: Sequence[Sequence[Row]]) -> str:
    columns = [CASE, DIRECTION, DTYPE, DEVICE, SHAPE, ENGINE, GRAPH, *FIGURES]
    columns = [c for c in columns if any(c.cell(row) for job in jobs for row in job)]
    lines = []
    for job in jobs:
        for place, row in enumerate(job):
            cells = [escape(column.cell(row)) for column in columns]
            at = columns.index(FIGURES[0])
            cells[at] = f"**{cells[at]}**" if place == 0 else cells[at]
            lines.append(cells)
    return _markdown([c.title for c in columns], lines, {c.title for c in columns if c.numeric})


def _floors(jobs: Sequence[Sequence[Row]]) -> Iterable[str]:
    """What the fusion models of ``python -m bench floors`` allow, where rows say it."""
    lines = []
    for job in jobs:
        text = floors_text(job[0])
        if text:
            what = " ".join(escape(c.cell(job[0])) for c in (CASE, DIRECTION, DTYPE, DEVICE))
            lines.append(f"- {what}: {escape(text)}")
    if lines:
        yield "Floors at this machine's ceilings, by how much is fused:\n\n" + "\n".join(lines)


def floors_text(row: Row) -> str:
    """The row's floors by fusion model; empty where it has none."""
    floors = row.get("floors")
    found = floors if isinstance(floors, dict) else {}
    pairs = ((plain(name), number(found, name)) for name in found)
    return ", ".join(f"{name} {duration(value)}" for name, value in pairs if value is not None)


def _errors(jobs: Sequence[Sequence[Row]]) -> Iterable[str]:
    """What the errors in the table are shares of."""
    engines: dict[str, dict[str, None]] = {}
    for row in (row for job in jobs for row in job):
        if number(row, "error") is not None and row.get("error_of"):
            engines.setdefault(plain(row["error_of"]), {})[ENGINE.cell(row)] = None
    if engines:
        texts = (f"{of} ({', '.join(names)})" for of, names in engines.items())
        yield f"Errors are relative to: {escape('; '.join(texts))}."


def _not_timed(rows: Sequence[Row]) -> Iterable[str]:
    """Why engines have no time: one line per reason, wrong ones first."""
    cases: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if not timed(row):
            reason = plain(row.get("reason")) or "no reason was given"
            key = (status_of(row), ENGINE.cell(row), reason)
            what = " ".join(c.cell(row) for c in (CASE, DIRECTION, DTYPE, DEVICE))
            cases.setdefault(key, []).append(what)
    if cases:
        order = sorted(cases, key=lambda key: (NOT_TIMED.index(key[0]), *key[1:]))
        lines = []
        for key in order:
            status, engine, reason = map(escape, key)
            lines.append(f"- **{status}** {engine}: {reason} ({escape(', '.join(cases[key]))})")
        yield "Not timed:\n\n" + "\n".join(lines)


def _markdown(
    head: Sequence[str], lines: Iterable[Sequence[str]], right: Iterable[str] = ()
) -> str:
    rules = ["--:" if title in set(right) else "---" for title in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rules, *lines))


def escape(text: str) -> str:
    """Text that Markdown shows as it is, in a cell too."""
    text = text.replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*\[\]|])", r"\\\1", text)
