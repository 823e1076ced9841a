"""Rows as a table in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from bench.results import TIMED, Row


def print_rows(rows: Sequence[Row]) -> None:
    """One line a row; slower than a peer, wrong or absent: all are shown."""
    print(
        f"{'name':<18} {'case':<20} {'':<10} {'dtype':<5} {'engine':<24} {'median':>10}{'spread':>8}"
        f"{'GB/s':>8}{'GFLOP/s':>9}{'roof':>7}{'x eager':>9}{'x comp.':>9}{'MB':>8}{'error':>9}"
    )
    for row in rows:
        head = (
            f"{row['name']:<18} {row['case']:<20} {row['direction']:<10} {row['dtype']:<5} "
            f"{row['engine']:<24} "
        )
        print(
            head
            + (_figures(row) if row["status"] == TIMED else f" {row['status']}: {row['reason']}")
        )


def _figures(row: Row) -> str:
    share, peak = row.get("of_roofline"), row.get("peak_bytes")
    return (
        f"{duration(row['median_s']):>10}{row['spread']:>7.0%} {_number(row.get('gb_s'), 7)}"
        f"{_number(row.get('gflop_s'), 9)}{'' if share is None else f'{share:.0%}':>7}"
        f"{_number(row.get('vs_eager'), 9)}{_number(row.get('vs_compile'), 9)}"
        f"{'' if peak is None else f'{peak / 1e6:.1f}':>8}{_number(row.get('error'), 9)}"
    )


def _number(value: float | None, width: int) -> str:
    return f"{'' if value is None else f'{value:.3g}':>{width}}"


def duration(seconds: float) -> str:
    """Seconds with a unit: µs, ms or s."""
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"
