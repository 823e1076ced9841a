"""The recorded table of machine code: per call of an op, what the code of each of its launches takes and uses.

``python -m bench aot --record tests/aot/triton-<release>.json`` writes it for the installed release of triton;
tests/test_aot.py compiles the same calls and compares. Triton keeps what it compiled, so a recording that was ended
goes on quickly.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench import launches
from bench.sass import ARCHITECTURES, WARP, Code
from effdet_kernels import _triton
from effdet_kernels.spec import Case, OpSpec, iter_specs
from effdet_kernels.verify import DTYPES

LEAST_WARPS = 8  # that a multiprocessor must hold
FP64_LOCAL = 16  # bytes of local memory that a thread may take in float64, which is for comparisons
QUICK = 90  # the architecture whose real cases .ci/run compares
# Cases besides an op's first real one: for kernels, or ways through them, that it does not take.
ALSO = {
    "batch_norm_act": ("d0_expanded_given",),
    "dense_conv": ("d0_edgetpu_expand", "d0_stem_training"),
    "depthwise_conv": ("d0_3x3_stride2", "d0_5x5", "d0_training"),
    "pointwise_conv": ("d0_expand",),
    "separable_conv": ("d0_bottom_up", "d0_heads", "d0_heads_training"),
    "weighted_fusion": ("d0_bottom_up_batch8", "top_down"),
}
# The case with odd numbers of channels, so that nothing is loaded in vectors; where not named, the first small one.
ODD = {"decode_topk": "unclipped"}

Table = dict[str, list[str]]  # by the call's name; a line per launch


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an op: what is compiled for it is an entry of the table."""

    spec: OpSpec
    direction: str  # forward, backward
    case: Case
    dtype: str
    architecture: int
    quick: bool  # .ci/run compares it

    @property
    def name(self) -> str:
        words = (self.spec.name, self.direction, self.case.name, self.dtype)
        return f"{' '.join(words)} sm_{self.architecture}"

    def measured(self) -> list[tuple[_triton.Launch, Code]]:
        return launches.measured(
            self.spec, self.case, self.dtype, self.architecture, self.direction
        )


def plan() -> list[Call]:
    """As few calls as compile every kernel for every architecture.

    Some real cases in bfloat16 (or the op's first dtype) for all architectures; for sm_90 the first of them in the
    other dtypes, and a case with odd numbers of channels.
    """
    calls = []
    for spec in iter_specs():
        if importlib.util.find_spec(f"effdet_kernels.ops.{spec.name}.triton_fwd") is None:
            continue  # no Triton kernels, or those of other ops
        cases = {case.name: case for case in spec.cases}
        first, own = launches.real_cases(spec)[0], launches.own_dtype(spec)
        small = next(case for case in spec.cases if "bench" not in case.tags)
        real = [first, *(cases[name] for name in ALSO.get(spec.name, ()))]
        odd = cases[ODD.get(spec.name, small.name)]
        others = [label for label, dtype in DTYPES.items() if dtype in spec.dtypes and label != own]
        for direction in launches.directions(spec):
            call = functools.partial(Call, spec, direction)
            calls += [
                call(case, own, arch, arch == QUICK) for case in real for arch in ARCHITECTURES
            ]
            calls += [call(first, label, QUICK, False) for label in others]
            calls += [call(odd, own, QUICK, False)] if odd not in real else []
    return calls


def lines(made: Sequence[tuple[_triton.Launch, Code]]) -> list[str]:
    """The table's entry of a call; launches that are alike stand once."""
    return list(dict.fromkeys(_line(launch, code) for launch, code in made))


def _line(launch: _triton.Launch, code: Code) -> str:
    options = ", ".join(f"{name}={_short(value)}" for name, value in sorted(launch.options.items()))
    return (
        f"{launch.kernel.__name__}({options}): {code.registers} registers, {code.shared} bytes shared,"
        f" {code.local} local, {code.vector_loads} vector and {code.scalar_loads} scalar loads,"
        f" {code.matrix or 'no'} matrix instructions"
    )


def _short(value: Any) -> str:
    return str(getattr(value, "value", value)).replace(" ", "")


def faults(call: Call, made: Sequence[tuple[_triton.Launch, Code]]) -> list[str]:
    """What is wrong with the code of a call, whatever was recorded."""
    return [
        f"{launch.kernel.__name__} {fault}"
        for launch, code in made
        for fault in _faults(launch, code, call.architecture, DTYPES[call.dtype].itemsize)
    ]


def _faults(launch: _triton.Launch, code: Code, architecture: int, itemsize: int) -> Iterator[str]:
    options, limit = launch.options, ARCHITECTURES[architecture] * 1024
    half, double = itemsize == 2, itemsize == 8
    if code.local > (FP64_LOCAL if double else 0):
        yield f"has {code.local} bytes of local memory"
    if code.shared > limit:
        yield f"takes {code.shared} bytes of shared memory, a block has {limit}"
    if (warps := code.resident_warps(architecture)) < LEAST_WARPS:
        yield f"leaves a multiprocessor {warps} warps, {LEAST_WARPS} are wanted"
    if half and launch.flops:
        # Without an activation this one's only product has as many rows as the patch, fewer than HGMMA takes.
        plain = launch.kernel.__name__ == "dense_conv_bwd_patch_kernel" and options["ACT"] == "none"
        wide = options.get("BLOCK_M", 0) >= 64 and not plain
        want = "HGMMA" if architecture == 90 and wide else "MMA"
        if want not in code.matrix:
            yield f"has no {want}"
    if half and _in_vectors(options, code.warps) and not code.vector_loads:
        yield "loads nothing in vectors"


def _in_vectors(options: dict[str, Any], warps: int) -> bool:
    """Whether maps can be loaded 8 bytes at a time: channels are aligned, and a thread has 4 elements of a tile."""
    if "IN_UNIT" in options:
        return options["IN_UNIT"] >= 8
    tile = math.prod(size for name, size in options.items() if name.startswith("BLOCK_"))
    return options.get("UNIT", 0) >= 8 and tile >= 4 * WARP * warps


def record(path: Path, processes: int) -> list[str]:
    """Writes the table of all calls, compiled by so many processes; returns what is wrong, a line each.

    A call that does not compile is not in the table.

    Raises:
        ValueError: ``processes`` is not positive.
    """
    if processes < 1:
        raise ValueError(f"--jobs: got {processes}, takes at least 1")
    names = [call.name for call in plan()]
    table: Table = {}
    wrong = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        results = tqdm(pool.map(_compile, names), total=len(names), unit="call", disable=None)
        for name, (entry, found) in zip(names, results, strict=True):
            if entry:
                table[name] = entry
            wrong += [f"{name}: {fault}" for fault in found]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    return wrong


def _compile(name: str) -> tuple[list[str], list[str]]:
    call = _calls()[name]
    try:
        made = call.measured()
    except Exception as error:  # Triton's compiler raises errors of many types
        first = (str(error).strip().splitlines() or [""])[0]
        return [], [f"does not compile: {type(error).__name__}: {first}"]
    return lines(made), faults(call, made)


@functools.cache
def _calls() -> dict[str, Call]:
    return {call.name: call for call in plan()}
