"""Entry point of the benchmarks."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from types import ModuleType

import torch

import bench
from bench import (
    ahead,
    aot,
    compare,
    counters,
    cuda_code,
    detect,
    dispatch,
    floors,
    gpu,
    kernels,
    limits,
    loss,
    machine,
    model,
    profiles,
    report,
    targets,
    train,
    tune,
)
from bench.results import WRONG, Log
from bench.table import print_rows

RESULTS = Path(__file__).parent / "results"
SUITES = {
    "limits": (limits, "what a machine can do at best: nodes of a graph, bandwidth, rates"),
    "kernels": (kernels, "each op on each backend, forward and backward"),
    "model": (model, "whole networks, beside their peers"),
    "profile": (profiles, "where the time of a network goes, kernel by kernel"),
    "train": (train, "training steps"),
    "loss": (loss, "labels and loss of a training step"),
    "detect": (detect, "post-processing: NMS and soft-NMS, from head outputs to rows"),
}
TOOLS = {
    "floors": (floors, "what a machine with given ceilings could do at best, per model"),
    "aot": (aot, "Triton kernels compiled without a GPU: what they take, and how fast they can be"),
    "compile": (ahead, "Triton kernels compiled before anything launches them, on all cores"),
    "cuda": (cuda_code, "the CUDA kernels' machine code, and whether it is as recorded"),
    "counters": (counters, "hardware counters of kernels, by NVIDIA's ncu"),
    "tune": (tune, "launch.json, the kernels' block sizes, from measurements on a GPU"),
    "dispatch": (dispatch, "dispatch.json, which backend a GPU tries first, from kernels' rows"),
    "report": (report, "tables, roofline plots and a page from results"),
    "compare": (compare, "two sets of results; flags what became slower"),
    "targets": (targets, "the goals on an H200 beside what was measured"),
    "gpu": (gpu, "everything on a GPU, in parts that can be resumed"),
}


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in {**SUITES, **TOOLS}.items():
        command = commands.add_parser(name, help=summary, description=module.__doc__)
        if name in SUITES:
            _add_common(command)
        module.add_arguments(command)
    args = parser.parse_args()
    try:
        if args.command in TOOLS:
            return TOOLS[args.command][0].run(args) or 0
        return _run_suite(SUITES[args.command][0], args)
    except (ValueError, OSError) as error:
        parser.exit(1, f"{parser.prog} {args.command}: {error}\n")


def _add_common(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    add("--dtype", action="append", choices=kernels.DTYPES, help="may be repeated; default: fp32")
    add("--threads", type=int, help="CPU threads; default: torch's")
    add("--smoke", action="store_true", help="tiny sizes, one round, nothing written: does it run?")
    add("--out", type=Path, help="rows go to this file; default: results/<machine>/<suite>.jsonl")
    add("--resume", action="store_true", help="leave out what the file has already")
    add("--deadline", type=float, metavar="SECONDS", help="start no case after this time")


def _run_suite(suite: ModuleType, args: argparse.Namespace) -> int:
    args.dtype = args.dtype or ["fp32"]
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: got cuda, but no CUDA device is visible to torch")
    if args.threads is not None:
        if args.threads < 1:
            raise ValueError(f"--threads: got {args.threads}, takes at least 1")
        torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # float32 means float32
    out = args.out
    if out is None and not args.smoke:
        out = RESULTS / machine.slug(args.device) / f"{args.command}.jsonl"
    log = Log(out, machine.describe(), args.resume)
    finished = log.run(suite.jobs(args), args.deadline)
    print_rows(log.rows)
    if out is not None:
        print(
            f"{len(log.rows)} rows in {out}" + ("" if finished else "; the deadline came: --resume")
        )
    return 1 if any(row["status"] == WRONG for row in log.rows) else 0


if __name__ == "__main__":
    sys.exit(main())
