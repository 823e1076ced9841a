"""Compiles Triton kernels without a GPU, as the library would launch them, and predicts how fast they can be.

Every launch of an op's real cases, or of a model's forward, is compiled for a chosen architecture. A row says what the
machine code takes (registers, shared memory, spills), what it uses (vector loads, matrix instructions), and how many
instructions a program issues: those outside of loops, and those of each loop times its trips. The prediction
(bench/predict.py) is a model, not a measurement; a call takes the sum of its launches.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from pathlib import Path

from bench import golden, launches, network
from bench.predict import BANDWIDTH, Prediction, predicted
from bench.sass import ARCHITECTURES, Code
from effdet_kernels import _triton
from effdet_kernels.spec import Case, OpSpec, iter_specs
from effdet_kernels.verify import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", help="only this op (may be repeated)")
    add("--case", action="append", help="only cases whose name begins so")
    add("--dtype", action="append", choices=DTYPES, help="default: bf16, or the op's first")
    add("--arch", action="append", type=int, choices=ARCHITECTURES, help="default: 90")
    add("--direction", choices=("forward", "backward"), help="default: both")
    add("--model", help="not ops: the forward of this model, as a GPU's plan would launch it")
    add("--size", type=int, help="of --model, the image side; default: the model's own")
    add("--batch", type=int, default=1, help="of --model (default 1)")
    add("--record", type=Path, help="write the table that the tests compare with, of all ops")
    add("--jobs", type=int, default=1, help="of --record, processes (default 1)")


def run(args: argparse.Namespace) -> int:
    """0, or 1 if something is wrong with the code of a recorded kernel.

    Raises:
        ValueError: kernels are interpreted, or no such model, size or batch.
    """
    if _triton.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: kernels are not compiled then")
    if args.record:
        wrong = golden.record(args.record, args.jobs)
        print(*wrong, sep="\n", end="\n" if wrong else "")
        return int(bool(wrong))
    architectures = args.arch or [90]
    if args.model:
        for label, arch in itertools.product(args.dtype or ["bf16"], architectures):
            network.report(args.model, args.size, args.batch, label, arch)
        return 0
    for spec in iter_specs():
        if args.op and spec.name not in args.op:
            continue
        labels = [label for label in args.dtype or DTYPES if DTYPES[label] in spec.dtypes]
        labels = labels if args.dtype else [launches.own_dtype(spec)]
        wanted = [d for d in launches.directions(spec) if args.direction in (None, d)]
        cases = launches.real_cases(spec, args.case)
        for choice in itertools.product(wanted, cases, labels, architectures):
            _report(spec, *choice)
    return 0


def _report(spec: OpSpec, direction: str, case: Case, label: str, arch: int) -> None:
    """Prints a line per launch, and what it adds up to."""
    made = launches.measured(spec, case, label, arch, direction)
    predictions = [predicted(*pair) for pair in made]
    total = sum(p.total for p in predictions)
    count = spec.backward_bytes if direction == "backward" else spec.bytes
    share = ""
    if count is not None and total:
        compulsory = count(**launches.inputs(spec, case, DTYPES[label])) / BANDWIDTH
        share = f", {compulsory / total:.0%} of the copy bandwidth on compulsory bytes"
    print(f"{spec.name} {case.name} {label} {direction} sm_{arch}: {total * 1e6:.1f} us{share}")
    for (launch, code), prediction in zip(made, predictions, strict=True):
        print(f"    {_described(launch, code, prediction)}")


def _described(launch: _triton.Launch, code: Code, p: Prediction) -> str:
    return (
        f"{launch.kernel.__name__:<34}{launch.programs:>8} x {code.warps} warps,"
        f" {code.registers} registers, {code.shared / 1024:.0f} KB, local {code.local},"
        f" loads {code.vector_loads} vector {code.scalar_loads} scalar {code.matrix};"
        f" instructions {code.outside} + {_loops(code.loops, launch.trips)};"
        f" memory {p.memory * 1e6:.1f} us, issue {p.issue * 1e6:.1f},"
        f" MUFU {p.special * 1e6:.1f}, matrix {p.matrix * 1e6:.1f};"
        f" one program {p.program * 1e6:.1f}"
    )


def _loops(counts: Sequence[int], trips: Sequence[int]) -> str:
    pairs = itertools.zip_longest(counts, trips, fillvalue="?")
    return " + ".join(f"{count} x {times}" for count, times in pairs) or "0"
