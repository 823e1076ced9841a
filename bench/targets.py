"""``python -m bench targets``: the goals on an H200 beside what was measured.

A goal is for one or more cases of one job list. Of each case the latest run counts in which a kernel of ours was timed,
the fastest of them if there are several; ratios are of engines of that run. With several cases the measured figure is
their geometric mean, and the worst of them decides; a goal that no case misses is "incomplete" until all are measured.
Rows of another GPU are shown and decide nothing. A setup, that is one machine, commit and set of versions, has a table
of its own: the latest of an H200 if there is one, else the latest of any GPU; ``--all``: all of them. ``--unmeasured``
lists the cases that none of these has, and how to measure them.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from bench.goals import GOALS, Goal, Run
from bench.report import escape
from bench.results import EVERY_ENGINE, HARDWARE, SOFTWARE, WRONG, Row, load
from bench.setups import Setup, identity, plain, split, status_of, timed, usable

NOT_MEASURED, MISSED, MET, STRETCH = "not measured", "missed", "met", "stretch"
INCOMPLETE = "incomplete"  # no case misses the goal, and some were not measured
_H200 = re.compile(r"\bH200\b")  # a GH200 is none


@dataclasses.dataclass(frozen=True)
class Found:
    """What was measured of one case."""

    case: str
    engine: str
    value: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("paths", type=Path, nargs="+", metavar="PATH", help="*.jsonl, or a folder")
    parser.add_argument("--all", action="store_true", help="every setup, not the latest alone")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--unmeasured", action="store_true", help="only what no row has, and how to measure it"
    )
    form.add_argument("--markdown", action="store_true", help="tables in Markdown")


def run(args: argparse.Namespace) -> int:
    """Prints a table per setup.

    Raises:
        ValueError: there is no row at a path.
    """
    rows, _ = usable(load(*args.paths))
    if not rows:
        raise ValueError(f"no rows of results in {', '.join(map(str, args.paths))}")
    rows = [row for row in rows if row["device"] == "cuda"]
    setups = _chosen(split(rows), args.all)
    per_setup = [(setup, _rows_of(setup, rows)) for setup in setups]
    if args.unmeasured:
        for line in _unmeasured([own for _, own in per_setup]):
            print(line)
        return 0
    for setup, own in per_setup:
        print(*_table(setup, own, args.markdown), "", sep="\n")
    if not setups:
        print("No row is of a GPU.")
    return 0


def _chosen(setups: Sequence[Setup], every: bool) -> Sequence[Setup]:
    """All of them, or the one that counts."""

    def rank(setup: Setup) -> tuple[bool, str]:
        return is_h200(setup), max(plain(row.get("time")) for row in setup.rows)

    return setups if every else sorted(setups, key=rank)[-1:]


def is_h200(setup: Setup) -> bool:
    """Whether its GPU is the one that the goals are for."""
    return bool(_H200.search(plain(setup.machine.get("gpu"))))


def _rows_of(setup: Setup, rows: Sequence[Row]) -> list[Row]:
    """All rows of a setup, not the latest of each alone: a ratio may be of an earlier run."""
    fields = HARDWARE + SOFTWARE
    own = identity({"machine": setup.machine}, fields)
    return [row for row in rows if identity(row, fields) == own]


def measured(goal: Goal, rows: Sequence[Row]) -> list[Found]:
    """What the rows of one setup say of the goal's cases."""
    found = []
    for case in goal.cases:
        of_case = [row for row in rows if goal.selects(row) and row["case"] == case]
        best = _latest(goal, case, _runs(of_case))
        if best is not None:
            found.append(best)
            if goal.first:
                break
    return found


def _runs(rows: Sequence[Row]) -> Iterator[Run]:
    """The rows of one job by when they were written, the latest first."""
    for time in sorted({plain(row.get("time")) for row in rows}, reverse=True):
        yield {plain(row["engine"]): row for row in rows if plain(row.get("time")) == time}


