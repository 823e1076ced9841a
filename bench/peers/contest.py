"""Engines of one case against each other: each is checked, the right ones are timed in turns, every one gets a row."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from bench import machine, runner
from bench.peers import PeerError, Peers, Remote
from bench.peers.entrant import Entrant, Finish
from bench.results import ABSENT, TIMED, WRONG, Row
from bench.runner import Effort

_SLOW_S = 1.0
_SLOW = Effort(rounds=3)


class Competitor(Protocol):
    """``Entrant`` (a call of this process) or ``Remote`` (of a peer's)."""

    graph: bool
    versions: Mapping[str, str]  # of the packages that a peer uses

    def outputs(self, images: Sequence[int] | None = None) -> list[Tensor]: ...
    def time(self, repeats: int) -> float: ...
    def peak_memory(self) -> int | None: ...
    def close(self) -> None: ...


@dataclasses.dataclass(frozen=True)
class Engine:
    """An implementation that takes part; ``start`` raises RuntimeError where it cannot run."""

    name: str
    start: Callable[[], Competitor]
    compiled: bool = False  # by its first call, whose memory then is the compiler's


@dataclasses.dataclass(frozen=True)
class Check:
    """How far outputs are from the reference: an engine is right if ``error(outputs) <= limit``."""

    error: Callable[[list[Tensor]], float]
    limit: float
    of: str  # what the error is measured against, in words
    images: Sequence[int] | None = None  # those compared, along the first dimension; None: all


def here(
    name: str,
    make: Callable[[], Callable[[], Any]],
    device: str,
    graph: bool,
    compiled: bool = False,
    finish: Finish = list,
) -> Engine:
    """An engine of this process; ``make`` returns the call, ``finish`` is as of ``Entrant``."""
    return Engine(name, lambda: Entrant(make(), device, graph, finish), compiled)


def peer(
    name: str,
    peers: Peers,
    task: str,
    /,
    *,
    device: str,
    graph: bool = False,
    compiled: bool = False,
    **inputs: Any,
) -> Engine:
    """An engine in a process of its own; arguments as of ``Remote.load``."""

    def start() -> Remote:
        remote = Remote(peers)
        try:
            remote.load(task, device=device, graph=graph, **inputs)
        except BaseException:
            remote.close()
            raise
        return remote

    return Engine(name, start, compiled)


def compete(
    engines: Sequence[Engine], check: Check, cost: Row, shape: str, device: str, smoke: bool = False
) -> list[Row]:
    """A row for each engine: timed, wrong (outputs outside the limit) or absent (cannot run here, with the reason).

    Args:
        engines: in the order of the rows.
        check: their outputs pass it before anything is timed.
        cost: "bytes", "flops", "floor_s", "bandwidth", "matrix_rate" and others, put into every timed row.
        shape: of the inputs, in words.
        device: "cpu" or "cuda".
        smoke: one round only. Otherwise as ``runner.effort`` has it; 3 rounds where a call takes more than a second.
    """
    rows: dict[str, Row] = {}
    running: dict[str, Competitor] = {}
    slowest, on_gpu = 0.0, device == "cuda"
    with contextlib.ExitStack() as stack:
        for engine in engines:
            rows[engine.name] = row = {"engine": engine.name, "shape": shape}
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # a peer's process may need what is free here
            try:
                competitor = engine.start()
                stack.callback(competitor.close)
                row["versions"] = dict(competitor.versions)
                if engine.compiled:
                    competitor.outputs()
                row["peak_bytes"] = competitor.peak_memory()  # of the first call: nothing is kept
                start = time.perf_counter()
                found = competitor.outputs(check.images)
                slowest = max(slowest, time.perf_counter() - start)
                row["error"] = check.error(found)
            except RuntimeError as error:
                row |= {"status": ABSENT, "reason": _first_line(error)}
                continue
            row |= {"error_of": check.of, "cuda_graph": competitor.graph}
            if on_gpu and engine.compiled and not competitor.graph:
                row["peak_bytes"] = (
                    None  # max-autotune replays graphs of its own, which take nothing
                )
            if not row["error"] <= check.limit:
                row |= {"status": WRONG, "reason": f"error above {check.limit:g}; not timed"}
                continue
            running[engine.name] = competitor
        effort = _SLOW if slowest > _SLOW_S and not smoke else runner.effort(device, smoke)
        timings = runner.alternate(running, effort)
        clocks = machine.gpu_clocks() if on_gpu else {}
        for name, timing in timings.items():
            rows[name] |= {"status": TIMED, **timing.row(), **clocks}
            rows[name] |= _rates(cost, timing.median_s)
    return list(_compared(list(rows.values())))


def _rates(cost: Row, seconds: float) -> Row:
    """The case's cost and what of it was reached."""

    def per_nanosecond(name: str) -> float | None:
        return None if cost.get(name) is None else cost[name] / seconds / 1e9

    floor = cost.get("floor_s")
    return {
        **cost,
        "gb_s": per_nanosecond("bytes"),
        "gflop_s": per_nanosecond("flops"),
        "of_roofline": None if floor is None else floor / seconds,
    }


def _compared(rows: list[Row]) -> Iterator[Row]:
    """Adds how many times as fast as PyPI effdet each is: the faster of its eager layouts, and compiled."""
    medians = {row["engine"]: row["median_s"] for row in rows if row["status"] == TIMED}
    eager = [
        m for name, m in medians.items() if name.startswith("effdet ") and "compiled" not in name
    ]
    compiled = medians.get("effdet compiled")
    for row in rows:
        if row["status"] == TIMED:
            row["vs_eager"] = min(eager) / row["median_s"] if eager else None
            row["vs_compile"] = compiled / row["median_s"] if compiled else None
        yield row


def _first_line(error: Exception) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return first if isinstance(error, PeerError) else f"{type(error).__name__}: {first}"


def relative_to_std(found: Sequence[Tensor], expected: Sequence[Tensor], power: float) -> float:
    """The worst over tensors of the error's norm (max for inf, RMS for 2) over the expected one's deviation."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return torch.inf
    worst = 0.0
    for got, want in zip(found, expected, strict=True):
        error = (got.double() - want.double()).abs()
        size = error.max() if power == torch.inf else error.square().mean().sqrt()
        ratio = float(size / want.double().std())
        worst = max(worst, ratio if ratio == ratio else torch.inf)
    return worst
