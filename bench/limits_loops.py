"""The loops of ``python -m bench limits``, each with a check of what it computes and the figures of its row."""

from __future__ import annotations

import argparse
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bench import machine
from bench.results import ABSENT, Row
from bench.sass import WARP
from effdet_kernels import _triton

TILES = ("hgmma", "hmma")
KINDS = ("ffma", "ex2", "tanh", "rcp", "swish", "swish_tanh", "to_bf16")
_NODES = (1, 32, 128, 512)
_MOVED = {"cuda": 4 << 30, "cpu": 256 << 20}  # bytes, by the passes of the longer loop more
_MOST_NODES = 256  # of copies by torch, more
_TRIPS, _PRODUCTS, _TORCH_PRODUCTS = 256, 1024, 8  # of the longer loop, more
# Largest relative errors of a trip: twice what approximations that are off by as much as they may be, tanh.approx by
# 2^-11, add up to.
_ERRORS = {"tanh": 1e-2, "swish_tanh": 2e-3, "to_bf16": 0.0}
_ERROR = 2e-5
_PRODUCT_ERROR = 1e-2  # of the norm
# The interpreter computes a bfloat16 product wrongly.
_HALF = torch.float16 if _triton.INTERPRET else torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Loop:
    """One thing done over and over.

    Attributes:
        engine: who does it.
        calls: by how often it is done.
        reset: spoils the results.
        wrong: what is wrong with the results after the call of that number; empty where nothing is.
        figures: the row's, of the seconds that one more takes.
    """

    engine: str
    calls: Mapping[int, Callable[[], Any]]
    reset: Callable[[], Any]
    wrong: Callable[[int], str]
    figures: Callable[[float], Row]


def multiprocessors(device: str) -> int:
    """Of the GPU; of a CPU, whose Triton kernels are interpreted, 2."""
    return _properties().multi_processor_count if device == "cuda" else 2


def _properties() -> Any:
    return torch.cuda.get_device_properties(0)