def _latest(goal: Goal, case: str, runs: Iterable[Run]) -> Found | None:
    """Of the latest run with a figure the best engine; none where a later run was wrong."""
    for run in runs:
        own = [run[engine] for engine in goal.engines if engine in run]
        values = [(value, row) for row in own if (value := goal.value(row, run)) is not None]
        if values:
            value, row = min(values, key=lambda pair: pair[1]["median_s"])
            return Found(case, plain(row["engine"]), value)
        if any(status_of(row) == WRONG for row in own):
            break
    return None


def verdict(goal: Goal, found: Sequence[Found]) -> str:
    """By the worst case."""
    if not found:
        return NOT_MEASURED
    worst = _worst(goal, found).value
    if not goal.reaches(worst, goal.goal):
        return MISSED
    if len(found) < _wanted(goal):
        return INCOMPLETE
    return STRETCH if goal.reaches(worst, goal.stretch) else MET


def _wanted(goal: Goal) -> int:
    """How many cases are to be measured."""
    return 1 if goal.first else len(goal.cases)


def _worst(goal: Goal, found: Sequence[Found]) -> Found:
    return (min if goal.measure.more else max)(found, key=lambda f: f.value)


def _why_not(goal: Goal, rows: Sequence[Row]) -> str:
    """What the latest row of ours says that has no time; empty if there is none."""
    engines = (*goal.engines, EVERY_ENGINE)
    own = [r for r in rows if goal.selects(r) and r["engine"] in engines and not timed(r)]
    if not own:
        return ""
    last = max(own, key=lambda row: plain(row.get("time")))
    return f"{last['engine']} {status_of(last)}: {plain(last.get('reason'))}"


def _figures(goal: Goal, found: Sequence[Found]) -> str:
    mean = math.exp(sum(math.log(f.value) for f in found) / len(found))
    worst = _worst(goal, found)
    text = goal.measure.text
    figures = [text(mean)] + ([f"worst {text(worst.value)}"] if len(found) > 1 else [])
    count = f"{len(found)} of {_wanted(goal)} cases" if _wanted(goal) > 1 else ""
    where = f"({worst.case}, {worst.engine})"
    return ", ".join(filter(None, (f"{', '.join(figures)} {where}", count)))


def _table(setup: Setup, rows: Sequence[Row], markdown: bool) -> Iterator[str]:
    other = "" if is_h200(setup) else "; the goals are for an H200, so no verdict"
    heading = f"{setup.hardware}, commit {setup.commit}, {setup.versions}, {setup.measured}{other}"
    lines = [("goal", "wanted", "stretch", "measured", "verdict")]
    for goal in GOALS:
        found, text = measured(goal, rows), goal.measure.text
        stretch = "" if goal.stretch is None else text(goal.stretch)
        said = verdict(goal, found) if is_h200(setup) or not found else ""
        figures = _figures(goal, found) if found else _why_not(goal, rows)
        lines.append((goal.what, text(goal.goal), stretch, figures, said))
    if markdown:
        head, *body = (f"| {' | '.join(map(escape, line))} |" for line in lines)
        yield from (escape(heading), "", head, "|---|--:|--:|---|---|", *body)
        return
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    yield heading
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _unmeasured(setups: Sequence[Sequence[Row]]) -> Iterator[str]:
    """A line for each case, or goal of which one case counts, that no setup's rows have."""
    for goal in GOALS:
        found = {f.case for rows in setups for f in measured(goal, rows)}
        left = [case for case in goal.cases if case not in found]
        groups = ([left] if not found else []) if goal.first else [[case] for case in left]
        for cases in groups:
            what = goal.what + (f" ({cases[0]})" if len(goal.cases) > len(cases) else "")
            yield f"{what}: python -m bench {shlex.join(command(goal, cases))}"


def command(goal: Goal, cases: Sequence[str]) -> list[str]:
    """The words after ``python -m bench`` that measure these cases of the goal."""
    words = [goal.suite, "--device", "cuda", "--dtype", goal.dtype]
    if goal.suite == "kernels":
        words += ["--op", goal.name, "--case", *cases, "--direction", goal.direction]
    else:
        batches = [match[1] for case in cases if (match := re.search(r" b(\d+)\b", case))]
        words += ["--model", goal.name, *(w for batch in batches for w in ("--batch", batch))]
        words += ["--direction", goal.direction] if goal.suite == "detect" else []
    return [*words, *goal.measure.options.split()]
