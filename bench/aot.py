"""Compiles Triton kernels without a GPU, as the library would launch them, and predicts how fast they can be.

Every launch of an op's real cases is compiled for a chosen architecture. A row says what the machine code takes
(registers, shared memory, spills), what it uses (vector loads, matrix instructions), and how many instructions a
program issues: those outside of loops once, those of loops as often as the launcher says. The prediction is a model,
not a measurement: a launch takes the longer of its memory time (its tensors once, at the copy bandwidth), its issue
time (4 instructions per clock and multiprocessor, one in eight of them an exponential or a reciprocal) and its matrix
time; the call takes the sum. Beside it stands the time of one program, all that counts where the GPU is mostly idle. It
is fitted to the 104 launches of D0 at batch 1 on an H200 (results/nvidia_h200/profile_d0_batch1.json): it and the time
of the launch add up to what was measured, within a fifth for 89 of them.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import re
import subprocess
import tempfile
import unittest.mock
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from effdet_kernels import _library, _triton, testing
from effdet_kernels.bound import flatten, map_tensors
from effdet_kernels.spec import Case, Inputs, OpSpec, iter_specs
from effdet_kernels.verify import DTYPES

ARCHITECTURES = {80: 163, 86: 99, 90: 227, 120: 99}  # and their shared memory per block, KB
# The GPU that predictions are for, an H200: measured copy bandwidth and bf16 product, the clock under load.
BANDWIDTH, MATRIX_FLOPS, CLOCK, MULTIPROCESSORS = 4.3e12, 788e12, 1.755e9, 132
_ISSUED = 4  # warp instructions per clock and multiprocessor
_SPECIAL = 0.5  # of these, MUFU
_WARP = 32
# A program alone on a multiprocessor: the launch, and each instruction of a warp; more than 4 warps hold each other up.
_LAUNCH, _INSTRUCTION, _MORE_WARPS = 1.3e-6, 1.9e-9, 0.35
_WIDE = re.compile(r"\.(64|128)(\.|$)")  # of a load's opcode: addresses have a ".64" too


@dataclasses.dataclass(frozen=True)
class Code:
    """The machine code of one kernel for one architecture."""

    registers: int
    shared: int  # bytes
    local: int  # bytes of stack and spills per thread
    warps: int
    outside: int  # instructions that are in no loop
    loops: tuple[
        int, ...
    ]  # instructions of each loop, in their order, without those of loops inside it
    vector_loads: int  # of 8 and 16 bytes
    scalar_loads: int
    matrix: str  # HGMMA, HMMA, DMMA or ""
    special: tuple[int, ...]  # MUFU instructions outside of loops and in each loop

    def resident_warps(self, architecture: int) -> int:
        """Warps of it that a multiprocessor holds at a time, by registers and shared memory."""
        by_registers = 65536 // (max(self.registers, 24) * _WARP * self.warps)
        by_shared = (ARCHITECTURES[architecture] + 1) * 1024 // (self.shared + 1024)
        return self.warps * min(by_registers, by_shared)

    def issued(self, trips: Sequence[int]) -> int:
        """Instructions of a warp whose loops run ``trips`` times, each; loops beyond those: once."""
        return _run_through((self.outside, *self.loops), trips)

    def transcendental(self, trips: Sequence[int]) -> int:
        """Of these, exponentials, reciprocals and the like."""
        return _run_through(self.special, trips)


def _run_through(counts: Sequence[int], trips: Sequence[int]) -> int:
    outside, *loops = counts
    pairs = itertools.zip_longest(loops, trips[: len(loops)], fillvalue=1)
    return outside + sum(count * times for count, times in pairs)


class _Driver:
    """Stands in for a CUDA driver: says what to compile for, and runs nothing."""

    def __init__(self, architecture: int) -> None:
        self._architecture = architecture

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self._architecture, _WARP)

    def get_current_device(self) -> int:
        return self._architecture  # Triton keeps compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0


def compiled(launch: _triton.Launch, architecture: int) -> Code:
    """The code of the variant that Triton's launcher would choose for these arguments."""
    from triton.runtime.driver import driver

    with unittest.mock.patch.object(driver, "_active", _Driver(architecture)):
        kernel = launch.kernel.warmup(*launch.arguments, grid=(1,), **launch.options)
    metadata = kernel.metadata
    return _examined(kernel.asm["cubin"], metadata.shared, metadata.num_warps)


@functools.lru_cache(maxsize=4096)
def _examined(cubin: bytes, shared: int, warps: int) -> Code:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (_cuobjdump(flag, file.name) for flag in ("-res-usage", "-sass"))
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][^;]*);", sass)
    code = [(int(address, 16), text) for address, text in lines if not text.startswith("NOP")]
    outside, *loops = _loops(code, "")
    loads = [text for _, text in code if text.startswith(("LDG", "LDGSTS"))]
    vector = sum(_WIDE.search(text.split()[0]) is not None for text in loads)
    names = ("HGMMA", "HMMA", "DMMA")
    matrix = next((n for n in names if any(t.startswith(n) for _, t in code)), "")
    return Code(
        found["REG"],
        shared,
        found["STACK"] + found["LOCAL"],
        warps,
        outside,
        tuple(loops),
        vector,
        len(loads) - vector,
        matrix,
        tuple(_loops(code, "MUFU")),
    )


