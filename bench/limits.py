"""``python -m bench limits``: what a GPU can do at best, one thing at a time; to be measured first on every new GPU.

Each figure is a slope: a loop is run a few and many times, and the difference of the two times over the difference of
the counts is what one more takes. So launches, events and what surrounds a loop cancel. Both are CUDA graphs, timed
as in every suite (the L2 cache flushed before each, in turns, medians of best-of-five); ``median_s`` is the slope
between the medians, ``spread`` the sum of both distances between quartiles over the difference. Results are checked
before anything is timed. Rows have ``value`` and ``unit``. On a CPU only torch's engines run.

- ``graph node`` [s]: graphs of 1, 32, 128 and 512 launches that wait for each other, the slope by least squares; of
  one program, or of one for each multiprocessor. "triton": one warp a program adds 1 to a count. "triton early": the
  same with programmatic dependent launch (each launch lets the next begin at once, which waits before it reads).
  "torch": add_ of one element, or of 1024 for each multiprocessor.
- ``copy``, ``read`` [bytes/s]: bytes touched, read plus written. The case is the working set, of a copy source and
  target together; it is gone through once, and as often more as makes 4 GB (256 MB on a CPU), at least twice.
  "triton": one launch, whose programs take tiles in turns, pass after pass, 16 bytes a thread at a time, past L1.
  "torch": copy_, at most 256 times more, each a node of the graph, whose cost is in it. What fits in the L2 cache has
  its bandwidth; below some 16 MB several programs are at one tile at a time.
- ``ffma``, ``ex2``, ``tanh``, ``rcp``, ``swish`` (as kernels have it: ex2 and rcp), ``swish_tanh`` (0.5 x (1 + tanh(0.5
  x)) with tanh.approx), ``to_bf16`` (float32 to bfloat16, two an instruction) [1/s]: steps of a number that depend on
  each other, four numbers a thread, as many threads as the GPU holds; 1 and 257 trips of 64 ffma, 64 conversions, 16 of
  the others. ``per_clock``: per clock and multiprocessor, by the clock that the programs of one more launch counted
  (``clock_hz``: their cycles over their nanoseconds).
- ``hgmma``, ``hmma``, ``product`` [FLOP/s]: bf16. The first two: tl.dot of a tile in shared memory, added to registers,
  1 and 1025 times; of 128x128 by 128x256, which takes HGMMA on Hopper, and of 32x64 by 64x256, which takes HMMA, with
  the loads from shared memory that Triton has in that loop. ``product``: torch.mm, 1 and 9 times; on a CPU in float32.

``--compare FILE`` prints what rows of a file say of the constants in bench/predict.py.
"""

from __future__ import annotations

import argparse
import functools
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from bench import limits_loops, runner
from bench.limits_loops import Loop
from bench.predict import print_compared
from bench.results import SKIPPED, TIMED, WRONG, Job, Row, load

GROUPS = ("memory", "rates", "products", "graph")
_MEGABYTES = {"cuda": tuple(1 << i for i in range(12)), "cpu": tuple(1 << i for i in range(9))}
_SIDE = {"cuda": 8192, "cpu": 768}  # of torch's product
_EFFORT = runner.Effort(rounds=5, seconds=0.02, settle_s=0.0)  # on a GPU: there are a hundred loops


