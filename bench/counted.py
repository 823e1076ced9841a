"""What ``bench counters`` runs under ncu: calls of ops, or forwards of models, each profiled once after two unprofiled.

Before each call a kernel that nothing else launches marks it in the stream of launches.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import unittest.mock
from collections.abc import Iterator
from typing import Any

import torch

from bench import kernels, launches, runner
from bench.kernels import DTYPES
from bench.model import build, default_size, images, weights
from bench.results import ABSENT, SKIPPED, Row
from effdet.plan import use_plan
from effdet_kernels import _dispatch, _library, use_backend
from effdet_kernels.bound import flatten
from effdet_kernels.spec import Case, OpSpec, iter_specs

DIRECTIONS = ("forward", "backward")
MARK = "spin_kernel"  # of torch.cuda._sleep
BETWEEN = "torch"  # the op of what torch launches between ops


def run(args: argparse.Namespace, device: str) -> None:
    """Makes the calls; a line for each, in their order, goes to the file of --child."""
    calls = _calls(args, device) if args.op else _forwards(args, device)
    with args.child.open("w", encoding="utf-8") as file:
        for call in calls:
            file.write(json.dumps(call) + "\n")


def cases(args: argparse.Namespace) -> Iterator[tuple[OpSpec, Case, str, str]]:
    """The op, the case, the dtype and the direction of each call."""
    for spec in iter_specs():
        if spec.name not in args.op:
            continue
        dtypes = args.dtype or [launches.own_dtype(spec)]
        directions = DIRECTIONS if spec.diff_args else DIRECTIONS[:1]
        for case, dtype in itertools.product(launches.real_cases(spec, args.case), dtypes):
            for direction in directions:
                if DTYPES[dtype] in spec.dtypes and args.direction in (None, direction):
                    yield spec, case, dtype, direction


def _calls(args: argparse.Namespace, device: str) -> Iterator[Row]:
    for spec, case, dtype, direction in cases(args):
        of = {"name": spec.name, "case": case.name, "direction": direction, "dtype": dtype}
        bytes_of = spec.bytes if direction == "forward" else spec.backward_bytes
        try:
            with runner.on_stream(device), _dispatch.strictly():
                inputs = spec.inputs(case, DTYPES[dtype], device)
                inputs = kernels.arranged(inputs, torch.channels_last)
                function = kernels.on_backend(spec, args.backend)
                call, _ = kernels.prepared(spec, case, inputs, function, direction)
                call(), call()
                with _profiled() as mark:
                    mark(op=spec.name)
                    call()
        except _dispatch.BackendError as error:
            yield {**of, "status": ABSENT, "reason": str(error)}
        except torch.OutOfMemoryError as error:
            yield {**of, "status": SKIPPED, "reason": str(error).partition("\n")[0]}
        else:
            nbytes = bytes_of(**inputs) if bytes_of else 0
            shape = kernels.shape_text(spec, inputs)
            yield {**of, "op": spec.name, "bytes": nbytes, "shape": shape}


def _forwards(args: argparse.Namespace, device: str) -> Iterator[Row]:
    dtypes = args.dtype or ["bf16"]
    for name, batch, dtype in itertools.product(args.model, args.batch or [1], dtypes):
        size = args.size or default_size(name)
        model = build(name, size, weights(name)).to(device, DTYPES[dtype]).eval()
        x = images(1, size).to(device, DTYPES[dtype]).repeat(batch, 1, 1, 1)
        with torch.inference_mode(), use_plan(False), use_backend(args.backend):
            model(x), model(x)
            with _profiled() as mark, mark.every_op():
                mark(op=BETWEEN)
                model(x)
        case = f"{size}x{size} b{batch}"
        of = {"name": name, "case": case, "direction": "forward", "dtype": dtype}
        yield from ({**of, **call} for call in mark.calls)


class _Mark:
    """Marks where a call begins; keeps what each call was."""

    def __init__(self) -> None:
        self.calls: list[Row] = []

    def __call__(self, **call: Any) -> Row:
        torch.cuda._sleep(1)
        self.calls.append(call)
        return call

    @contextlib.contextmanager
    def every_op(self) -> Iterator[None]:
        """Inside, every call of an op is marked, with its bytes, and what comes after it as ``BETWEEN``."""
        inner = _library.Op.__call__

        def marked(op: _library.Op, *args: Any) -> Any:
            call = self(op=op.name)
            outputs = inner(op, *args)
            tensors = {id(t): t for t in (*_library._tensors(args), *flatten(outputs))}
            call["bytes"] = sum(t.nbytes for t in tensors.values())
            self(op=BETWEEN)
            return outputs

        with unittest.mock.patch.object(_library.Op, "__call__", marked):
            yield


@contextlib.contextmanager
def _profiled() -> Iterator[_Mark]:
    """Inside, launches are counted."""
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        yield _Mark()
    finally:
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
