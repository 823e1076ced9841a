"""How fast a launch can be, by what its tensors, its machine code and its grid say: a model, not a measurement.

A launch takes the longer of its memory time (its tensors once, at the copy bandwidth), its issue time (4 instructions
per clock and multiprocessor, one in eight of them an exponential or a reciprocal) and its matrix time; of the
instructions those outside of loops count once, those of loops as often as the launcher says. Beside it stands the time
of one program, all that counts where the GPU is mostly idle. It is fitted to the 104 launches of D0 at batch 1 on an
H200, commit fcb7f18 (results/nvidia_h200/profile_d0_batch1.json): of the machine code of triton 3.6 that ran there it
predicts 669 us, where 717 were measured, and 80 of the launches within a fifth of what they took. What ``python -m
bench limits`` measured can be put beside its constants (``compared``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from torch import Tensor

from bench.results import Row
from bench.sass import WARP, Code
from bench.setups import latest, number, timed, usable
from effdet_kernels import _triton

# The GPU that predictions are for, an H200: copy bandwidth (4.25e12) and bf16 product as measured there, commit fcb7f18
# (results/nvidia_h200/kernels.jsonl). The clock is what we assume under load; right after those short runs it was
# 1.965e9.
BANDWIDTH, MATRIX_FLOPS, CLOCK, MULTIPROCESSORS = 4.3e12, 788e12, 1.755e9, 132
ISSUED = 4  # warp instructions per clock and multiprocessor
SPECIAL = 0.5  # of these, MUFU
# Of MATRIX_FLOPS, what HMMA reaches on Hopper, whose own instruction is HGMMA (arXiv 2402.13499 and 2501.12084).
HMMA = 0.62
# A program alone on a multiprocessor: the launch, and each instruction of a warp; more than 4 warps hold each other up.
# Fitted, not measured one by one.
LAUNCH, _INSTRUCTION, _MORE_WARPS = 1.3e-6, 1.9e-9, 0.35


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one launch, on the GPU named above, in seconds."""

    memory: float
    issue: float
    special: float
    matrix: float
    program: float  # of one program, with its launch: the least that a launch takes

    @property
    def total(self) -> float:
        """Of all programs, on a GPU that is full of them."""
        return max(self.memory, self.issue, self.special, self.matrix)

    @property
    def alone(self) -> float:
        """Of the launch when nothing runs beside it: the longer of one program and all programs, and the launch."""
        return max(self.program, self.total + LAUNCH)


def predicted(launch: _triton.Launch, code: Code) -> Prediction:
    tensors = {id(t): t for t in _tensors(launch.arguments)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    warps, issued = launch.programs * code.warps, code.issued(launch.trips)
    issue = warps * issued / (ISSUED * CLOCK * MULTIPROCESSORS)
    special = warps * code.transcendental(launch.trips) / (SPECIAL * CLOCK * MULTIPROCESSORS)
    crowd = 1 + _MORE_WARPS * max(0, code.warps / 4 - 1)
    program = LAUNCH + issued * _INSTRUCTION * crowd
    rate = MATRIX_FLOPS * (HMMA if code.matrix == "HMMA" else 1)
    return Prediction(moved / BANDWIDTH, issue, special, launch.flops / rate, program)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


# Beside measurements -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Compared:
    """A constant of this file and what was measured of it."""

    constant: str
    by: str  # quantity, case and engine of the row
    unit: str
    assumed: float
    measured: float

    @property
    def ratio(self) -> float:
        return self.measured / self.assumed


_PER_CLOCK = "warp instructions a clock and multiprocessor"
# Constant, what it is here, its unit; of which quantity of `bench limits`, by which field, and what of that is one.
_MEASURED = (
    ("BANDWIDTH", BANDWIDTH, "bytes/s", "copy", "value", 1),
    ("MATRIX_FLOPS", MATRIX_FLOPS, "FLOP/s", "product", "value", 1),
    ("MATRIX_FLOPS", MATRIX_FLOPS, "FLOP/s", "hgmma", "value", 1),
    ("HMMA", HMMA, "of MATRIX_FLOPS", "hmma", "value", MATRIX_FLOPS),
    ("CLOCK", CLOCK, "Hz", "ffma", "clock_hz", 1),
    ("MULTIPROCESSORS", MULTIPROCESSORS, "", "ffma", "multiprocessors", 1),
    ("ISSUED", ISSUED, _PER_CLOCK, "ffma", "per_clock", WARP),
    ("SPECIAL", SPECIAL, _PER_CLOCK, "ex2", "per_clock", WARP),
    ("SPECIAL", SPECIAL, _PER_CLOCK, "rcp", "per_clock", WARP),
    ("SPECIAL", SPECIAL, _PER_CLOCK, "tanh", "per_clock", WARP),
    ("LAUNCH", LAUNCH, "s", "graph node", "value", 1),
)


def compared(rows: Iterable[Row]) -> list[Compared]:
    """What rows of `bench limits` on a GPU, the latest of each, say of the constants.

    Of copies those of the largest working set count, of graphs those of one program a node.
    """
    found = [
        row
        for row in latest(usable(rows)[0])
        if timed(row) and (row["suite"], row["device"]) == ("limits", "cuda")
    ]
    largest = max((number(row, "bytes") or 0 for row in found if row["name"] == "copy"), default=0)

    def counts(row: Row) -> bool:
        if row["name"] == "copy":
            return row.get("bytes") == largest
        return row["name"] != "graph node" or row["case"] == "1 program"

    return [
        Compared(constant, f"{row['name']} {row['case']}, {row['engine']}", unit, here, value / one)
        for constant, here, unit, quantity, field, one in _MEASURED
        for row in found
        if row["name"] == quantity and counts(row) and (value := number(row, field)) is not None
    ]


def print_compared(rows: Iterable[Row]) -> None:
    """A line for each of ``compared``.

    Raises:
        ValueError: the rows say nothing of any constant.
    """
    found = compared(rows)
    if not found:
        raise ValueError("no rows of `bench limits` that were timed on a GPU")
    print(f"{'constant':<16}{'assumed':>11}{'measured':>11}{'ratio':>7}  measured by")
    for each in found:
        print(
            f"{each.constant:<16}{each.assumed:>11.4g}{each.measured:>11.4g}{each.ratio:>7.2f}"
            f"  {each.by}{f' [{each.unit}]' if each.unit else ''}"
        )
