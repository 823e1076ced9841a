"""Times subjects against each other: they take turns, each round gives the best of five, the result is the median.

A subject is anything with ``time(repeats)``: seconds per call. ``Local`` times a callable of this process, on a CPU
with the wall clock, on a GPU with events around each call and the L2 cache flushed before it, as a CUDA graph where
asked for. ``peers.Remote`` times a call in another process.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

BEST_OF = 5
_FLUSH_BYTES = 256 << 20  # several times the L2 cache of any GPU


class Subject(Protocol):
    def time(self, repeats: int) -> float:
        """Mean seconds per call of ``repeats`` calls."""
        ...


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure."""

    rounds: int = 7
    seconds: float = 0.3  # per subject and round
    settle_s: float = 0.05  # pause before a subject's turn: the threads of others go to sleep


SMOKE = Effort(rounds=1, seconds=0.0, settle_s=0.0)
_ON_CPU = Effort()
_ON_GPU = Effort(rounds=5, seconds=0.1, settle_s=0.0)  # events are steady, and GPU time is dear


def effort(device: str, smoke: bool = False) -> Effort:
    """How long to measure on "cpu" or "cuda"."""
    return SMOKE if smoke else _ON_GPU if device == "cuda" else _ON_CPU


@dataclasses.dataclass(frozen=True)
class Timing:
    median_s: float  # of the rounds' best-of-five
    min_s: float
    spread: float  # (third - first quartile) / median of the rounds
    calls: int  # timed calls in all

    def row(self) -> dict[str, float]:
        return dataclasses.asdict(self)


def alternate(subjects: Mapping[str, Subject], effort: Effort) -> dict[str, Timing]:
    """Times every subject; they take turns, round by round."""
    repeats = {}
    for name, subject in subjects.items():
        subject.time(1)  # first calls compile, allocate and fill caches
        start = time.perf_counter()
        subject.time(1)
        seconds = time.perf_counter() - start  # with what surrounds the call
        repeats[name] = max(1, int(effort.seconds / BEST_OF / max(seconds, 1e-9)))
    best: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(effort.rounds):
        for name, subject in subjects.items():
            time.sleep(effort.settle_s)
            best[name].append(min(subject.time(repeats[name]) for _ in range(BEST_OF)))
    return {
        name: Timing(
            statistics.median(found),
            min(found),
            _interquartile(found) / statistics.median(found),
            repeats[name] * BEST_OF * effort.rounds,
        )
        for name, found in best.items()
    }


def _interquartile(values: list[float]) -> float:
    if len(values) < 2:
        return 0.0
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third - first


class Local:
    """A callable of this process. ``graph``: replayed as one CUDA graph."""

    def __init__(self, call: Callable[[], Any], device: str = "cpu", graph: bool = False) -> None:
        self._call = captured(call) if graph and device == "cuda" else call
        self._on_gpu = device == "cuda"

    def time(self, repeats: int) -> float:
        return self._time_gpu(repeats) if self._on_gpu else self._time_cpu(repeats)

    def _time_cpu(self, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            self._call()
        return (time.perf_counter() - start) / repeats

    def _time_gpu(self, repeats: int) -> float:
        flush = _flush_buffer()
        pairs = []
        for _ in range(repeats):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            self._call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in pairs) / 1e3 / repeats


@functools.cache
def _flush_buffer() -> torch.Tensor:
    return torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")


@functools.cache
def _stream() -> torch.cuda.Stream:
    return torch.cuda.Stream()


def on_stream(device: str) -> contextlib.AbstractContextManager[Any]:
    """Inside, a GPU works on the stream that graphs are captured on.

    Autograd runs a backward on the stream of its forward: a backward can be captured only if that was this one.
    """
    return torch.cuda.stream(_stream()) if device == "cuda" else contextlib.nullcontext()


def captured(call: Callable[[], Any]) -> Callable[[], Any]:
    """``call`` as the replay of a CUDA graph.

    Raises:
        RuntimeError: it waits for the device. That is found before a capture begins: one that breaks off may leave the
            allocator unusable.
    """
    side = _stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        kept = call()
    return lambda: (graph.replay(), kept, call)[1]  # call: a graph does not keep its inputs alive


def peak_memory(call: Callable[[], Any], device: str) -> int | None:
    """Bytes that ``call`` holds at its worst above what is held before it; None where that cannot be read."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _give_back_memory()
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # resets the high-water mark of resident memory
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _give_back_memory() -> None:
    """Returns freed memory to the system: what malloc keeps would hide what a call takes."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's
    if trim is not None:
        trim(0)


def _status_bytes(field: str) -> int:
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith(field))
    return int(line.split()[1]) * 1024
