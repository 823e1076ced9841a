"""``python -m bench dispatch``: writes effdet_kernels/dispatch.json, the backends' order on a GPU, from measured rows.

The rows are those of ``bench kernels`` of one GPU; of several commits or sets of versions the latest counts. A case
says something if one job timed both "cuda" and "triton"; of several such jobs the latest counts, and none if a later
one found a backend wrong. Per op (a backward is one of its own) and dtype the order is chosen that takes the least sum
of log times: one backend first for all sizes, or one up to a number of elements of the call's first tensor and the
other beyond. A threshold must gain more than the noise over the best order without one, and what replaces the present
order must gain more over that. The rows that are written are for the GPU's architecture and the dtype, and go before
the others of the op.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels import DTYPES
from bench.results import HARDWARE, SOFTWARE, WRONG, Row, key_of, load
from bench.setups import Setup, identity, machine_of, number, plain, status_of, timed, usable
from bench.tune import LEAST_GAIN
from effdet_kernels import _cuda, _dispatch, _library

BACKENDS = ("cuda", "triton")
Order = tuple[tuple[int | None, str], ...]  # up to so many elements (None: the rest), this first
Table = dict[str, list[dict[str, Any]]]  # dispatch.json
_MEASURED = "measured on "


@dataclasses.dataclass(frozen=True)
class Case:
    """A call that both backends were timed on, in turns."""

    name: str
    elements: int  # of its first tensor
    seconds: Mapping[str, float]  # by backend
    spread: float  # of the rounds, the larger of the two


@dataclasses.dataclass(frozen=True)
class Decision:
    """What the cases say of an op in a dtype."""

    op: str  # as dispatch.json has it: "soft_nms", "soft_nms_backward"
    dtype: torch.dtype
    cases: Sequence[Case]
    present: Order
    proposed: Order


# Cases ---------------------------------------------------------------------------------------------


def selected(rows: Iterable[Row]) -> tuple[list[Row], int]:
    """The rows of kernels that can decide, and how many were left out: without ``elements``, the GPU's ``capability``
    or a time of writing, or of no op or dtype that is known here."""
    every = [
        row
        for row in rows
        if (row["suite"], row["device"]) == ("kernels", "cuda") and row["engine"] in BACKENDS
    ]
    good = [row for row in every if _is_complete(row)]
    return good, len(every) - len(good)


def _is_complete(row: Row) -> bool:
    elements = row.get("elements")
    return bool(
        isinstance(elements, int)
        and elements > 0
        and re.fullmatch(r"\d+\.\d", plain(machine_of(row).get("capability")))
        and row.get("time")
        and row["name"] in _library.OPS
        and row["dtype"] in DTYPES
    )


def latest_setup(rows: Sequence[Row]) -> Setup:
    """What was measured last, with all of its rows.

    Raises:
        ValueError: there is none, or rows are of several GPUs.
    """
    if not rows:
        raise ValueError("PATH: has no row of kernels on a GPU that tells elements and capability")
    gpus = sorted({plain(machine_of(row).get("gpu")) for row in rows})
    if len(gpus) > 1:
        raise ValueError(f"PATH: has rows of {', '.join(gpus)}; takes those of one GPU")
    fields = HARDWARE + SOFTWARE
    last = max(rows, key=_time)
    own = [row for row in rows if identity(row, fields) == identity(last, fields)]
    return Setup("", machine_of(last), own)


def cases(rows: Iterable[Row]) -> dict[tuple[str, str], list[Case]]:
    """By op and dtype (as rows have it), in the order of their names."""
    jobs: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        jobs.setdefault(key_of(row), []).append(row)
    found: dict[tuple[str, str], list[Case]] = {}
    for own in jobs.values():
        run, row = _latest_run(own), own[0]
        op = f"{row['name']}_backward" if row["direction"] == "backward" else row["name"]
        if run:
            seconds = {name: run[name]["median_s"] for name in BACKENDS}
            spread = max(number(run[name], "spread") or 0.0 for name in BACKENDS)
            case = Case(row["case"], run[BACKENDS[0]]["elements"], seconds, spread)
            found.setdefault((op, row["dtype"]), []).append(case)
    return dict(sorted(found.items()))


def _latest_run(rows: Iterable[Row]) -> Mapping[str, Row]:
    """By backend, the rows of one key that were written together, and have both times; empty if there are none."""
    runs: dict[tuple[str, str], dict[str, Row]] = {}
    for row in sorted(rows, key=_time, reverse=True):
        together = _time(row), json.dumps(row["machine"], sort_keys=True)
        runs.setdefault(together, {})[row["engine"]] = row
    for run in runs.values():
        if len(run) == len(BACKENDS) and all(map(timed, run.values())):
            return run
        if any(status_of(row) == WRONG for row in run.values()):
            break
    return {}


def _time(row: Row) -> str:
    return plain(row.get("time"))


# Choosing ------------------------------------------------------------------------------------------


def present(op: str, dtype: torch.dtype, architecture: int) -> Order:
    """The order that dispatch.json has."""
    usual = {"order": _dispatch._ORDER["cuda"]}
    ends = sorted({row["up_to"] for row in _dispatch._rows().get(op, ()) if "up_to" in row})
    found: list[tuple[int | None, str]] = []
    for end in (*ends, None):
        size = sys.maxsize if end is None else end
        row = _dispatch.table_row(op, dtype, size, architecture) or usual
        if found and found[-1][1] == row["order"][0]:
            found.pop()
        found.append((end, row["order"][0]))
    return tuple(found)


def first_backend(order: Order, elements: int) -> str:
    return next(name for up_to, name in order if up_to is None or elements <= up_to)


def proposed(measured: Sequence[Case], now: Order) -> Order:
    """The order from now on: ``now``, if no other is faster by more than the noise."""
    noise = max(LEAST_GAIN, statistics.median(case.spread for case in measured))
    cost = functools.partial(_cost, measured)
    whole = min((((None, name),) for name in BACKENDS), key=cost)
    parted = min(_parted(measured), key=cost, default=whole)
    best = parted if gain(measured, parted, whole) > noise else whole
    return best if gain(measured, best, now) > noise else now


def _parted(measured: Sequence[Case]) -> Iterator[Order]:
    sizes = sorted({case.elements for case in measured})
    for below, above in itertools.pairwise(sizes):
        for first, beyond in itertools.permutations(BACKENDS):
            yield (math.isqrt(below * above), first), (None, beyond)


def gain(measured: Sequence[Case], order: Order, other: Order) -> float:
    """How much less time ``order`` takes than ``other``, as a share of that: 1 - the geometric mean of the ratios."""
    return 1 - math.exp((_cost(measured, order) - _cost(measured, other)) / len(measured))


def _cost(measured: Sequence[Case], order: Order) -> float:
    return sum(math.log(case.seconds[first_backend(order, case.elements)]) for case in measured)


def decisions(setup: Setup, architecture: int) -> list[Decision]:
    found = []
    for (op, label), measured in cases(setup.rows).items():
        now = present(op, DTYPES[label], architecture)
        found.append(Decision(op, DTYPES[label], measured, now, proposed(measured, now)))
    return found


# Writing -------------------------------------------------------------------------------------------


def text(table: Table) -> str:
    """The table as dispatch.json has it: a line per row."""
    ops = (
        f' "{op}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n ]"
        for op, rows in sorted(table.items())
    )
    return "{\n" + ",\n".join(ops) + "\n}\n"


def apply(found: Iterable[Decision], setup: Setup, architecture: int) -> bool:
    """Writes decisions into dispatch.json, all or nothing; whether it changed."""
    path = _dispatch._TABLE
    before = path.read_text()
    table: Table = json.loads(before)
    new: Table = {}
    for decision in found:
        new.setdefault(decision.op, []).extend(_rows(decision, setup, architecture))
    for op, rows in new.items():
        replaced = [_scope(row) for row in rows]
        kept = [row for row in table.get(op, ()) if _scope(row) not in replaced]
        table[op] = rows + kept
    written = path.with_suffix(".new")
    written.write_text(text(table))
    written.replace(path)
    _dispatch._rows.cache_clear()
    return text(table) != before


def _rows(decision: Decision, setup: Setup, architecture: int) -> Iterator[dict[str, Any]]:
    of, count = setup.machine, len(decision.cases)
    provenance = (
        f"{_MEASURED}{plain(of.get('gpu'))}, commit {setup.commit}, triton"
        f" {plain(of.get('triton'))}, {count} case{'s' if count > 1 else ''}"
    )
    for up_to, first in decision.proposed:
        yield {
            "order": sorted(BACKENDS, key=lambda name: name != first),
            "architectures": [architecture],
            "dtypes": [_cuda.dtype_name(decision.dtype)],
            **({} if up_to is None else {"up_to": up_to}),
            "provenance": provenance,
        }


def _scope(row: Mapping[str, Any]) -> tuple[bool, Any, Any]:
    """What a measured row is for; it is replaced by what is measured for the same."""
    return (
        row["provenance"].startswith(_MEASURED),
        row.get("architectures"),
        row.get("dtypes"),
    )


# Command -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("paths", type=Path, nargs="+", metavar="PATH", help="kernels.jsonl, or a folder")
    add("--write", action="store_true", help="put what is decided into dispatch.json")


def run(args: argparse.Namespace) -> int:
    """Prints what is decided, a line per op and dtype.

    Raises:
        ValueError: there are no rows, they are of several GPUs, or no case has both times.
    """
    rows, left_out = selected(usable(load(*args.paths))[0])
    if left_out:
        print(f"rows left out, of no known op or without elements or capability: {left_out}")
    setup = latest_setup(rows)
    major, minor = map(int, setup.machine["capability"].split("."))
    architecture = 10 * major + minor
    found = decisions(setup, architecture)
    if not found:
        raise ValueError(
            f"PATH: has no job of {setup.hardware} that timed {' and '.join(BACKENDS)}"
        )
    print(f"{setup.hardware}, commit {setup.commit}, {setup.versions}, {setup.measured}")
    for line in _table(found):
        print(line)
    if args.write:
        changed = apply(found, setup, architecture)
        print("dispatch.json: " + ("written" if changed else "is so already"))
    return 0


def _table(found: Iterable[Decision]) -> Iterator[str]:
    """Of the worst case: the time of the backend that the proposed order has first, over the other's."""
    lines = [("op", "dtype", "cases", "present", "proposed", "gain", "worst case")]
    for it in found:
        less = gain(it.cases, it.proposed, it.present)
        figures = f"{less:.1%}", _worst(it)
        orders = _text(it.present), _text(it.proposed)
        lines.append((it.op, _cuda.dtype_name(it.dtype), str(len(it.cases)), *orders, *figures))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        cells = (f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True))
        yield "  ".join(cells).rstrip()


def _text(order: Order) -> str:
    return ", ".join(name if up_to is None else f"{name} up to {up_to}" for up_to, name in order)


def _worst(decision: Decision) -> str:
    def ratio(case: Case) -> float:
        first = first_backend(decision.proposed, case.elements)
        (other,) = set(BACKENDS) - {first}
        return case.seconds[first] / case.seconds[other]

    worst = max(decision.cases, key=ratio)
    return f"{worst.name} x {ratio(worst):.2f}"