def _filling(args: argparse.Namespace, kernels: ModuleType) -> int:
    """How many programs fill the GPU with threads; of a CPU 2."""
    if args.device != "cuda":
        return multiprocessors(args.device)
    threads = _properties().max_threads_per_multi_processor
    return multiprocessors("cuda") * (threads // (kernels.WARPS * WARP))


def _elsewhere(args: argparse.Namespace) -> str:
    """Why nothing of a GPU alone is measured here; empty on one, and where kernels are interpreted to see them run."""
    here = args.device == "cuda" or (_triton.INTERPRET and args.smoke)
    return "" if here else "measured on a CUDA device only"


def _absent(engine: str, reason: str) -> Row:
    return {"engine": engine, "status": ABSENT, "reason": reason}


def _by_triton(
    args: argparse.Namespace, make: Callable[[ModuleType], Loop], engine: str = "triton"
) -> Loop | Row:
    """The loop that ``make`` gives with the kernels, or why there is none."""
    if reason := _elsewhere(args) or _triton.REASON:
        return _absent(engine, reason)
    from bench import limits_kernels

    return make(limits_kernels)


# Memory ------------------------------------------------------------------------------------------


def _passes(args: argparse.Namespace, nbytes: int) -> tuple[int, int]:
    return 1, 1 + (2 if args.smoke else max(2, _MOVED[args.device] // nbytes))


def _bandwidth(nbytes: int) -> Callable[[float], Row]:
    def figures(seconds: float) -> Row:
        rate = nbytes / seconds
        return {"value": rate, "unit": "bytes/s", "bytes": nbytes, "gb_s": rate / 1e9}

    return figures


def _random(nbytes: int, device: str) -> Tensor:
    return torch.randint(-(2**31), 2**31 - 1, (nbytes // 4,), dtype=torch.int32, device=device)


def copies(args: argparse.Namespace, nbytes: int) -> Iterator[Loop | Row]:
    source = _random(nbytes // 2, args.device)
    target = torch.empty_like(source)

    def loop(engine: str, counts: Sequence[int], copy: Callable[[int], Any]) -> Loop:
        return Loop(
            engine,
            {n: functools.partial(copy, n) for n in counts},
            lambda: target.fill_(-1),
            lambda n: "" if torch.equal(source, target) else "the copy differs from its source",
            _bandwidth(nbytes),
        )

    def by_torch(times: int) -> None:
        for _ in range(times):
            target.copy_(source)

    def make(kernels: ModuleType) -> Loop:
        programs = _filling(args, kernels)
        return loop(
            "triton", _passes(args, nbytes), lambda n: kernels.copy(source, target, n, programs)
        )

    yield _by_triton(args, make)
    more = min(_MOST_NODES, max(2, _MOVED[args.device] // nbytes))
    yield loop("torch", (1, 1 + more), by_torch)


def reads(args: argparse.Namespace, nbytes: int) -> Iterator[Loop | Row]:
    def make(kernels: ModuleType) -> Loop:
        source = _random(nbytes, args.device)
        programs = _filling(args, kernels)
        sums = torch.empty(programs, dtype=torch.int32, device=args.device)
        total = int(source.sum())

        def wrong(n: int) -> str:
            off = (int(sums.sum()) - n * total) % 2**32
            return f"the sum is off by {off} modulo 2^32" if off else ""

        calls = {n: functools.partial(kernels.read, source, sums, n) for n in _passes(args, nbytes)}
        return Loop("triton", calls, lambda: sums.fill_(-1), wrong, _bandwidth(nbytes))

    yield _by_triton(args, make)


# Rates -------------------------------------------------------------------------------------------


def expected(kind: str, inputs: Tensor, times: int) -> Tensor:
    """What ``times`` steps make of the first of three inputs, in float64; of ``to_bf16`` exactly, in float32."""
    x, scale, shift = inputs if kind == "to_bf16" else inputs.double()
    for _ in range(times):
        if kind == "to_bf16":
            upper, lower = (t.bfloat16().view(torch.int16).int() for t in (x, scale))
            x, scale = (upper << 16 | lower & 0xFFFF).view(torch.float32), x
        elif kind == "ffma":
            x = x * scale + shift
        elif kind == "ex2":
            x = torch.exp2(-x)
        elif kind == "tanh":
            x = torch.tanh(x)
        elif kind == "rcp":
            x = 1 / (x + shift)
        else:
            x = x * torch.sigmoid(x) + shift
    return x


def rates(args: argparse.Namespace, kind: str) -> Iterator[Loop | Row]:
    def make(kernels: ModuleType) -> Loop:
        programs = _filling(args, kernels)
        drawn = torch.rand(3, programs * kernels.VALUES, device=args.device)
        # Numbers that stay in (0, 2), and of ffma below 40.
        low = torch.tensor([0.5, 0.99, 0.1], device=args.device)[:, None]
        inputs = low + drawn * torch.tensor([1.0, 0.01, 0.1], device=args.device)[:, None]
        result = torch.empty_like(inputs[0])
        clocks = torch.zeros(programs, 2, dtype=torch.int64, device=args.device)
        steps, most = kernels.STEPS[kind], _ERRORS.get(kind, _ERROR)

        def wrong(trips: int) -> str:
            if trips > 1:
                return ""  # the same code; float64 would take longer than the measurement
            want = expected(kind, inputs, steps)
            error = float(((result - want).abs() / want.abs()).max())
            return "" if error <= most else f"the relative error is {error:.2g}, not {most:g}"

        counts = (1, 1 + (1 if args.smoke else _TRIPS))
        calls = {
            n: functools.partial(kernels.rate, kind, inputs, result, clocks, n) for n in counts
        }
        each = steps * inputs.shape[1] * (2 if kind == "to_bf16" else 1)
        figures = _by_clock(args.device, each, "1/s", clocks, calls[counts[-1]])
        return Loop("triton", calls, lambda: result.fill_(float("nan")), wrong, figures)

    yield _by_triton(args, make)


def _by_clock(
    device: str, each: int, unit: str, clocks: Tensor, call: Callable[[], Any]
) -> Callable[[float], Row]:
    """Figures of ``each`` operations; their clock: ``call`` leaves cycles and nanoseconds in ``clocks``."""

    def figures(seconds: float) -> Row:
        row: Row = {"value": each / seconds, "unit": unit}
        row |= machine.gpu_clocks() if device == "cuda" else {}
        for _ in range(3):
            call()
        cycles, nanoseconds = (int(total) for total in clocks.sum(0))
        if nanoseconds <= 0:
            return row
        clock, count = cycles / nanoseconds * 1e9, multiprocessors(device)
        return {
            **row,
            "clock_hz": clock,
            "multiprocessors": count,
            "per_clock": each / seconds / clock / count,
        }

    return figures


# Products ----------------------------------------------------------------------------------------


def products(args: argparse.Namespace, tile: str) -> Iterator[Loop | Row]:
    def make(kernels: ModuleType) -> Loop:
        rows, columns, depth, resident = kernels.TILES[tile]
        programs = multiprocessors(args.device) * resident
        a = torch.randn(rows, depth, device=args.device).to(_HALF)
        b = torch.randn(depth, columns, device=args.device).to(_HALF)
        c = torch.empty(programs, rows, columns, device=args.device)
        clocks = torch.zeros(programs, 2, dtype=torch.int64, device=args.device)
        exact = a.double() @ b.double()
        counts = (1, 1 + (1 if args.smoke else _PRODUCTS))
        calls = {n: functools.partial(kernels.product, a, b, c, clocks, n) for n in counts}
        each = 2 * programs * rows * columns * depth
        by_clock = _by_clock(args.device, each, "FLOP/s", clocks, calls[counts[-1]])
        return Loop(
            "triton",
            calls,
            lambda: c.fill_(float("nan")),
            lambda n: _product_fault(c, n * exact),
            lambda seconds: {**by_clock(seconds), "gflop_s": each / seconds / 1e9},
        )

    yield _by_triton(args, make)


def torch_products(args: argparse.Namespace, side: int) -> Iterator[Loop]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    a, b = (torch.randn(side, side, device=args.device).to(dtype) for _ in range(2))
    c = torch.empty_like(a)
    some = a[:64].double() @ b.double()
    flops = 2 * side**3

    def times(n: int) -> None:
        for _ in range(n):
            torch.mm(a, b, out=c)

    def figures(seconds: float) -> Row:
        rate = flops / seconds
        clocks = machine.gpu_clocks() if args.device == "cuda" else {}
        return {"value": rate, "unit": "FLOP/s", "gflop_s": rate / 1e9, **clocks}

    yield Loop(
        "torch",
        {n: functools.partial(times, n) for n in (1, 1 + _TORCH_PRODUCTS)},
        lambda: c.fill_(float("nan")),
        lambda n: _product_fault(c[:64], some),
        figures,
    )


def _product_fault(found: Tensor, want: Tensor) -> str:
    """Of one product, or of several equal ones."""
    worst = float((found.double() - want).flatten(-2).norm(dim=-1).max() / want.norm())
    return "" if worst <= _PRODUCT_ERROR else f"the error is {worst:.2g} of the product's norm"


# Graphs ------------------------------------------------------------------------------------------


def chains(args: argparse.Namespace, programs: int) -> Iterator[Loop | Row]:
    nodes = _NODES[:2] if args.smoke else _NODES

    def loop(engine: str, elements: int, launch: Callable[[Tensor, int], Any]) -> Loop:
        counts = torch.zeros(elements, dtype=torch.int32, device=args.device)

        def wrong(n: int) -> str:
            found = counts.unique().tolist()
            return "" if found == [n] else f"counts are {found[:5]}"

        calls = {n: functools.partial(launch, counts, n) for n in nodes}
        return Loop(engine, calls, counts.zero_, wrong, lambda s: {"value": s, "unit": "s"})

    def by_torch(counts: Tensor, times: int) -> None:
        for _ in range(times):
            counts.add_(1)

    def by_triton(engine: str, early: bool) -> Loop | Row:
        def make(kernels: ModuleType) -> Loop:
            return loop(engine, programs, functools.partial(kernels.chain, early=early))

        return _by_triton(args, make, engine)

    yield by_triton("triton", False)
    if reason := _elsewhere(args):
        yield _absent("torch", reason)
    else:
        yield loop("torch", 1 if programs == 1 else 1024 * programs, by_torch)
    if args.device == "cuda" and torch.cuda.get_device_capability() < (9, 0):
        reason = "programmatic dependent launch takes compute capability 9.0"
        yield _absent("triton early", reason)
    else:
        yield by_triton("triton early", True)
