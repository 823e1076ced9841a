"""Times callables against each other: checked first, alternating, medians of several runs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def alternate(
    calls: Mapping[str, Callable[[], object]], rounds: int = 7, seconds: float = 0.2
) -> dict[str, dict[str, float]]:
    """Median and minimum time per call, in seconds, of each callable; they take turns, round by round.

    One round calls each as often as fits in ``seconds`` (at least once), after one call that is not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(seconds / max(_time(call, 1), 1e-7)))
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(_time(call, repeats[name]))
    return {
        name: {"median_s": statistics.median(found), "min_s": min(found)}
        for name, found in times.items()
    }


def _time(call: Callable[[], object], repeats: int) -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats


def copy_bandwidth(device: str, nbytes: int = 1 << 28) -> float:
    """Bytes read plus written per second by a large copy: the roofline that kernels are compared with."""
    source = torch.rand(nbytes // 4, device=device)
    target = torch.empty_like(source)
    timing = alternate({"copy": lambda: target.copy_(source)}, rounds=5)
    return 2 * nbytes / timing["copy"]["min_s"]
