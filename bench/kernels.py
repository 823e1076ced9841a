"""``python -m bench kernels``: each op's real shapes, forward and backward, on every backend that is here.

Maps and weights are channels_last in memory. Engines: "eager" is the op in plain PyTorch in the dtype of its inputs
(what a model without kernels runs), "eager nchw" the same on contiguous inputs, "compile" torch.compile of it. The
backends of ``effdet_kernels`` go by their names ("reference" accumulates in float32, so it differs from "eager" in half
precision only); "cpu alone" is the C++ kernels as a plan runs them, on weights packed and memory taken before. Others
are the spec's own peers. A backend outside its error bound is not timed; neither is a peer whose outputs are off by
more than rounding.
"""

from __future__ import annotations

import argparse
import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from bench import machine, runner
from bench.results import ABSENT, TIMED, WRONG, Job, Row
from effdet_kernels import _cuda, _dispatch, _native, testing, use_backend
from effdet_kernels._library import _storage
from effdet_kernels.bound import (
    differentiable,
    exact_inputs,
    flatten,
    map_tensors,
    tensors_of,
    with_leaves,
)
from effdet_kernels.ops._activations import unwidened
from effdet_kernels.spec import Case, Inputs, OpSpec, iter_specs

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_PEER_ERROR = {"fp32": 1e-4, "bf16": 2e-2, "fp16": 2e-3}  # of peers: ||y - ref|| / ||ref||
Call = Callable[[], list[Tensor]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", help="only this op (may be repeated)")
    parser.add_argument("--case", help="only cases whose name contains this")
    parser.add_argument("--direction", choices=("forward", "backward"), help="only this one")
    parser.add_argument(
        "--no-compile", action="store_true", help="leave torch.compile out (seconds a case)"
    )


def jobs(args: argparse.Namespace) -> Iterator[Job]:
    """One job per op, case, dtype and direction.

    Raises:
        ValueError: no case fits the arguments.
    """
    specs = list(iter_specs())
    unknown = set(args.op or ()) - {spec.name for spec in specs}
    if unknown:
        raise ValueError(
            f"--op: got {', '.join(sorted(unknown))}, takes {', '.join(s.name for s in specs)}"
        )
    found = False
    for spec in specs:
        for case in _cases(spec, args):
            for label in args.dtype:
                for direction in ("forward", "backward") if spec.diff_args else ("forward",):
                    if DTYPES[label] in spec.dtypes and args.direction in (None, direction):
                        found = True
                        run = functools.partial(_measure, spec, case, label, direction, args)
                        yield Job(
                            "kernels", spec.name, case.name, direction, label, args.device, run
                        )
    if not found:
        raise ValueError(f"no case for --op {args.op} --case {args.case} --dtype {args.dtype}")


def _cases(spec: OpSpec, args: argparse.Namespace) -> list[Case]:
    if args.op and spec.name not in args.op:
        return []
    if args.smoke:
        return list(spec.cases[:1])
    return [
        case
        for case in spec.cases
        if "bench" in case.tags
        and (args.device == "cuda" or "gpu" not in case.tags)
        and (not args.case or args.case in case.name)
    ]


def _measure(
    spec: OpSpec, case: Case, label: str, direction: str, args: argparse.Namespace
) -> Iterator[Row]:
    with runner.on_stream(args.device), _dispatch.strictly():
        inputs = arranged(spec.inputs(case, DTYPES[label], args.device), torch.channels_last)
        yield from _measure_inputs(spec, case, inputs, label, direction, args)


def _measure_inputs(
    spec: OpSpec, case: Case, inputs: Inputs, label: str, direction: str, args: argparse.Namespace
) -> Iterator[Row]:
    dtype, device = DTYPES[label], args.device
    cost = _cost(spec, inputs, direction)
    elements = first_elements(spec, inputs, direction)
    common = {"shape": shape_text(spec, inputs), "elements": elements, **cost}
    subjects: dict[str, runner.Subject] = {}
    rows: dict[str, Row] = {}
    for engine, function in _engines(spec, inputs, direction, args).items():
        own = arranged(inputs, torch.contiguous_format) if engine == "eager nchw" else inputs
        row = {**common, "engine": engine}
        if isinstance(function, str):
            yield {**row, "status": ABSENT, "reason": function}
            continue
        try:
            call, check = prepared(spec, case, own, function, direction)
            if engine in _dispatch.BACKENDS:
                row["error"], row["error_of"], allowed = check(dtype), "the bound", 1.0
            else:
                row["error"], allowed = (
                    _norm_error(spec, inputs, call(), direction, case),
                    _PEER_ERROR[label],
                )
                row["error_of"] = f"the reference's norm; up to {allowed} passes"
        except _dispatch.BackendError as error:
            yield {**row, "status": ABSENT, "reason": str(error)}
            continue
        except Exception as error:  # torch.compile and peers may fail in any way
            if isinstance(error, torch.OutOfMemoryError) and engine in _dispatch.BACKENDS:
                raise
            first = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {first[0] if first else ''}"
            yield {
                **row,
                "status": WRONG if engine in _dispatch.BACKENDS else ABSENT,
                "reason": reason,
            }
            continue
        if not row["error"] <= allowed:
            reason = f"error {row['error']:.3g} of {row['error_of']}"
            yield {**row, "status": WRONG, "reason": reason}
            continue
        row["peak_bytes"] = runner.peak_memory(call, device)
        subjects[engine], row["cuda_graph"] = timer(call, device)
        rows[engine] = row
    if not subjects:
        return
    limit = machine.floor(device, dtype, cost["bytes"], cost["flops"])
    timings = runner.alternate(subjects, runner.effort(device, args.smoke))
    clocks = machine.gpu_clocks() if device == "cuda" else {}
    for engine, timing in timings.items():
        yield {
            **rows[engine],
            "status": TIMED,
            **timing.row(),
            **limit,
            **clocks,
            "gb_s": cost["bytes"] / timing.median_s / 1e9,
            "gflop_s": cost["flops"] / timing.median_s / 1e9,
            "of_roofline": limit["floor_s"] / timing.median_s,
            "vs_eager": _speedup(timings, ("eager", "eager nchw"), engine),
            "vs_compile": _speedup(timings, ("compile",), engine),
        }


def _speedup(timings: dict[str, runner.Timing], bases: Sequence[str], engine: str) -> float | None:
    """How many times as fast as the fastest of ``bases``."""
    found = [timings[base].median_s for base in bases if base in timings]
    return min(found) / timings[engine].median_s if found else None


def arranged(inputs: Inputs, memory_format: torch.memory_format) -> Inputs:
    """``inputs`` with maps and weights in that layout."""

    def arrange(t: Tensor) -> Tensor:
        return t.contiguous(memory_format=memory_format) if t.dim() == 4 else t

    return {name: map_tensors(value, arrange) for name, value in inputs.items()}


# Engines -----------------------------------------------------------------------------------------


def _engines(
    spec: OpSpec, inputs: Inputs, direction: str, args: argparse.Namespace
) -> dict[str, Callable[..., Any] | str]:
    """By name, the function to time, or why it is absent."""
    engines: dict[str, Callable[..., Any] | str] = {"eager": _unwidened(spec.reference)}
    if any(t.dim() == 4 for value in inputs.values() for t in tensors_of(value)):
        engines["eager nchw"] = engines["eager"]
    if not args.no_compile:
        engines["compile"] = spec.uncompilable or _unwidened(_compiled(spec.reference))
    for name, function in spec.peers.items():
        engines[name] = _unwidened(function)
    implemented = testing.backends(spec)
    for name in _dispatch.BACKENDS:
        if not _dispatch.serves(name, args.device):
            continue
        reason = implemented.get(name, f"{spec.name} has no {name} kernel")
        if reason is None and direction == "backward":
            serving = testing.backward_backend(spec, name, args.device)
            reason = None if serving == name else f"its backward is that of {serving}"
        engines[name] = reason or on_backend(spec, name)
        if name == "cpu" and direction == "forward":
            engines["cpu alone"] = reason or _Recorded(spec)
    return engines


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # graph breaks of a peer are no news
    torch.compiler.reset()
    return torch.compile(function, dynamic=False)


def _unwidened(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        with unwidened():
            return function(**inputs)

    return call


def on_backend(spec: OpSpec, backend: str) -> Callable[..., Any]:
    def call(**inputs: Any) -> Any:
        with use_backend(backend):
            return spec.op(**inputs)

    return call


class _Recorded:
    """An op's C++ kernels as a plan runs them: packed weights and memory are made once, at the first call."""

    def __init__(self, spec: OpSpec) -> None:
        self._call = on_backend(spec, "cpu")
        self._launches: list[_native.Launch] = []

    def __call__(self, **inputs: Any) -> Any:
        if not self._launches:
            with _native.recorded() as launches:
                self._outputs = self._call(**inputs)
            self._tensors = launches  # they own the memory
            named: set[int] = set()
            _native.resolved([f for _, f in launches], lambda t: named.add(_storage(t)) or 0)
            if not all(_storage(t) in named for t in flatten(self._outputs)):
                raise _native.NotRecordableError("more than kernels makes the outputs")
            self._launches = [(n, _native.resolved(f, Tensor.data_ptr)) for n, f in launches]
        for name, fields in self._launches:
            _native.launch(name, **fields)
        return self._outputs


def prepared(
    spec: OpSpec, case: Case, inputs: Inputs, function: Callable[..., Any], direction: str
) -> tuple[Call, Callable[[torch.dtype], float]]:
    """The call to time, and its error over the bound."""
    if direction == "forward":

        def forward() -> list[Tensor]:
            with torch.no_grad():
                return flatten(function(**inputs))

        return forward, lambda dtype: spec.error_ratio(inputs, forward(), dtype, case.times)
    leaves = with_leaves(spec, inputs)
    outputs = flatten(function(**leaves))
    grads = testing.random_gradients(outputs, case.times)
    variables = [t for _, t in differentiable(spec, leaves)]
    pairs = [(out, g) for out, g in zip(outputs, grads, strict=True) if g is not None]

    def backward() -> list[Tensor]:
        found = torch.autograd.grad(
            [out for out, _ in pairs], variables, [g for _, g in pairs], True, allow_unused=True
        )
        zipped = zip(variables, found, strict=True)
        return [torch.zeros_like(t) if g is None else g for t, g in zipped]

    return backward, lambda dtype: spec.gradient_ratio(leaves, grads, backward(), dtype, case.times)


def _norm_error(
    spec: OpSpec, inputs: Inputs, found: Sequence[Tensor], direction: str, case: Case
) -> float:
    """||y - ref|| / ||ref|| over all floating outputs (gradients) of the first repeat of the batch."""
    exact = exact_inputs(spec, inputs, case.times)
    if direction == "forward":
        expected = flatten(spec.reference(**exact))
        names = [None] * len(expected)
    else:
        leaves = with_leaves(spec, exact)
        outputs = flatten(spec.reference(**leaves))
        grads = testing.random_gradients(outputs)
        expected = testing.gradients(spec, leaves, outputs, grads)
        names = [name for name, _ in differentiable(spec, leaves)]
    difference = size = 0.0
    for name, got, want in zip(names, found, expected, strict=True):
        if not want.is_floating_point():
            continue
        repeats = case.times
        if direction == "backward" and name not in spec.batched:
            want, repeats = want * case.times, 1
        tile = got.chunk(repeats)[0] if repeats > 1 else got
        difference += float((tile.to(want.device).double() - want).square().sum())
        size += float(want.square().sum())
    return (difference / size) ** 0.5 if size else 0.0


def timer(call: Call, device: str) -> tuple[runner.Subject, bool]:
    """``call`` as a CUDA graph where it can be captured, else as it is; whether it was."""
    if device == "cuda":
        try:
            return runner.Local(call, device, graph=True), True
        except RuntimeError:
            torch.cuda.synchronize()
    return runner.Local(call, device), False


# Costs ---------------------------------------------------------------------------------------------


def _cost(spec: OpSpec, inputs: Inputs, direction: str) -> dict[str, int]:
    both = (
        (spec.bytes, spec.flops)
        if direction == "forward"
        else (spec.backward_bytes, spec.backward_flops)
    )
    nbytes, flops = (function(**inputs) if function else 0 for function in both)
    return {"bytes": nbytes, "flops": flops}


def first_elements(spec: OpSpec, inputs: Inputs, direction: str) -> int:
    """How many the first tensor of the call has: an argument, of a backward the gradient of the first output. The
    order of backends on a GPU may depend on it."""
    if direction == "forward":
        return _cuda.first_tensor(list(inputs.values())).numel()
    shapes = {name: map_tensors(value, lambda t: t.to("meta")) for name, value in inputs.items()}
    return flatten(spec.op(**shapes))[0].numel()


def shape_text(spec: OpSpec, inputs: Inputs) -> str:
    """The first tensor argument's shape, or those of a list's first and last."""
    first = next(tensors for value in inputs.values() if (tensors := tensors_of(value)))
    sizes = ["x".join(map(str, t.shape)) for t in first]
    return sizes[0] if len(sizes) == 1 else f"{len(sizes)} maps {sizes[0]} to {sizes[-1]}"
