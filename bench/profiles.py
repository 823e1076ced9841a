"""``python -m bench profile``: where the time of a network goes, kernel by kernel, by torch.profiler.

On a GPU the forward is captured as a CUDA graph and replayed three times under the profiler; on a CPU it runs module by
module, and what stands for a kernel is an op that torch calls. A row is a whole forward: its time as `bench model`
takes it (the L2 cache flushed before each; not under the profiler), and of the profiled replays `launches` (each, in
order, medians over the replays), `kernels` (the same by name: count, median and sum, the longest first), `busy_us`
(their sum) and `gaps_us` (between them). Outputs are not compared here.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench import runner
from bench.kernels import DTYPES
from bench.model import build, default_size, images, weights
from bench.results import TIMED, Job, Row
from effdet.plan import use_plan

REPLAYS = 3
_KERNELS = {"cuda": ("kernel", "gpu_memcpy", "gpu_memset"), "cpu": ("cpu_op",)}
_ACTIVITIES = {"cuda": ProfilerActivity.CUDA, "cpu": ProfilerActivity.CPU}
# What a trace says of a kernel on a GPU: the name there, the name here.
_FACTS = {
    "grid": "grid",
    "block": "block",
    "registers per thread": "registers",
    "shared memory": "shared_bytes",
}
_LONGEST_NAME = 120
_SHOWN = 20  # kernels that are printed; the row has all

Event = dict[str, Any]  # of a trace: name, ts and dur in microseconds, args


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", action="append", help="default tf_efficientdet_d0 (repeatable)")
    parser.add_argument("--size", type=int, help="image side; default the model's own")
    parser.add_argument("--batch", action="append", type=int, help="default 1 (repeatable)")


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One job per model, batch and dtype.

    Raises:
        ValueError: no such model, or a size or batch that is not positive.
    """
    for name in args.model or ["tf_efficientdet_d0"]:
        own = default_size(name)
        size = args.size or (64 if args.smoke else own)
        for batch, dtype in itertools.product(args.batch or [1], args.dtype):
            if min(size, batch) < 1:
                raise ValueError(f"--size and --batch must be positive, got {size} and {batch}")
            run = functools.partial(_measure, args, name, size, batch, dtype)
            case = f"{size}x{size} b{batch}"
            yield Job("profile", name, case, "forward", dtype, args.device, run)


def _measure(args: argparse.Namespace, name: str, size: int, batch: int, dtype: str) -> list[Row]:
    model = build(name, size, weights(name)).to(args.device, DTYPES[dtype]).eval()
    x = images(1, size).to(args.device, DTYPES[dtype]).repeat(batch, 1, 1, 1)

    def forward() -> Any:
        with torch.inference_mode(), use_plan(args.device == "cuda"):
            return model(x)

    graph = args.device == "cuda"
    call = runner.captured(forward) if graph else forward
    subject = {"forward": runner.Local(call, args.device)}
    timing = runner.alternate(subject, runner.effort(args.device, args.smoke))["forward"]
    found = summary([_profiled(call, args.device) for _ in range(REPLAYS + 1)][1:])
    _print_longest(found)
    shape = f"{batch}x3x{size}x{size}"
    row = {"engine": "effdet_kernels", "status": TIMED, "shape": shape, "graph": graph}
    return [{**row, **timing.row(), **found}]


def _profiled(call: Callable[[], Any], device: str) -> list[Event]:
    """The kernels of one call, in order."""
    with profile(activities=[_ACTIVITIES[device]]) as profiler:
        call()
        if device == "cuda":
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return kernels_of(json.loads(path.read_text())["traceEvents"], device)


def kernels_of(events: Sequence[Event], device: str) -> list[Event]:
    """The kernels, copies and fills of a GPU by their beginning, or the ops of a CPU that no other op calls."""
    chosen = [event for event in events if event.get("cat") in _KERNELS[device]]
    chosen.sort(key=lambda event: (event["ts"], -event["dur"]))
    if device == "cuda":
        return chosen
    found: list[Event] = []
    for event in chosen:
        if not found or event["ts"] >= found[-1]["ts"] + found[-1]["dur"]:
            found.append(event)
    return found


def summary(replays: Sequence[Sequence[Event]]) -> Row:
    """What a row says of the kernels of several replays.

    Raises:
        RuntimeError: the replays differ in their kernels, or have none.
    """
    names = [[event["name"] for event in replay] for replay in replays]
    if not names[0] or any(other != names[0] for other in names):
        counts = ", ".join(str(len(each)) for each in names)
        raise RuntimeError(f"the profiler saw {counts} kernels in {len(names)} equal replays")
    launches = [_launch(place, replays) for place in range(len(names[0]))]
    by_name: dict[str, list[float]] = {}
    for launch in launches:
        by_name.setdefault(launch["kernel"], []).append(launch["us"])
    kernels = [
        {
            "kernel": name,
            "count": len(times),
            "median_us": round(statistics.median(times), 3),
            "sum_us": round(sum(times), 3),
        }
        for name, times in by_name.items()
    ]
    return {
        "replays": len(replays),
        "busy_us": round(sum(launch["us"] for launch in launches), 3),
        "gaps_us": round(statistics.median(_gaps(replay) for replay in replays), 3),
        "kernels": sorted(kernels, key=lambda kernel: -kernel["sum_us"]),
        "launches": launches,
    }


def _launch(place: int, replays: Sequence[Sequence[Event]]) -> Row:
    """One launch: when it began after the first, how long it took, and its grid where there is one."""
    event = replays[0][place]
    starts = [replay[place]["ts"] - replay[0]["ts"] for replay in replays]
    facts = event.get("args", {})
    return {
        "kernel": event["name"][:_LONGEST_NAME],
        "start_us": round(statistics.median(starts), 3),
        "us": round(statistics.median(replay[place]["dur"] for replay in replays), 3),
        **{ours: facts[theirs] for theirs, ours in _FACTS.items() if theirs in facts},
    }


def _gaps(replay: Sequence[Event]) -> float:
    """Microseconds between the end of a kernel and the beginning of the next, all together."""
    return sum(
        max(0.0, after["ts"] - before["ts"] - before["dur"])
        for before, after in itertools.pairwise(replay)
    )


def _print_longest(found: Row) -> None:
    print(f"\n{'kernel':<50}{'count':>7}{'median us':>11}{'sum us':>11}")
    for kernel in found["kernels"][:_SHOWN]:
        print(
            f"{kernel['kernel'][:49]:<50}{kernel['count']:>7}"
            f"{kernel['median_us']:>11.1f}{kernel['sum_us']:>11.1f}"
        )
    print(f"{'all':<50}{len(found['launches']):>7}{'':>11}{found['busy_us']:>11.1f}")
    print(f"{'between them':<68}{found['gaps_us']:>11.1f}", flush=True)
