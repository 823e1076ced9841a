"""Rows of several machines, commits and runs, told apart: one ``Setup`` each, with the latest row of everything."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from bench.results import ABSENT, HARDWARE, KEY, SKIPPED, SOFTWARE, TIMED, WRONG, Row

NOT_TIMED = (WRONG, SKIPPED, ABSENT)


@dataclasses.dataclass(frozen=True)
class Setup:
    """What one machine measured at one commit with one set of versions."""

    label: str  # A, B, …
    machine: dict[str, Any]  # as of its last row
    rows: list[Row]

    @property
    def hardware(self) -> str:
        """The GPU's name, or the processor's and the number of threads."""
        if self.machine.get("gpu"):
            return plain(self.machine["gpu"])
        cpu = plain(self.machine.get("cpu")) or "unknown machine"
        threads = self.machine.get("threads")
        return cpu if threads is None else f"{cpu}, {plain(threads)} threads"

    @property
    def versions(self) -> str:
        """Versions of what was measured with, in one line."""
        names = [name for name in SOFTWARE[1:] if self.machine.get(name)]
        return ", ".join(f"{name} {plain(self.machine[name])}" for name in names)

    @property
    def commit(self) -> str:
        return plain(self.machine.get("commit")) or "unknown"

    @property
    def measured(self) -> str:
        """The first and the last day of its rows."""
        days = sorted({plain(row["time"])[:10] for row in self.rows if row.get("time")})
        return " to ".join(dict.fromkeys((days[0], days[-1]))) if days else "unknown"


def split(rows: Iterable[Row]) -> list[Setup]:
    """Rows by machine, commit and versions; of rows with the same key and engine in one setup the latest stays."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(identity(row, HARDWARE + SOFTWARE), []).append(row)
    kept = [latest(group) for group in found.values()]
    return [
        Setup(_label(i), machine_of(max(group, key=_time)), group) for i, group in enumerate(kept)
    ]


def usable(rows: Iterable[Any]) -> tuple[list[Row], int]:
    """The rows that name what they measured, and how many others there were (of older formats, torn, not rows)."""
    every = list(rows)
    good = [r for r in every if isinstance(r, dict) and all(r.get(f) for f in (*KEY, "engine"))]
    return good, len(every) - len(good)


def latest(rows: Iterable[Row]) -> list[Row]:
    """One row per key and engine, the latest by its time; without times the last one.

    Where something was timed, that it later was absent or skipped says nothing.
    """
    kept: dict[tuple[str, ...], Row] = {}
    for row in sorted(rows, key=_time):
        known = kept.get(name := name_of(row))
        if known is None or not timed(known) or status_of(row) in (TIMED, WRONG):
            kept[name] = row
    return list(kept.values())


def name_of(row: Row) -> tuple[str, ...]:
    """What a row is about: its job's key and the engine."""
    return tuple(plain(row.get(field)) for field in (*KEY, "engine"))


def identity(row: Row, fields: Iterable[str]) -> tuple[str, ...]:
    """Those fields of the row's machine."""
    return tuple(plain(machine_of(row).get(field)) for field in fields)


def machine_of(row: Row) -> dict[str, Any]:
    machine = row.get("machine")
    return machine if isinstance(machine, dict) else {}


def timed(row: Row) -> bool:
    """Whether the row holds a usable time."""
    median = number(row, "median_s")
    return row.get("status") == TIMED and median is not None and median > 0


def status_of(row: Row) -> str:
    """timed, wrong, absent or skipped; a row that claims a time and has none counts as skipped."""
    status = plain(row.get("status"))
    if timed(row):
        return TIMED
    return status if status in NOT_TIMED else SKIPPED


def number(row: Row, field: str) -> float | None:
    """A field as a finite number; None where it is missing or anything else."""
    value = row.get(field)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def plain(value: Any) -> str:
    """Text in one line that every encoding of a file can hold; empty for None."""
    if value is None:
        return ""
    text = str(value).encode("utf-8", "replace").decode()
    return re.sub(r"[\x00-\x20\x7f-\x9f\u2028\u2029\ufffe\uffff]+", " ", text).strip()


def _time(row: Row) -> str:
    return plain(row.get("time"))


def _label(index: int) -> str:
    """A to Z, then AA, AB, …"""
    head, tail = divmod(index, 26)
    return (_label(head - 1) if head else "") + chr(ord("A") + tail)
