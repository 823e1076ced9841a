"""``python -m bench compare``: two sets of results, row by row; what became slower, faster, or wrong.

Rows with the same key and engine are paired; where a set has several, its latest counts, whatever machine or commit it
is of. A change counts when it is beyond the threshold and beyond the noise, which is the sum of both rows' spreads.
Exit status 1: something became slower, or was timed in A and is wrong, absent or skipped in B.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from bench.results import EVERY_ENGINE, HARDWARE, KEY, TIMED, WRONG, Row, load
from bench.setups import (
    identity,
    latest,
    name_of,
    number,
    plain,
    split,
    status_of,
    timed,
    usable,
)
from bench.table import duration

Name = tuple[str, ...]  # a job's key and the engine
SLOWER, FASTER, SAME = "SLOWER", "faster", ""
HEAD = (*KEY, "engine")


@dataclasses.dataclass(frozen=True)
class Pair:
    """A row that is timed in both sets."""

    name: Name
    before: Row
    after: Row

    @property
    def ratio(self) -> float:
        """B's median over A's."""
        return self.after["median_s"] / self.before["median_s"]

    @property
    def noise(self) -> float:
        return sum(max(number(row, "spread") or 0.0, 0.0) for row in (self.before, self.after))

    def verdict(self, threshold: float) -> str:
        """SLOWER or faster by more than the threshold and the noise, or neither."""
        change = max(self.ratio, 1 / self.ratio) - 1
        if change <= max(threshold, self.noise):
            return SAME
        return SLOWER if self.ratio > 1 else FASTER


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All rows of both sets."""

    pairs: list[Pair]
    lost: dict[Name, str]  # timed in A; what B says instead
    wrong: dict[Name, str]  # not timed in A; wrong in B
    new: list[Name]
    vanished: list[Name]

    def regressions(self, threshold: float) -> list[Pair]:
        return [pair for pair in self.pairs if pair.verdict(threshold) == SLOWER]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="before: *.jsonl, or a folder")
    parser.add_argument("b", type=Path, metavar="B", help="after")
    parser.add_argument(
        "--threshold", type=float, default=0.05, help="smaller changes do not count (default 0.05)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the comparison; 1 if something became worse.

    Raises:
        ValueError: there is no row at a path, no row is in both, or the threshold is negative.
    """
    if not args.threshold >= 0:
        raise ValueError(f"--threshold: got {args.threshold}, takes at least 0")
    before, after = _rows(args.a), _rows(args.b)
    both = {name_of(row) for row in before} & {name_of(row) for row in after}
    if not both:
        raise ValueError(f"no row of {args.b} has the key and engine of a row of {args.a}")
    paired = ([row for row in rows if name_of(row) in both] for rows in (before, after))
    for warning in warnings(*paired):
        print(f"warning: {warning}")
    found = compare(latest(before), latest(after))
    _print(found, args.threshold)
    return 1 if found.lost or found.regressions(args.threshold) else 0


def _rows(path: Path) -> list[Row]:
    rows, left_out = usable(load(path))
    if not rows:
        raise ValueError(f"no rows of results in {path}")
    if left_out:
        print(f"{path}: {left_out} rows left out that do not say what they measured")
    return rows


def warnings(before: Sequence[Row], after: Sequence[Row]) -> list[str]:
    """What makes the two sets hard to compare: several machines, other machines, other versions."""
    found = []
    for label, rows in (("A", before), ("B", after)):
        machines = {identity(row, HARDWARE) for row in rows}
        if len(machines) > 1:
            found.append(f"{label} has rows of {len(machines)} machines or thread counts")
    sides = [{setup.hardware for setup in split(rows)} for rows in (before, after)]
    if {identity(r, HARDWARE) for r in before} != {identity(r, HARDWARE) for r in after}:
        a, b = (" and ".join(sorted(side)) for side in sides)
        found.append(f"the machines differ: A is of {a}, B of {b}")
    for field in ("torch", "triton", "cuda"):
        versions = [
            ", ".join(sorted({_of_machine(row, field) for row in rows})) for rows in (before, after)
        ]
        if versions[0] != versions[1]:
            found.append(f"{field} differs: A {versions[0]}, B {versions[1]}")
    return found


def _of_machine(row: Row, field: str) -> str:
    return identity(row, (field,))[0] or "none"


def compare(before: Sequence[Row], after: Sequence[Row]) -> Comparison:
    """Pairs the rows; each set holds a key and engine once."""
    old, new = ({name_of(row): row for row in rows} for rows in (before, after))
    pairs, lost, wrong, vanished = [], {}, {}, []
    for name, row in old.items():
        # one row of B may stand for all engines of a job: skipped for want of memory
        counterpart = new.get(name) or new.get((*name[:-1], EVERY_ENGINE))
        if counterpart is None:
            vanished.append(name)
        elif timed(row) and timed(counterpart):
            pairs.append(Pair(name, row, counterpart))
        elif timed(row):
            lost[name] = _state(counterpart)
    for name, row in new.items():
        known = old.get(name)
        if status_of(row) == WRONG and (known is None or status_of(known) not in (TIMED, WRONG)):
            wrong[name] = _state(row)
    added = [name for name in new if name not in old]
    return Comparison(pairs, lost, wrong, added, vanished)


def _state(row: Row) -> str:
    return f"{status_of(row)}: {plain(row.get('reason')) or 'no reason was given'}"


def _print(found: Comparison, threshold: float) -> None:
    names = [pair.name for pair in found.pairs]
    widths = [max(map(len, cells)) + 2 for cells in zip(HEAD, *names, strict=True)]
    if names:
        print(f"{_aligned(HEAD, widths)}{'A':>11}{'B':>11}{'B / A':>8} {'noise':>7}")
    for pair in sorted(found.pairs, key=lambda pair: -pair.ratio):
        medians = f"{duration(pair.before['median_s']):>11}{duration(pair.after['median_s']):>11}"
        print(
            f"{_aligned(pair.name, widths)}{medians}{pair.ratio:>8.3f} {pair.noise:>7.1%}"
            f" {pair.verdict(threshold)}".rstrip()
        )
    for title, entries in (
        ("No longer timed", [f"{' '.join(n)}: {state}" for n, state in found.lost.items()]),
        ("Newly wrong", [f"{' '.join(n)}: {state}" for n, state in found.wrong.items()]),
        ("Only in B", [" ".join(name) for name in found.new]),
        ("Only in A", [" ".join(name) for name in found.vanished]),
    ):
        if entries:
            print(f"{title}:", *entries, sep="\n  ")
    verdicts = [pair.verdict(threshold) for pair in found.pairs]
    print(
        f"{len(found.pairs)} pairs: {verdicts.count(SLOWER)} slower, {verdicts.count(FASTER)} faster,"
        f" {verdicts.count(SAME)} within {threshold:.0%} or the noise; {len(found.lost)} no longer timed,"
        f" {len(found.wrong)} newly wrong, {len(found.new)} only in B, {len(found.vanished)} only in A"
    )


def _aligned(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "".join(f"{cell:<{width}}" for cell, width in zip(cells, widths, strict=True))
