"""``python -m bench counters``: hardware counters of each kernel of ops or of a model's forward, by NVIDIA's ncu.

Of an op (``--op``) one call of every real case is looked at, of a model (``--model``) one forward, module by module,
whose launches are those of its graph. A row is a launch: its time with cold caches, what it takes (registers, shared
memory), what it moves and how busy it keeps the GPU (``bench.ncu`` has the list), and why its warps wait.

``floor_s`` is the time that the compulsory bytes of its call, each input and output once, take at the copy bandwidth
that this run measures; the launches of one call share it by their time. ``above_s`` is the time above it: the launch
with most to gain is printed first. What torch launches between ops has no floor. Outputs are not compared here. Exit
status 2 if nothing ran: no GPU, no ncu, or no leave to read counters.
"""

from __future__ import annotations

import argparse
import collections
import functools
import json
import math
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from bench import counted, machine, ncu
from bench.kernels import DTYPES
from bench.model import default_size
from bench.parts import DidNotRun
from bench.results import KEY, TIMED, WRONG, Job, Log, Row
from effdet_kernels.spec import iter_specs

_RESULTS = Path(__file__).parent / "results"
_CASE = KEY[1:5]  # the name, the case, the direction and the dtype
_SHOWN = 40  # launches that are printed; the file has all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", help="calls of this op (may be repeated)")
    add("--case", action="append", metavar="PREFIX", help="only cases whose name begins so")
    add("--direction", choices=counted.DIRECTIONS, help="of ops; default: both")
    add("--model", action="append", help="a forward of this model (may be repeated)")
    add("--batch", action="append", type=int, help="of models; default: 1 (may be repeated)")
    add("--size", type=int, help="of models; image side, default: the model's own")
    add("--dtype", action="append", choices=DTYPES, help="default: bf16, or an op's first")
    add("--backend", choices=("cuda", "triton", "reference"), help="default: as dispatched")
    add("--out", type=Path, help="rows go to this file; default: results/<machine>/counters.jsonl")
    add("--child", type=Path, help=argparse.SUPPRESS)  # what runs under ncu: its calls go there


def run(args: argparse.Namespace) -> int:
    """
    Raises:
        ValueError: neither --op nor --model, no such op or model, or no case that fits.
        RuntimeError: a program failed under ncu.
    """
    if args.child:
        counted.run(args, "cuda")
        return 0
    programs = [_program(args, *subject) for subject in _subjects(args)]
    try:
        ncu.tool()
        if not torch.cuda.is_available():
            raise DidNotRun("no CUDA GPU is visible to torch here")
        rows = _measured(args, programs)
    except DidNotRun as reason:
        print(reason)
        return 2
    print_rows(rows)
    return 1 if any(row["status"] == WRONG for row in rows) else 0


def _subjects(args: argparse.Namespace) -> list[tuple[str, str]]:
    """("--op", name) and ("--model", name); each runs under ncu by itself."""
    ops, models = args.op or [], args.model or []
    if not ops and not models:
        raise ValueError("--op, --model: got neither, takes one of them")
    known = [spec.name for spec in iter_specs()]
    if unknown := set(ops) - set(known):
        raise ValueError(f"--op: got {', '.join(sorted(unknown))}, takes {', '.join(known)}")
    for name in models:
        default_size(name)
    if min(args.size or 1, *args.batch or (1,)) < 1:
        raise ValueError(f"--size, --batch: got {args.size} and {args.batch}, take at least 1")
    if ops and not any(counted.cases(args)):
        raise ValueError(f"no case of {', '.join(ops)} fits --case, --dtype and --direction")
    return [*(("--op", name) for name in ops), *(("--model", name) for name in models)]


def _program(args: argparse.Namespace, option: str, name: str) -> tuple[str, list[str]]:
    """The name, and the command for it alone; the file for --child is to follow."""
    words = [option, name]
    for key in ("case", "direction", "batch", "size", "dtype", "backend"):
        value = getattr(args, key)
        for each in value if isinstance(value, list) else [value]:
            words += [] if each is None else [f"--{key}", str(each)]
    return name, [sys.executable, "-m", "bench", "counters", *words, "--child"]


def _measured(args: argparse.Namespace, programs: Sequence[tuple[str, list[str]]]) -> list[Row]:
    bandwidth = machine.bandwidth("cuda", 1)
    torch.cuda.empty_cache()  # of that memory: the programs have the same GPU
    out = args.out or _RESULTS / machine.slug("cuda") / "counters.jsonl"
    log, unknown = Log(out, machine.describe()), set[str]()
    jobs = []
    for name, program in programs:
        measure = functools.partial(_rows, program, unknown, bandwidth)
        # Which case they are of the rows say themselves.
        jobs.append(Job("counters", name, "every case", "any", "any", "cuda", measure))
    log.run(jobs)
    if unknown:
        print(f"left out, as ncu does not know them here: {', '.join(sorted(unknown))}")
    return log.rows