def _loops(code: Sequence[tuple[int, str]], beginning: str) -> list[int]:
    """Instructions that begin so, outside of loops and in each; a loop ends where the code branches back."""
    bounds: dict[int, int] = {}  # first address of a loop: its last
    for address, text in code:
        branch = re.match(r"BRA(?:\.\w+)* .*?(0x[0-9a-f]+)", text)
        if branch and int(branch[1], 16) < address:
            bounds[int(branch[1], 16)] = address
    spans = sorted(bounds.items(), key=lambda span: (span[0], -span[1]))
    counts = [0] * (len(spans) + 1)
    for address, text in code:
        if text.startswith(beginning):
            inner = [i for i, (first, last) in enumerate(spans) if first <= address <= last]
            counts[1 + inner[-1] if inner else 0] += 1
    return counts


def _cuobjdump(flag: str, path: str) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return subprocess.run([tool, flag, path], capture_output=True, text=True, check=True).stdout


# Launches of an op ---------------------------------------------------------------------------------


def launches(
    spec: OpSpec, case: Case, dtype: torch.dtype, shared_kb: int, backward: bool
) -> list[_triton.Launch]:
    """What a call of the op launches on a GPU with ``shared_kb`` of shared memory."""
    op, args = _arguments(spec, _inputs(spec, case, dtype))
    with _triton.recorded(shared_kb) as noted:
        if not backward:
            op.impls["triton"](*args)
            return noted
        outputs = flatten(op._fake(*args))
        grads = [torch.empty_like(out) for out in outputs]
        saved = [[outputs[i] for i in op.saved_positions(args)]] if op._saved_outputs else []
        variables = _library._tensors([args[i] for i in op._differentiable])
        op.backwards["triton"](grads, *args, *saved, [True] * len(variables))
        return noted


def _inputs(spec: OpSpec, case: Case, dtype: torch.dtype) -> Inputs:
    """The arguments on "meta", maps channels_last; nothing is drawn."""

    def placed(t: Tensor) -> Tensor:
        layout = torch.channels_last if t.dim() == 4 else torch.contiguous_format
        return torch.empty(t.shape, dtype=t.dtype, device="meta", memory_format=layout)

    with FakeTensorMode():
        drawn = spec.inputs(case, dtype)
    return {name: map_tensors(value, placed) for name, value in drawn.items()}


def _arguments(spec: OpSpec, inputs: Inputs) -> tuple[_library.Op, tuple[Any, ...]]:
    """The op and the arguments of its schema that the public function makes of ``inputs``."""
    calls: list[tuple[_library.Op, tuple[Any, ...]]] = []

    def note(op: _library.Op, *args: Any) -> Any:
        calls.append((op, args))
        return op._fake(*args)

    with unittest.mock.patch.object(_library.Op, "__call__", note):
        spec.op(**inputs)
    return calls[-1]


# Prediction ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of one launch, on the GPU named above, in seconds."""

    memory: float
    issue: float
    special: float
    matrix: float
    program: float  # of one program, with its launch: the least that a launch takes

    @property
    def total(self) -> float:
        return max(self.memory, self.issue, self.special, self.matrix)


def predicted(launch: _triton.Launch, code: Code) -> Prediction:
    tensors = {id(t): t for t in _tensors(launch.arguments)}
    moved = sum(t.numel() * t.element_size() for t in tensors.values())
    warps, issued = launch.programs * code.warps, code.issued(launch.trips)
    issue = warps * issued / (_ISSUED * CLOCK * MULTIPROCESSORS)
    special = warps * code.transcendental(launch.trips) / (_SPECIAL * CLOCK * MULTIPROCESSORS)
    crowd = 1 + _MORE_WARPS * max(0, code.warps / 4 - 1)
    program = _LAUNCH + issued * _INSTRUCTION * crowd
    return Prediction(moved / BANDWIDTH, issue, special, launch.flops / MATRIX_FLOPS, program)


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, tuple):
            yield from _tensors(value)


# The recorded table ------------------------------------------------------------------------------


Call = tuple[OpSpec, Case, str, int, str]  # dtype, architecture, direction


