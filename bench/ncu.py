"""NVIDIA's ``ncu`` (Nsight Compute): hardware counters of what a program launches while its CUDA profiler is started.

``METRICS`` and ``STALLS`` say what is asked for. A launch is run once for each set of counters that the GPU can count
together (six on an H100 or H200 by CUPTI 13.0, not run there), its memory put back and the caches flushed before each;
clocks are left alone.
"""

from __future__ import annotations

import csv
import dataclasses
import math
import re
import shutil
import subprocess
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path

from bench.parts import DidNotRun
from bench.results import Row


@dataclasses.dataclass(frozen=True)
class Metric:
    """One of ncu's metrics and what it is in here: a "second", a "byte", a "fraction" or, without a unit, ""."""

    name: str
    unit: str = ""


_ACTIVE = ".avg.pct_of_peak_sustained_active"
_ELAPSED = ".avg.pct_of_peak_sustained_elapsed"
METRICS = {  # by the field of a row
    "median_s": Metric("gpu__time_duration.sum", "second"),
    "registers": Metric("launch__registers_per_thread"),
    "shared_bytes": Metric("launch__shared_mem_per_block", "byte"),
    "waves": Metric("launch__waves_per_multiprocessor"),
    "dram_read": Metric("dram__bytes_read.sum", "byte"),
    "dram_written": Metric("dram__bytes_write.sum", "byte"),
    "dram": Metric(f"dram__throughput{_ELAPSED}", "fraction"),
    "l2": Metric(f"lts__throughput{_ELAPSED}", "fraction"),
    "l2_hits": Metric("lts__t_sector_hit_rate.pct", "fraction"),
    "sm_active": Metric(f"sm__cycles_active{_ELAPSED}", "fraction"),  # with a warp or more
    "issue": Metric(f"sm__inst_issued{_ACTIVE}", "fraction"),  # of the slots of those cycles
    "occupancy": Metric(f"sm__warps_active{_ACTIVE}", "fraction"),
    "tensor": Metric(f"sm__pipe_tensor_cycles_active{_ACTIVE}", "fraction"),
}
STALLS = {  # why a warp waits: how many warps do, on average, where one issues
    reason: Metric(f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio")
    for reason in (
        "barrier",
        "branch_resolving",
        "dispatch_stall",
        "drain",
        "gmma",
        "imc_miss",
        "lg_throttle",
        "long_scoreboard",
        "math_pipe_throttle",
        "membar",
        "mio_throttle",
        "misc",
        "no_instruction",
        "not_selected",
        "short_scoreboard",
        "sleeping",
        "tex_throttle",
        "wait",
    )
}
NAMES = tuple(metric.name for metric in (*METRICS.values(), *STALLS.values()))
_TOP_STALLS = 3  # that a row has

_UNITS = {  # as ncu prints them, of several releases: the unit in here, and how much of it
    **dict.fromkeys(("ns", "nsecond"), ("second", 1e-9)),
    **dict.fromkeys(("us", "usecond"), ("second", 1e-6)),
    **dict.fromkeys(("ms", "msecond"), ("second", 1e-3)),
    **dict.fromkeys(("s", "second"), ("second", 1.0)),
    "byte": ("byte", 1.0),
    "Kbyte": ("byte", 1e3),
    "Mbyte": ("byte", 1e6),
    "Gbyte": ("byte", 1e9),
    "%": ("fraction", 1e-2),
}
_ERROR, _UNKNOWN = "==ERROR==", "Failed to find metric"
_OF_PROGRAM = "The application returned an error"


def tool() -> str:
    """
    Raises:
        DidNotRun: there is no ncu on PATH.
    """
    found = shutil.which("ncu")
    if found is None:
        raise DidNotRun("ncu (NVIDIA Nsight Compute) is not on PATH")
    return found


def command(log: Path, names: Collection[str], program: Sequence[str]) -> list[str]:
    """The command line by which ncu writes these metrics of a program's launches to ``log``."""
    options = {
        "--target-processes": "application-only",  # not the compilers that it starts
        "--profile-from-start": "off",
        "--clock-control": "none",
        "--cache-control": "all",
        "--page": "raw",
        "--print-units": "base",
        "--log-file": str(log),
        "--metrics": ",".join(names),
    }
    return [tool(), "--csv", *(word for pair in options.items() for word in pair), *program]


def launches(program: Sequence[str], unknown: set[str]) -> list[Row]:
    """What ncu says of each launch, in order. Metrics in ``unknown`` are not asked for; those it lacks are added.

    Raises:
        DidNotRun: there is no ncu, or it cannot read counters here.
        RuntimeError: the program failed, or ncu did on the way.
    """
    while True:
        names = [name for name in NAMES if name not in unknown]
        with tempfile.TemporaryDirectory() as folder:
            log = Path(folder) / "ncu.csv"
            done = subprocess.run(
                command(log, names, program),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
        errors = _errors(text) + _errors(done.stdout)
        refused = {name for error in errors if _UNKNOWN in error for name in _named(error, names)}
        if not refused:
            break
        unknown |= refused
    found = list(parsed(text))
    of_ncu = [error for error in errors if not error.startswith(_OF_PROGRAM)]
    if of_ncu and not found:
        raise DidNotRun(f"ncu: {of_ncu[0]}")
    if errors or done.returncode:
        said = done.stdout.strip().splitlines() or ["it printed nothing"]
        reason = of_ncu[0] if of_ncu else said[-1].strip()
        raise RuntimeError(f"under ncu, exit status {done.returncode}: {reason}")
    return found


def _errors(text: str) -> list[str]:
    lines = (line.strip() for line in text.splitlines())
    return [line.removeprefix(_ERROR).strip() for line in lines if line.startswith(_ERROR)]


def _named(error: str, names: Collection[str]) -> set[str]:
    """Those metrics that an error is about, which may give a name as a regular expression, or without its suffixes."""
    words = re.findall(r"\w+__\w+", error)
    return {name for name in names if name.partition(".")[0] in words}


def parsed(text: str) -> Iterator[Row]:
    """The launches in what ncu wrote: a table in CSV, the units in its second line, and lines that begin with "==".

    A value that is not there ("n/a") or has another unit than its metric is left out.

    Raises:
        RuntimeError: a launch has no time.
    """
    lines = [line for line in text.splitlines() if line.startswith('"')]
    header = next((i for i, line in enumerate(lines) if line.startswith('"ID",')), len(lines))
    units: Mapping[str, str] = {}
    for row in csv.DictReader(lines[header:]):
        if row["ID"] == "":
            units = row
        else:
            yield _launch(row, units)


def _launch(row: Mapping[str, str], units: Mapping[str, str]) -> Row:
    def values(metrics: Mapping[str, Metric]) -> dict[str, float]:
        read = {field: _value(row, units, metric) for field, metric in metrics.items()}
        return {field: value for field, value in read.items() if value is not None}

    found, stalls = values(METRICS), sorted(values(STALLS).items(), key=lambda stall: -stall[1])
    if "median_s" not in found:
        raise RuntimeError(f"ncu gave no time for {row['Kernel Name']}")
    return {
        "kernel": row["Kernel Name"],
        "grid": _three(row.get("Grid Size")),
        "block": _three(row.get("Block Size")),
        **found,
        "stalls": {reason: value for reason, value in stalls[:_TOP_STALLS] if value > 0},
    }


def _value(row: Mapping[str, str], units: Mapping[str, str], metric: Metric) -> float | None:
    try:
        number = float((row.get(metric.name) or "").replace(",", ""))
    except ValueError:
        return None
    per = (units.get(metric.name) or "").partition("/")[0]  # "byte/block"
    unit, factor = _UNITS.get(per, ("", 1.0))
    if unit != metric.unit or not math.isfinite(number):
        return None
    return number * factor


def _three(text: str | None) -> list[int]:
    """[x, y, z] of "(x, y, z)"."""
    return [int(number) for number in re.findall(r"\d+", text or "")]