class _Compare(argparse.Action):
    """Prints and exits, as --version does."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        try:
            print_compared(load(values))
        except ValueError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        parser.exit()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", action="append", choices=GROUPS, help="default: all (repeatable)")
    parser.add_argument(
        "--compare",
        action=_Compare,
        type=Path,
        metavar="FILE",
        help="measure nothing: print what its rows say of the constants that predictions use",
    )


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """A job per size of memory, kind of instruction, product, and number of programs of a graph's nodes.

    Raises:
        ValueError: a dtype was asked for.
    """
    if args.dtype != ["fp32"]:
        raise ValueError(
            f"--dtype: got {', '.join(args.dtype)}; limits takes none: each loop has its own"
        )

    def job(name: str, case: str, dtype: str, loops: Callable[..., Any], *words: Any) -> Job:
        run = functools.partial(
            _shown, f"{name}, {case}", args, functools.partial(loops, args, *words)
        )
        return Job("limits", name, case, "loop", dtype, args.device, run)

    chosen = args.only or GROUPS
    if "memory" in chosen:
        for megabytes in _MEGABYTES[args.device][: 1 if args.smoke else None]:
            yield job("copy", f"{megabytes} MB", "int32", limits_loops.copies, megabytes << 20)
            yield job("read", f"{megabytes} MB", "int32", limits_loops.reads, megabytes << 20)
    if "rates" in chosen:
        for kind in limits_loops.KINDS:
            yield job(kind, "in registers", "fp32", limits_loops.rates, kind)
    if "products" in chosen:
        for tile in limits_loops.TILES:
            yield job(tile, "one tile a program", "bf16", limits_loops.products, tile)
        side = 64 if args.smoke else _SIDE[args.device]
        dtype = "bf16" if args.device == "cuda" else "fp32"
        yield job("product", f"{side}x{side}x{side}", dtype, limits_loops.torch_products, side)
    if "graph" in chosen:  # the last: a capture that breaks off may leave torch unusable
        for programs in sorted({1, limits_loops.multiprocessors(args.device)}):
            case = f"{programs} program{'s' if programs > 1 else ''}"
            yield job("graph node", case, "int32", limits_loops.chains, programs)


def _shown(label: str, args: argparse.Namespace, loops: Callable[..., Any]) -> Iterator[Row]:
    """Prints the figures, for which the table of all suites has no column."""
    for row in _measure(args, loops):
        if "value" in row:
            per_clock = row.get("per_clock")
            more = f", {per_clock:.4g} a clock and multiprocessor" if per_clock else ""
            print(f"{label}, {row['engine']}: {row['value']:.4g} {row['unit']}{more}", flush=True)
        yield row


def _measure(args: argparse.Namespace, loops: Callable[[], Iterable[Loop | Row]]) -> Iterator[Row]:
    subjects: dict[str, runner.Subject] = {}
    kept: list[Loop] = []
    with runner.on_stream(args.device):
        for loop in loops():
            if not isinstance(loop, Loop):
                yield loop
                continue
            try:
                found, reason = _checked(loop, args.device)
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # the others may be measured still
                found, reason = {}, f"{type(error).__name__}: {error}".splitlines()[0]
            if reason:
                yield {"engine": loop.engine, "status": WRONG, "reason": reason}
                continue
            kept.append(loop)
            subjects |= {f"{loop.engine} {n}": subject for n, subject in found.items()}
        on_gpu = args.device == "cuda" and not args.smoke
        effort = _EFFORT if on_gpu else runner.effort(args.device, args.smoke)
        timings = runner.alternate(subjects, effort) if subjects else {}
        for loop in kept:
            timing = slope({n: timings[f"{loop.engine} {n}"] for n in loop.calls})
            yield _row(loop, timing)


def _checked(loop: Loop, device: str) -> tuple[dict[int, runner.Subject], str]:
    """What to time, and what is wrong with its results."""
    subjects: dict[int, runner.Subject] = {}
    for n, call in loop.calls.items():
        subjects[n] = runner.Local(call, device, graph=True)
        loop.reset()
        subjects[n].time(1)
        if reason := loop.wrong(n):
            return subjects, f"{n} times: {reason}"
    return subjects, ""


def slope(points: Mapping[int, runner.Timing]) -> runner.Timing:
    """What one more takes, of times by how often something was done, by least squares."""
    counts = sorted(points)
    ordered = [points[n] for n in counts]
    median, least = (
        statistics.linear_regression(counts, times).slope
        for times in ([t.median_s for t in ordered], [t.min_s for t in ordered])
    )
    first, last = ordered[0], ordered[-1]
    rise = abs(last.median_s - first.median_s) or 1.0
    spread = (first.spread * first.median_s + last.spread * last.median_s) / rise
    return runner.Timing(median, least, spread, sum(t.calls for t in ordered))


def _row(loop: Loop, timing: runner.Timing) -> Row:
    row = {"engine": loop.engine, **timing.row()}
    if timing.median_s <= 0:
        return {**row, "status": SKIPPED, "reason": "many take no longer than few: noise"}
    return {**row, "status": TIMED, **loop.figures(timing.median_s)}