def plan(specs: Sequence[OpSpec]) -> list[Call]:
    """What the recorded table holds: all real cases in bfloat16 for sm_90, the first of each op in all else."""
    calls = []
    for spec in specs:
        for direction in ("forward", "backward"):
            if has_kernel(spec, direction == "backward"):
                cases = real_cases(spec)
                short = "bf16" if torch.bfloat16 in spec.dtypes else "fp32"
                calls += [(spec, case, short, 90, direction) for case in cases]
                calls += [(spec, cases[0], short, arch, direction) for arch in (80, 86, 120)]
                calls += [
                    (spec, cases[0], label, arch, direction)
                    for label, dtype in DTYPES.items()
                    for arch in (86, 90)
                    if label != short and dtype in spec.dtypes
                ]
    return calls


def measured(
    spec: OpSpec, case: Case, label: str, arch: int, direction: str
) -> list[tuple[_triton.Launch, Code]]:
    """The launches of a call and their code."""
    made = launches(spec, case, DTYPES[label], ARCHITECTURES[arch], direction == "backward")
    return [(launch, compiled(launch, arch)) for launch in made]


def table(made: Sequence[tuple[Call, _triton.Launch, Code]]) -> dict[str, list[str]]:
    """Per kernel, dtype, architecture and constants: what the code of each of its variants takes and uses."""
    rows: dict[str, set[str]] = {}
    for (_, _, label, arch, _), launch, code in made:
        options = ",".join(f"{k}={_short(v)}" for k, v in sorted(launch.options.items()))
        key = f"{launch.kernel.__name__} {label} sm_{arch} {options}"
        rows.setdefault(key, set()).add(
            f"{code.registers} registers, {code.shared} bytes shared, {code.local} local,"
            f" {code.vector_loads} vector and {code.scalar_loads} scalar loads,"
            f" {code.matrix or 'no'} matrix instructions"
        )
    return {key: sorted(found) for key, found in sorted(rows.items())}


def _short(value: Any) -> str:
    return str(getattr(value, "value", value)).replace(" ", "")


# Command -------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--op", action="append", help="only this op (may be repeated)")
    add("--case", action="append", help="only cases whose name begins so")
    add("--dtype", action="append", choices=DTYPES, help="default: bf16")
    add("--arch", action="append", type=int, choices=ARCHITECTURES, help="default: 90")
    add("--direction", choices=("forward", "backward"), help="default: both")
    add("--record", type=Path, help="write the table that the tests compare with, of all ops")


def run(args: argparse.Namespace) -> int:
    if _triton.INTERPRET:
        raise ValueError("TRITON_INTERPRET is set: kernels are not compiled then")
    if args.record:
        calls = plan(list(iter_specs()))
        made = [(call, *pair) for call in calls for pair in measured(*call)]
        args.record.write_text(json.dumps(table(made), indent=1) + "\n")
        return 0
    for spec in iter_specs():
        if args.op and spec.name not in args.op:
            continue
        for direction in (args.direction,) if args.direction else ("forward", "backward"):
            if has_kernel(spec, direction == "backward"):
                for case in real_cases(spec, args.case):
                    for label in args.dtype or ["bf16"]:
                        for arch in args.arch or [90]:
                            _report(spec, case, label, arch, direction)
    return 0


def has_kernel(spec: OpSpec, backward: bool) -> bool:
    op = testing.operator(spec)
    return "triton" in (op.backwards if backward else op.impls)


def real_cases(spec: OpSpec, prefixes: Sequence[str] | None = None) -> list[Case]:
    return [
        case
        for case in spec.cases
        if "bench" in case.tags and (not prefixes or case.name.startswith(tuple(prefixes)))
    ]


def _report(spec: OpSpec, case: Case, label: str, arch: int, direction: str) -> None:
    """Prints a line per launch, and what it adds up to."""
    made = measured(spec, case, label, arch, direction)
    predictions = [predicted(*pair) for pair in made]
    total = sum(p.total for p in predictions)
    count = spec.backward_bytes if direction == "backward" else spec.bytes
    share = ""
    if count is not None and total:
        compulsory = count(**_inputs(spec, case, DTYPES[label])) / BANDWIDTH
        share = f", {compulsory / total:.0%} of the copy bandwidth on compulsory bytes"
    print(f"{spec.name} {case.name} {label} {direction} sm_{arch}: {total * 1e6:.1f} us{share}")
    for (launch, code), p in zip(made, predictions, strict=True):
        loops = " + ".join(
            f"{count} x {times}"
            for count, times in itertools.zip_longest(code.loops, launch.trips, fillvalue="?")
        )
        print(
            f"    {launch.kernel.__name__:<34}{launch.programs:>8} x {code.warps} warps,"
            f" {code.registers} registers, {code.shared / 1024:.0f} KB, local {code.local},"
            f" loads {code.vector_loads} vector {code.scalar_loads} scalar {code.matrix};"
            f" instructions {code.outside} + {loops or 0};"
            f" memory {p.memory * 1e6:.1f} us, issue {p.issue * 1e6:.1f},"
            f" MUFU {p.special * 1e6:.1f}, matrix {p.matrix * 1e6:.1f};"
            f" one program {p.program * 1e6:.1f}"
        )
