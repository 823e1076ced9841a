"""``python -m bench kernels``: each op's benchmark cases, forward, on every backend that is here, in one table."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from bench import machine, runner
from effdet_kernels import testing, use_backend
from effdet_kernels.spec import Case, OpSpec, iter_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class WrongKernelError(RuntimeError):
    """A kernel that is outside of its error bound is not timed."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--smoke", action="store_true", help="smallest cases, one round: does it run?"
    )
    parser.add_argument("--out", type=Path, help="append the rows to this JSON-lines file")


def run(args: argparse.Namespace) -> None:
    rows = list(measure(args))
    print_table(rows)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with args.out.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)


def measure(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One row per op, case and backend.

    Raises:
        WrongKernelError: an output misses its error bound.
        ValueError: no case fits the arguments.
    """
    described = machine.describe()
    bandwidth = runner.copy_bandwidth(args.device, 1 << (20 if args.smoke else 28))
    dtype = DTYPES[args.dtype]
    found = [(s, c) for s in iter_specs() for c in _cases(s, args) if dtype in s.dtypes]
    if not found:
        raise ValueError(
            f"no benchmark case for --op {args.op} --case {args.case} --dtype {args.dtype}"
        )
    for spec, case in found:
        yield from _measure_case(spec, case, dtype, bandwidth, described, args)


def _cases(spec: OpSpec, args: argparse.Namespace) -> list[Case]:
    if args.op and spec.name not in args.op:
        return []
    if args.smoke:
        return list(spec.cases[:1])
    return [c for c in spec.cases if "bench" in c.tags and (not args.case or args.case in c.name)]


def _measure_case(spec, case, dtype, bandwidth, described, args) -> Iterator[dict[str, Any]]:
    inputs = case.inputs(dtype, args.device, spec.keep_wide)
    names = [
        name
        for name, reason in testing.backends(spec).items()
        if reason is None and (name == "reference" or (name == "cpu") == (args.device == "cpu"))
    ]

    def on(backend: str):
        def call() -> object:
            with torch.no_grad(), use_backend(backend):
                return spec.op(**inputs)

        return call

    calls = {name: on(name) for name in names}
    errors = {name: spec.error_ratio(inputs, call(), dtype) for name, call in calls.items()}
    for name, error in errors.items():
        if error > 1 and (name != "reference" or dtype == torch.float32):
            raise WrongKernelError(
                f"{spec.name}/{case.name} on {name}: error is {error:.3g} of its bound; not timed"
            )
    timings = runner.alternate(calls, *((1, 0.0) if args.smoke else (7, 0.2)))
    moved = spec.bytes(**inputs) if spec.bytes else None
    for name, timing in timings.items():
        yield {
            "op": spec.name,
            "case": case.name,
            "dtype": args.dtype,
            "device": args.device,
            "backend": name,
            **timing,
            "error_of_bound": errors[name],
            "speedup": timings["reference"]["median_s"] / timing["median_s"],
            "bytes": moved,
            "of_copy_bandwidth": moved / timing["median_s"] / bandwidth if moved else None,
            "copy_bandwidth": bandwidth,
            "machine": described,
        }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'op':<18}{'case':<16}{'backend':<11}{'median':>12}{'min':>12}{'×ref':>9}{'% copy':>8}{'err/bound':>11}"
    )
    for row in rows:
        share = row["of_copy_bandwidth"]
        print(
            f"{row['op']:<18}{row['case']:<16}{row['backend']:<11}"
            f"{row['median_s'] * 1e6:>10.1f}µs{row['min_s'] * 1e6:>10.1f}µs{row['speedup']:>9.2f}"
            f"{'' if share is None else f'{100 * share:.1f}':>8}{row['error_of_bound']:>11.2g}"
        )