def _rows(program: Sequence[str], unknown: set[str], bandwidth: float) -> list[Row]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calls.jsonl"
        found = ncu.launches([*program, str(path)], unknown)
        calls = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return attributed(found, calls, bandwidth)


def attributed(found: Sequence[Row], calls: Sequence[Row], bandwidth: float) -> list[Row]:
    """A row per launch, and one per call that was not made.

    Raises:
        RuntimeError: launches and calls do not fit together.
    """
    of_calls: list[list[Row]] = []
    for launch in found:
        if counted.MARK in launch["kernel"]:
            of_calls.append([])
        elif of_calls:
            of_calls[-1].append(launch)
    made = [call for call in calls if "status" not in call]
    if len(of_calls) != len(made):
        raise RuntimeError(f"ncu saw {len(of_calls)} calls, the program made {len(made)}")
    rows = [{**call, "engine": "every launch"} for call in calls if "status" in call]
    numbers: collections.Counter[str] = collections.Counter()
    for number, (call, its) in enumerate(zip(made, of_calls, strict=True)):
        total = sum(launch["median_s"] for launch in its)
        for launch in its:
            numbers[_what(call)] += 1
            engine = f"launch {numbers[_what(call)]}"
            floor = _floor(launch["median_s"], call.get("bytes"), total, bandwidth)
            rows.append(
                {**call, "call": number, "engine": engine, "status": TIMED, **launch, **floor}
            )
    return rows


def _floor(seconds: float, nbytes: int | None, total: float, bandwidth: float) -> Row:
    """Of a launch, its part by time of its call's floor, where there is one; and the time above it."""
    if not nbytes or not total:
        return {"above_s": seconds}
    floor = nbytes / bandwidth * seconds / total
    return {"floor_s": floor, "above_s": seconds - floor}


# Table ---------------------------------------------------------------------------------------------


def print_rows(rows: Sequence[Row]) -> None:
    """The launches with most time above their floor first; then what was not made."""
    timed = sorted((r for r in rows if r["status"] == TIMED), key=lambda row: -row["above_s"])
    print(
        f"{'above µs':>9}{'time':>9}{'floor':>9}{'blocks':>8}{'waves':>7}{'threads':>8}{'regs':>5}{'KB':>5}"
        f"{'MB':>9}{'DRAM':>6}{'L2':>5}{'hits':>5}{'SMs':>5}{'issue':>6}{'occ.':>5}{'tensor':>7}"
        "  kernel: what its warps wait for"
    )
    for row in timed[:_SHOWN]:
        print(_line(row))
    times = ("above_s", "median_s", "floor_s")
    sums = [sum(row.get(field, 0.0) for row in timed) for field in times]
    print("".join(f"{_us(value):>9}" for value in sums) + f"  all {len(timed)} launches")
    for row in rows:
        if row["status"] != TIMED:
            print(f"{_what(row)}: {row['status']}: {row['reason']}")


def _line(row: Row) -> str:
    moved = [row[field] for field in ("dram_read", "dram_written") if field in row]
    stalls = ", ".join(f"{reason} {value:.1f}" for reason, value in row["stalls"].items())
    cells = (
        *(_cell(row, field, 9, _us) for field in ("above_s", "median_s", "floor_s")),
        f"{math.prod(row['grid']):>8}",
        _cell(row, "waves", 7, "{:.2f}".format),
        f"{math.prod(row['block']):>8}",
        _cell(row, "registers", 5, "{:.0f}".format),
        _cell(row, "shared_bytes", 5, lambda value: f"{value / 1024:.0f}"),
        f"{f'{sum(moved) / 1e6:.2f}' if moved else '':>9}",
        _cell(row, "dram", 6, "{:.0%}".format),
        *(_cell(row, field, 5, "{:.0%}".format) for field in ("l2", "l2_hits", "sm_active")),
        _cell(row, "issue", 6, "{:.0%}".format),
        _cell(row, "occupancy", 5, "{:.0%}".format),
        _cell(row, "tensor", 7, "{:.0%}".format),
        f"  {short(row['kernel'])} of {row['op']} ({_what(row)}): {stalls}",
    )
    return "".join(cells)


def _cell(row: Row, field: str, width: int, text: Callable[[float], str]) -> str:
    return f"{text(row[field]) if field in row else '':>{width}}"


def _us(seconds: float) -> str:
    return f"{seconds * 1e6:.1f}"


def _what(row: Row) -> str:
    return " ".join(str(row[field]) for field in _CASE)


def short(kernel: str) -> str:
    """A demangled name without namespaces, casts and parameters."""
    name = re.sub(r"\((?:unsigned |signed )?\w+\)(?=-?\d)", "", kernel.removeprefix("void "))
    name = re.sub(r"(?:\w+|\(anonymous namespace\)|<unnamed>)::", "", name)
    return name.partition("(")[0]
